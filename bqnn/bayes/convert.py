"""convert: the layers of a network replaced by Bayes layers, in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bqnn.bayes.layers import BayesConv2d, BayesLayer, BayesLinear

_log = logging.getLogger("bqnn")

Skip = Iterable[str | type[nn.Module] | nn.Module]


def _bayes_linear(layer: nn.Linear, options: Mapping[str, Any]) -> BayesLinear:
    return BayesLinear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device="meta",
        dtype=layer.weight.dtype,
        **options,
    )


def _bayes_conv2d(layer: Any, options: Mapping[str, Any]) -> BayesConv2d:
    return BayesConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
        dtype=layer.weight.dtype,
        **options,
    )


# Subclasses are left alone: they may read their weight past the forward pass, as nn.MultiheadAttention's do.
CONVERTERS: dict[type[nn.Module], Callable[[Any, Mapping[str, Any]], BayesLayer]] = {
    nn.Linear: _bayes_linear,
    nn.Conv2d: _bayes_conv2d,
}


def convert(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of ``net`` with every nn.Linear and nn.Conv2d a Bayes layer; see :func:`convert_`."""
    return convert_(copy.deepcopy(net), num_levels, skip=_by_name(net, skip), overrides=overrides, **options)


def convert_(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces every nn.Linear and nn.Conv2d of ``net``, nested ones too, by a Bayes layer with the same weight.

    The weights become the means, and the levels are those with the least squared error, so that a pretrained network
    starts from its quantized self. A layer that starts at zero, or at any one value, gets the codebook of weights to be
    expected, and trains. A layer used in two places stays one layer.

    Args:
        net: any network; itself a layer, too.
        num_levels: M, 2 to 16, for all layers without an override.
        skip: layers to leave as they are: names ("fc", and all that is inside it), types, or modules.
        overrides: options for a layer by its name, e.g. ``{"fc": {"num_levels": 16, "granularity": "channel"}}``.
        options: further arguments of :class:`BayesLinear` and :class:`BayesConv2d`: granularity, partition, estimator,
            prior, quantize_mean, coarse_variance.

    Returns:
        the network; ``net`` itself, changed, unless it is a layer.

    Raises:
        TypeError, ValueError: a name in ``skip`` or ``overrides`` that no module has, no layer to convert, a layer with
            a parametrized weight, or an option out of its range; the network is then as it was.
    """
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
    replacements = {}
    for layer, own_names in layers.items():
        own = {option: value for name in own_names for option, value in overrides.get(name, {}).items()}
        replacements[layer] = _convert_layer(own_names[0], layer, {"num_levels": num_levels, **options, **own})
    # Only now, with nothing left that could fail.
    for layer, own_names in layers.items():
        for name in filter(None, own_names):
            parent, _, attribute = name.rpartition(".")
            setattr(net.get_submodule(parent), attribute, replacements[layer])
    _log.info("converted %d layers", len(replacements))
    return replacements.get(net, net)


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
    computed = is_parametrized(layer) and isinstance(layer, (nn.Linear, nn.Conv2d))
    if computed or (type(layer) in CONVERTERS and "weight" not in layer._parameters):
        raise ValueError(f"layer {name!r} has a parametrized weight; remove the parametrization first, or skip it")
    return type(layer) in CONVERTERS


def _convert_layer(name: str, layer: nn.Module, options: Mapping[str, Any]) -> BayesLayer:
    try:
        # Made without data: the weights it would draw and the levels it would fit to them are thrown away.
        bayes = CONVERTERS[type(layer)](layer, options)
        device = next(layer.parameters()).device
        if device.type != "meta":
            bayes.to_empty(device=device).load_state_dict(layer.state_dict())
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    for own_name, parameter in layer.named_parameters():
        bayes.get_parameter(own_name).requires_grad_(parameter.requires_grad)
    return bayes.train(layer.training)


def _by_name(net: nn.Module, skip: Skip) -> Skip:
    """``skip`` with names for modules, which a copy of the network has too."""
    if isinstance(skip, str):
        return skip
    names = _names(net)
    return [names[entry][0] if isinstance(entry, nn.Module) and entry in names else entry for entry in skip]
