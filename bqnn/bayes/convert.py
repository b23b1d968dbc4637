"""convert: the layers of a network replaced by Bayes layers, in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.choice import LAYERS, TAKEN, Choice, Skip, by_name, choose, names_of, skipped_modules
from bqnn.bayes.convolutions import BayesConv1d, BayesConv2d
from bqnn.bayes.embedding import BayesEmbedding
from bqnn.bayes.layers import BayesLinear
from bqnn.bayes.left import left_modules, table
from bqnn.bayes.ties import Ties, check_given_up, find_ties
from bqnn.core.check import check_module
from bqnn.core.composed import composing
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, check_own_forward, fresh, rebind

_log = logging.getLogger("bqnn")


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


def _bayes_embedding(layer: nn.Embedding, options: Mapping[str, Any]) -> BayesEmbedding:
    sizes = layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.max_norm, layer.norm_type
    flags = layer.scale_grad_by_freq, layer.sparse
    return BayesEmbedding(*sizes, *flags, device="meta", dtype=layer.weight.dtype, **options)


# The Bayes form of each of choice.LAYERS, which is what all else is composed of.
CONVERTERS: dict[type[nn.Module], Callable[[Any, Mapping[str, Any]], BayesLayer]] = {
    nn.Linear: _bayes_linear,
    nn.Conv1d: _bayes_convolution(BayesConv1d),
    nn.Conv2d: _bayes_convolution(BayesConv2d),
    nn.Embedding: _bayes_embedding,
}


def convert(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    subclasses: Sequence[type[nn.Module]] = (),
    **options: Any,
) -> nn.Module:
    """A copy of ``net`` with Bayes layers in place of torch's; see :func:`convert_`.

    Raises:
        TypeError, ValueError: as :func:`convert_`; also for a closure, a default argument, a weak reference or a class
            that refers to a module of ``net``, since it would still do so in the copy.
    """
    check_module("net", net)
    named, copied = by_name(net, skip), copy_network(net)
    return convert_(copied, num_levels, skip=named, overrides=overrides, subclasses=subclasses, **options)


def convert_(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    subclasses: Sequence[type[nn.Module]] = (),
    **options: Any,
) -> nn.Module:
    """Turns the layers of ``net``, nested ones too, into Bayes layers with the same weights.

    nn.Linear, nn.Conv1d, nn.Conv2d and nn.Embedding become Bayes layers; nn.MultiheadAttention, nn.LSTM, nn.GRU,
    nn.RNN, nn.ConvTranspose1d and nn.ConvTranspose2d layers of torch's class with Bayes layers for their weights
    (:data:`bqnn.core.forms.COMPOSED`).

    The weights become the means, and the levels are those with the least squared error, so that a pretrained network
    starts from its quantized self. A layer that starts at zero, or at any one value, gets the codebook of weights to be
    expected, and trains. A layer used in two places stays one layer.

    Each layer becomes another one in place and keeps its hooks: lists, dicts, closures, whatever refers to it, refers
    to the Bayes layer. Who reads ``layer.weight`` past its forward pass (fast paths, functional attention) reads the
    quantized weight. Layers that share a weight share one posterior, and any other module with that weight, such as an
    embedding that is skipped, reads the quantized one from then on. A frozen weight has a frozen codebook and
    variances. The weights of an attention's queries, keys and values, and those of transposed convolutions, are
    parameters of their own afterwards, of which an optimizer that was made before knows nothing.

    What is left at full precision, and why, is a table in the log, and in :func:`bqnn.report`. Subclasses are left, as
    what else they do with their weight is their own, unless ``subclasses`` names them; so is what ``net`` holds without
    its being among its modules.

    Args:
        net: any network; itself a layer, too.
        num_levels: M, 2 to 16, for all layers without an override.
        skip: layers to leave as they are: names ("fc", and all that is inside it), types, or modules.
        overrides: options for a layer by its name, e.g. ``{"fc": {"num_levels": 16, "granularity": "channel"}}``; those
            of a composed layer are for all its parts, and a part's own ("attention.q_proj") come before them.
        subclasses: classes of layers that compute what torch's class does: they may override nothing but how a layer is
            made and printed. They count as torch's, with what methods they add gone. GPT-2's Conv1D, of transformers,
            may be one of them.
        options: further arguments of :class:`BayesLinear`: granularity, partition, estimator, prior, quantize_mean,
            coarse_variance, spike_width, slab_share, start_sigma.

    Returns:
        the network; ``net`` itself, changed, unless it is a layer.

    Raises:
        TypeError, ValueError: a name in ``skip`` or ``overrides`` that no module has, no layer to convert, an option
            out of its range; a layer with a parametrized weight, or a forward of its own, or an embedding that cuts or
            has sparse gradients; a weight that something reads as a tensor, in a list or as a view; tied layers of
            which one is skipped, or with different options. The network is then as it was.
    """
    check_module("net", net)
    choice = choose(net, skip, subclasses)
    if type(net) in choice.kinds:  # becoming another one would change a layer that the caller may still use
        named, net = by_name(net, skip), copy.deepcopy(net)
        choice = choose(net, named, subclasses)
    _check_plain(net, choice)
    first = {layer: own[0] for layer, own in names_of(net).items() if layer in choice.composed}
    methods = bound_methods(net, first)
    with composing(choice.composed) as given_up:
        check_given_up(net, {first[layer]: parameters for layer, parameters in given_up.items()})
        count = _convert_layers(net, choice, num_levels, dict(overrides or {}), options)
    rebind(methods)
    left = left_modules(net)
    _log.info("converted %d layers%s", count, f"\n{table(left)}" if left else "")
    if asked := [each.name for each in left if each.can_be_asked_for]:
        _log.warning("left at full precision, which subclasses=[...] may change: %s", ", ".join(asked))
    return net


def _convert_layers(
    net: nn.Module,
    choice: Choice,
    num_levels: int,
    overrides: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> int:
    """Converts the layers of one weight, parts of composed ones too; how many there were."""
    names = names_of(net)
    skipped = choice.skipped | skipped_modules(names, choice.later)
    _check_names(overrides, {name for own in names.values() for name in own}, "the network does not have")
    layers = {m: own for m, own in names.items() if m not in skipped and choice.kinds.get(type(m)) in CONVERTERS}
    if not layers:
        raise ValueError(f"net has no layer to convert, of the kinds {TAKEN} (or all are skipped)")
    used = {name for own in layers.values() for name in own}
    around = {each for name in used for each in _around(name)}
    used |= {name for layer in choice.composed for name in names[layer] if name in around}
    _check_names(overrides, used, "are not converted")
    for layer, own in layers.items():
        check_own_forward(own[0], layer)
    first_names = {layer: own_names[0] for layer, own_names in layers.items()}
    ties, methods = find_ties(net, first_names), bound_methods(net, first_names)
    settings = {}
    for layer, own_names in layers.items():
        outside_in = [each for name in own_names for each in _around(name)]
        own_options = {option: value for name in outside_in for option, value in overrides.get(name, {}).items()}
        settings[layer] = {"num_levels": num_levels, **options, **own_options}
    ties.check_options(settings)
    means = {layer: _as_mean(layer) for layer in layers}
    bases = {layer: choice.kinds[type(layer)] for layer in layers}
    replacements = {
        layer: _convert_layer(name, bases[layer], layer, means[ties.first(layer)], settings[layer])
        for layer, name in first_names.items()
    }
    # Only now, with nothing left that could fail.
    for layer, replacement in replacements.items():
        become(layer, replacement, fresh(bases[layer]))
    _tie(ties)
    rebind(methods)
    return len(replacements)


def _around(name: str) -> list[str]:
    """The names of the modules that a module is in, the outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _check_names(overrides: Mapping[str, Any], allowed: set[str], what: str) -> None:
    if unknown := sorted(set(overrides) - allowed):
        raise ValueError(f"overrides names modules that {what}: {', '.join(unknown)}")


