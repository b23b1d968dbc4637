"""convert: the layers of a network replaced by Bayes layers, in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.convolutions import BayesConv1d, BayesConv2d
from bqnn.bayes.layers import BayesLinear
from bqnn.bayes.ties import Ties, find_ties
from bqnn.core.check import check_module
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, check_own_forward, fresh, rebind

_log = logging.getLogger("bqnn")

Skip = Iterable[str | type[nn.Module] | nn.Module]


def _bayes_linear(layer: nn.Linear, options: Mapping[str, Any]) -> BayesLinear:
    has_bias = layer.bias is not None
    return BayesLinear(
        layer.in_features, layer.out_features, has_bias, device="meta", dtype=layer.weight.dtype, **options
    )


def _bayes_convolution(kind: type[BayesConv1d | BayesConv2d]) -> Callable[[Any, Mapping[str, Any]], BayesLayer]:
    def make(layer: Any, options: Mapping[str, Any]) -> BayesLayer:
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size
        steps = layer.stride, layer.padding, layer.dilation, layer.groups
        ends = layer.bias is not None, layer.padding_mode
        return kind(*sizes, *steps, *ends, device="meta", dtype=layer.weight.dtype, **options)

    return make


# Subclasses are left alone: what else they do with their weight is their own.
CONVERTERS: dict[type[nn.Module], Callable[[Any, Mapping[str, Any]], BayesLayer]] = {
    nn.Linear: _bayes_linear,
    nn.Conv1d: _bayes_convolution(BayesConv1d),
    nn.Conv2d: _bayes_convolution(BayesConv2d),
}
_KINDS = tuple(CONVERTERS)


def convert(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of ``net`` with every nn.Linear and nn.Conv2d a Bayes layer; see :func:`convert_`.

    Raises:
        TypeError, ValueError: as :func:`convert_`; also for a closure, a default argument, a weak reference or a class
            that refers to a module of ``net``, since it would still do so in the copy.
    """
    check_module("net", net)
    return convert_(copy_network(net), num_levels, skip=_by_name(net, skip), overrides=overrides, **options)


