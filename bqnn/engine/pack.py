"""pack: a trained Bayes network to codes in bytes, in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.convolutions import BayesConv1d, BayesConv2d
from bqnn.bayes.embedding import BayesEmbedding
from bqnn.bayes.layers import BayesLinear, bayes_layers
from bqnn.core.chances import chances_of
from bqnn.core.check import check_flag, check_module, check_precision
from bqnn.core.codes import pack_codes
from bqnn.core.quantizer import Posterior
from bqnn.core.readers import drop_parameter, readers
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, check_own_forward, fresh, rebind
from bqnn.engine.relu import relu_after
from bqnn.packed.base import check_execution
from bqnn.packed.convolutions import PackedConv1d, PackedConv2d, PackedConvolution
from bqnn.packed.embedding import PackedEmbedding
from bqnn.packed.layers import PackedLinear
from bqnn.packed.weight import PackedWeight

_log = logging.getLogger("bqnn")


def _linear(layer: BayesLinear, tensors: dict[str, Any], run: dict[str, Any]) -> PackedWeight:
    return PackedLinear(layer.in_features, **tensors, **run)


def _convolution(kind: type[PackedConvolution]) -> Callable[..., PackedWeight]:
    names = "in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    return lambda layer, tensors, run: kind(**{name: getattr(layer, name) for name in names}, **tensors, **run)


def _embedding(layer: BayesEmbedding, tensors: dict[str, Any], run: dict[str, Any]) -> PackedWeight:
    own = {name: tensors[name] for name in ("codes", "levels", "chances")}
    return PackedEmbedding(layer.embedding_dim, padding_idx=layer.padding_idx, **own)


# Of each Bayes layer what packs it: the layer, its tensors, and how a product runs. The twin of convert's CONVERTERS.
PACKERS: dict[type[BayesLayer], Callable[[Any, dict[str, Any], dict[str, Any]], PackedWeight]] = {
    BayesLinear: _linear,
    BayesConv1d: _convolution(PackedConv1d),
    BayesConv2d: _convolution(PackedConv2d),
    BayesEmbedding: _embedding,
}
_PRODUCTS = (BayesLinear, BayesConv1d, BayesConv2d)


def pack(net: nn.Module, precision: str = "fp32", execution: str = "auto", fuse_relu: bool = True) -> nn.Module:
    """A copy of ``net`` in which every Bayes layer is a packed one, in evaluation mode; ``net`` stays as it is.

    The arguments, and what becomes of the network, are those of :func:`pack_`.

    Raises:
        ValueError: as :func:`pack_`; also for a closure, a default argument, a weak reference or a class that refers to
            a module of ``net``, since it would still do so in the copy.
    """
    # Means and variances are most of the memory, and the copy has no use for them.
    shared = {id(tensor): tensor for layer in bayes_layers(net).values() for tensor in (layer.mean, layer.log_sigma2)}
    return pack_(copy_network(net, shared), precision, execution, fuse_relu)


def pack_(net: nn.Module, precision: str = "fp32", execution: str = "auto", fuse_relu: bool = True) -> nn.Module:
    """Turns every Bayes layer of ``net`` into a packed one, and the network to evaluation mode.

    Each layer becomes another one in place, so that whatever refers to it refers to the packed layer; a layer used in
    two places stays one layer, and hooks stay. Who reads ``layer.weight`` past its forward pass reads the decoded
    weight, which is then kept in memory; so do modules with a tied weight. Tied layers share their codes. Everything
    that is no Bayes layer stays as it is, but for an nn.ReLU that directly follows one in an nn.Sequential, where
    nothing in the network can tap between them (:func:`bqnn.engine.relu.relu_after`): the packed layer does its work,
    an nn.Identity its place.

    Of a posterior a table of chances stays, M x M for a layer: how probable it is that a draw from the posterior has
    which code, given the code of the mean. With it :func:`bqnn.sample` and :func:`bqnn.predict` draw networks from the
    packed one, as from ``net`` where means have gathered at their levels and variances are alike. A deterministic
    layer has none.

    What is packed has no parameters: codes, levels, bias and chances are buffers. ``next(net.parameters())`` of a
    network of packed layers alone raises StopIteration; its dtype is that of ``layer.weight``.

    Layers that were trained in this process by their likelihood alone, without their divergence from the prior, are
    named in the log.

    Args:
        net: a network that bqnn.convert made, or a single Bayes layer.
        precision: "fp32", "bf16" or "int8" (bqnn.ops.packed_linear says what each computes).
        execution: "packed" keeps the weight as codes, and as the layout of them that a kernel reads; "dense" decodes it
            once and keeps it; "auto" takes, for each call, the one that bqnn.packed.cost expects to be faster.
        fuse_relu: False leaves every nn.ReLU where it is, for who reads what comes before one from outside of the
            network.

    Returns:
        ``net``.

    Raises:
        ValueError: ``net`` has no Bayes layer; a parameter of one is not finite or out of range, or it has a forward of
            its own (the message names the layer); ``precision`` or ``execution`` is none of those. The network is then
            as it was.
    """
    check_module("net", net)
    check_precision(precision)
    check_execution(execution)
    check_flag("fuse_relu", fuse_relu)
    layers: dict[str, Any] = dict(bayes_layers(net))
    if not layers:
        raise ValueError("net must have a Bayes layer, as bqnn.convert makes them, got none")
    methods = bound_methods(net, {layer: name for name, layer in layers.items()})
    relus = relu_after(net, _PRODUCTS) if fuse_relu else {}
    replacements = {layer: _pack_named(name, layer, precision, execution) for name, layer in layers.items()}
    templates = {kind: _template(kind) for kind in PACKERS}
    _share_codes(replacements)
    _warn_without_divergence(layers)
    # Only now, with nothing left that could fail.
    for layer, replacement in replacements.items():
        become(layer, replacement, templates[type(layer)])
        if id(layer) in relus:
            relu = relus[id(layer)]
            become(relu, nn.Identity(), nn.ReLU())
            layer.take_over(relu)
    for module, name, _ in list(readers(net)):
        drop_parameter(module, name)
    rebind(methods)
    return net.eval()


def _warn_without_divergence(layers: Mapping[str, BayesLayer]) -> None:
    """Names the layers that have been trained here by the likelihood alone; of a layer that was loaded nobody knows."""
    learning = {
        name: layer
        for name, layer in layers.items()
        if layer.has_posterior and not any(each.asked_for_kl for each in layer.sharing_layers())
    }
    if without := [name for name, layer in learning.items() if layer.log_sigma2.grad is not None]:
        _log.warning(
            "trained without the divergence from the prior, which gathers means at their levels: %s; "
            "minimize bqnn.elbo(...).loss, or call bqnn.fit",
            ", ".join(map(repr, without)),
        )


def _template(kind: type[BayesLayer]) -> Any:
    """A layer that has whatever attribute a Bayes layer may come to have by itself."""
    template: Any = fresh(kind)
    template.freeze_weight(True)
    template.tie((template,))
    template.asked_for_kl = True
    return template


def _share_codes(replacements: Mapping[BayesLayer, PackedWeight]) -> None:
    """Lets layers that shared a posterior share codes, levels and chances; a deterministic one has no chances."""
    firsts: dict[tuple[int, ...], PackedWeight] = {}
    tables: dict[tuple[int, ...], Tensor] = {}
    for layer, packed in replacements.items():
        key = tuple(map(id, layer.weight_sources()))
        first = firsts.setdefault(key, packed)
        packed.codes, packed.levels = first.codes, first.levels
        if packed.chances is not None:
            packed.chances = tables.setdefault(key, packed.chances)


def pack_layer(layer: BayesLayer, precision: str = "fp32", execution: str = "auto", relu: bool = False) -> PackedWeight:
    """The packed form of one Bayes layer; the arguments are those of the packed layers.

    Raises:
        TypeError: ``layer`` is none of :data:`PACKERS`.
        ValueError: a parameter is not finite or out of range, or an argument is wrong.
    """
    packer = next((packer for kind, packer in PACKERS.items() if isinstance(layer, kind)), None)
    if packer is None:
        raise TypeError(f"layer must be one of {', '.join(k.__name__ for k in PACKERS)}, got {type(layer).__name__}")
    return packer(layer, _packed_tensors(layer), {"precision": precision, "execution": execution, "relu": relu})


def _pack_named(name: str, layer: BayesLayer, precision: str, execution: str) -> PackedWeight:
    check_own_forward(name, layer)
    try:
        packed = pack_layer(layer, precision, execution)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    packed.weight_dtype = layer.mean.dtype
    return packed


def _packed_tensors(layer: BayesLayer) -> dict[str, Any]:
    """Codes, levels, bias and chances of a Bayes layer, as the packed layers take them."""
    codes = layer.codes()
    levels, thresholds = (tensor.detach() for tensor in layer.codebook())
    posterior = Posterior(layer.mean.detach(), layer.log_sigma2.detach(), levels, thresholds)
    return {
        "codes": pack_codes(codes.flatten(1), layer.num_levels),
        "levels": levels.to(torch.float32, copy=True),
        "bias": None if layer.bias is None else layer.bias.detach().clone(),
        "chances": chances_of(posterior, codes) if layer.has_posterior else None,
    }