def _check_plain(net: nn.Module, choice: Choice) -> None:
    """Raises ValueError for a layer to convert whose weights are not plain parameters, or whose forward is its own."""
    for layer, own in names_of(net).items():
        if layer in choice.skipped:
            continue
        computed = is_parametrized(layer) and isinstance(layer, tuple(choice.kinds))
        pruned = choice.kinds.get(type(layer)) in LAYERS and "weight" not in layer._parameters
        if layer in choice.composed:
            pruned = not layer._parameters.keys() >= choice.composed[layer].fresh(layer)._parameters.keys()
        if computed or pruned:
            raise ValueError(
                f"layer {own[0]!r} has a parametrized weight; remove the parametrization first, or skip it"
            )
        if layer in choice.composed:
            check_own_forward(own[0], layer)


def _as_mean(layer: Any) -> nn.Parameter:
    """The layer's own parameter, where gradients can be contiguous; else a copy that is."""
    weight = layer.weight
    if isinstance(weight, nn.Parameter) and weight.is_contiguous() and not weight.is_inference():
        return weight
    copied = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(weight)
    return nn.Parameter(copied.detach(), weight.requires_grad)


def _convert_layer(
    name: str, base: type[nn.Module], layer: Any, mean: nn.Parameter, options: Mapping[str, Any]
) -> BayesLayer:
    """The Bayes layer for ``layer``, with ``mean`` and the layer's own bias as parameters."""
    try:
        # Made without data: the weights it would draw and the levels it would fit to them are thrown away.
        bayes = CONVERTERS[base](layer, options)
        bayes.mean = mean
        if getattr(layer, "bias", None) is not None:
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