def convert_(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Turns every nn.Linear and nn.Conv2d of ``net``, nested ones too, into a Bayes layer with the same weight.

    The weights become the means, and the levels are those with the least squared error, so that a pretrained network
    starts from its quantized self. A layer that starts at zero, or at any one value, gets the codebook of weights to be
    expected, and trains. A layer used in two places stays one layer.

    Each layer becomes another one in place and keeps its hooks: lists, dicts, closures, whatever refers to it, refers
    to the Bayes layer. Who reads ``layer.weight`` past its forward pass (fast paths, functional attention) reads the
    quantized weight. Layers that share a weight share one posterior, and any other module with that weight, such as a
    tied embedding, reads the quantized one from then on. A frozen weight has a frozen codebook and variances.

    Subclasses of both stay as they are, and are named in the log: nn.MultiheadAttention has its weight at full
    precision. So do layers that ``net`` holds without their being among its modules.

    Args:
        net: any network; itself a layer, too.
        num_levels: M, 2 to 16, for all layers without an override.
        skip: layers to leave as they are: names ("fc", and all that is inside it), types, or modules.
        overrides: options for a layer by its name, e.g. ``{"fc": {"num_levels": 16, "granularity": "channel"}}``.
        options: further arguments of :class:`BayesLinear` and :class:`BayesConv2d`: granularity, partition, estimator,
            prior, quantize_mean, coarse_variance, spike_width, slab_share, start_sigma.

    Returns:
        the network; ``net`` itself, changed, unless it is a layer.

    Raises:
        TypeError, ValueError: a name in ``skip`` or ``overrides`` that no module has, no layer to convert, an option
            out of its range; a layer with a parametrized weight, or a forward of its own; a weight that something reads
            as a tensor, in a list or as a view; tied layers of which one is skipped, or with different options. The
            network is then as it was.
    """
    check_module("net", net)
    overrides = dict(overrides or {})
    names = _names(net)
    skipped = _skipped(names, skip)
    known = {name for all_names in names.values() for name in all_names}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"overrides names modules that the network does not have: {', '.join(unknown)}")
    layers = {m: own for m, own in names.items() if m not in skipped and _is_convertible(own[0], m)}
    if not layers:
        raise ValueError("net has no nn.Linear or nn.Conv2d to convert (or all are skipped)")
    if unused := sorted(set(overrides) - {name for own_names in layers.values() for name in own_names}):
        raise ValueError(f"overrides names modules that are not converted: {', '.join(unused)}")
    if net in layers:  # becoming another one would change a layer that the caller may still use
        net = copy.deepcopy(net)
        layers = {net: [""]}
    first_names = {layer: own_names[0] for layer, own_names in layers.items()}
    ties, methods = find_ties(net, first_names), bound_methods(net, first_names)
    settings = {}
    for layer, own_names in layers.items():
        own = {option: value for name in own_names for option, value in overrides.get(name, {}).items()}
        settings[layer] = {"num_levels": num_levels, **options, **own}
    ties.check_options(settings)
    means = {layer: _as_mean(layer) for layer in layers}
    replacements = {
        layer: _convert_layer(name, layer, means[ties.first(layer)], settings[layer])
        for layer, name in first_names.items()
    }
    # Only now, with nothing left that could fail.
    for layer, replacement in replacements.items():
        become(layer, replacement, fresh(type(layer)))
    _tie(ties)
    rebind(methods)
    _log.info("converted %d layers", len(replacements))
    if left := [name for name, module in net.named_modules() if _is_left(module) and module not in skipped]:
        _log.warning("left at full precision, as subclasses of layers are: %s", ", ".join(left))
    return net


def _names(net: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of a network and all its names: a shared one has several, the network itself ""."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _skipped(names: Mapping[nn.Module, list[str]], skip: Skip) -> set[nn.Module]:
    """The modules that ``skip`` stands for, with all that is inside them."""
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, types or modules, got the string {skip!r}")
    entries = list(skip)
    by_name = {name: module for module, all_names in names.items() for name in all_names}
    if unknown := sorted(entry for entry in entries if isinstance(entry, str) and entry not in by_name):
        raise ValueError(f"skip names modules that the network does not have: {', '.join(unknown)}")
    found: set[nn.Module] = set()
    for entry in entries:
        if isinstance(entry, type):
            roots = [module for module in names if isinstance(module, entry)]
        elif isinstance(entry, str):
            roots = [by_name[entry]]
        elif entry in names:
            roots = [entry]
        else:
            raise ValueError(f"skip holds a module that is not in the network: {type(entry).__name__}")
        found.update(module for root in roots for module in root.modules())
    return found


def _is_convertible(name: str, layer: nn.Module) -> bool:
    """Whether a layer is one of :data:`CONVERTERS`; ValueError for one whose weight is not a plain parameter."""
    computed = is_parametrized(layer) and isinstance(layer, _KINDS)
    if computed or (type(layer) in CONVERTERS and "weight" not in layer._parameters):
        raise ValueError(f"layer {name!r} has a parametrized weight; remove the parametrization first, or skip it")
    if type(layer) in CONVERTERS:
        check_own_forward(name, layer)
    return type(layer) in CONVERTERS


def _is_left(module: nn.Module) -> bool:
    """Whether it is, or does the work of, a layer that is not converted."""
    others = (*_KINDS, nn.MultiheadAttention)
    return isinstance(module, others) and not isinstance(module, BayesLayer)


def _as_mean(layer: Any) -> nn.Parameter:
    """The layer's own parameter, where gradients can be contiguous; else a copy that is."""
    weight = layer.weight
    if isinstance(weight, nn.Parameter) and weight.is_contiguous() and not weight.is_inference():
        return weight
    copied = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(weight)
    return nn.Parameter(copied.detach(), weight.requires_grad)


def _convert_layer(name: str, layer: Any, mean: nn.Parameter, options: Mapping[str, Any]) -> BayesLayer:
    """The Bayes layer for ``layer``, with ``mean`` and the layer's own bias as parameters."""
    try:
        # Made without data: the weights it would draw and the levels it would fit to them are thrown away.
        bayes = CONVERTERS[type(layer)](layer, options)
        bayes.mean = mean
        if layer.bias is not None:
            bayes.bias = layer.bias
        for own_name, parameter in bayes._parameters.items():
            if parameter is not None and parameter.device != mean.device:
                bayes._parameters[own_name] = nn.Parameter(torch.empty_like(parameter, device=mean.device))
        for own_name, buffer in bayes._buffers.items():
            if buffer is not None and buffer.device != mean.device:
                bayes._buffers[own_name] = torch.empty_like(buffer, device=mean.device)
        if mean.device.type != "meta":
            bayes.fit_codebook_()
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    bayes.freeze_weight(mean.requires_grad)
    return bayes.train(layer.training)


def _tie(ties: Ties) -> None:
    """Lets layers that shared a weight share a posterior, and other modules read it."""
    for module, name, layer in ties.readers:
        layer.give_to(module, name)
    for group in ties.groups:
        group[0].tie(tuple(group))


def _by_name(net: nn.Module, skip: Skip) -> Skip:
    """``skip`` with names for modules, which a copy of the network has too."""
    if isinstance(skip, str):
        return skip
    names = _names(net)
    return [names[entry][0] if isinstance(entry, nn.Module) and entry in names else entry for entry in skip]
