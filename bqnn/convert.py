"""convert: the layers of a network replaced by Bayes layers, in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from bqnn.layers import BayesConv2d, BayesLayer, BayesLinear

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
    return convert_(copy.deepcopy(net), num_levels, skip=_copied_skip(net, skip), overrides=overrides, **options)


def convert_(
    net: nn.Module,
    num_levels: int = 3,
    *,
    skip: Skip = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces every nn.Linear and nn.Conv2d of ``net``, nested ones too, by a Bayes layer with the same weight.

    The weights become the means, and a Lloyd-Max fit to them the levels, so that a pretrained network starts from
    its quantized self. A layer used in two places stays one layer.

    Args:
        net: any network; itself a layer, too.
        num_levels: M, 2 to 16, for all layers without an override.
        skip: layers to leave as they are: names ("fc", and all that is inside it), types, or modules.
        overrides: options for a layer by its name, e.g. ``{"fc": {"num_levels": 16, "granularity": "channel"}}``.
        options: further arguments of :class:`BayesLinear` and :class:`BayesConv2d`: granularity, partition, estimator,
            prior, quantize_mean.

    Returns:
        the network; ``net`` itself, changed, unless it is a layer.

    Raises:
        ValueError: a name in ``skip`` or ``overrides`` that no module has, no layer to convert, or an option out of
            its range.
    """
    overrides = dict(overrides or {})
    skip = list(skip)
    names = {name for name, _ in net.named_modules(remove_duplicate=False)}
    for argument, given in (("skip", [entry for entry in skip if isinstance(entry, str)]), ("overrides", overrides)):
        if unknown := sorted(set(given) - names):
            raise ValueError(f"{argument} names modules that the network does not have: {', '.join(unknown)}")
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if type(module) not in CONVERTERS or _is_skipped(name, module, skip):
            continue
        if module not in replaced:
            replaced[module] = _convert_layer(
                name, module, {"num_levels": num_levels, **options, **overrides.pop(name, {})}
            )
        overrides.pop(name, None)
        if name:
            parent, _, attribute = name.rpartition(".")
            setattr(net.get_submodule(parent), attribute, replaced[module])
    if not replaced:
        raise ValueError("net has no nn.Linear or nn.Conv2d to convert (or all are skipped)")
    if overrides:
        raise ValueError(f"overrides names modules that are not converted: {', '.join(sorted(overrides))}")
    _log.info("converted %d layers", len(replaced))
    return replaced.get(net, net)


def _convert_layer(name: str, layer: nn.Module, options: Mapping[str, Any]) -> BayesLayer:
    if getattr(layer, "parametrizations", None):
        raise ValueError(f"layer {name!r} has a parametrized weight; remove the parametrization first, or skip it")
    try:
        # Made without data: the weights it would draw and the levels it would fit to them are thrown away.
        bayes = CONVERTERS[type(layer)](layer, options).to_empty(device=next(layer.parameters()).device)
        bayes.load_state_dict(layer.state_dict())
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    return bayes.train(layer.training)


def _is_skipped(name: str, module: nn.Module, skip: Iterable[str | type[nn.Module] | nn.Module]) -> bool:
    for entry in skip:
        if isinstance(entry, str):
            if name == entry or name.startswith(entry + "."):
                return True
        elif isinstance(entry, type):
            if isinstance(module, entry):
                return True
        elif module is entry or module in entry.modules():
            return True
    return False


def _copied_skip(net: nn.Module, skip: Skip) -> list[str | type[nn.Module]]:
    """``skip`` with modules as names, which a copy of the network has too."""
    names = {module: name for name, module in net.named_modules()}
    result: list[str | type[nn.Module]] = []
    for entry in skip:
        if isinstance(entry, nn.Module):
            if entry not in names:
                raise ValueError(f"skip holds a module that is not in the network: {type(entry).__name__}")
            result.append(names[entry])
        else:
            result.append(entry)
    return result
