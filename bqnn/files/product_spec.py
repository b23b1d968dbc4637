"""How a file describes the product of a layer, quantized or not: its kind, shape and geometry. An embedding is the
product with a row of the unit matrix for each index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import nn

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.convolutions import BayesConv1d, BayesConv2d
from bqnn.bayes.embedding import BayesEmbedding
from bqnn.bayes.layers import BayesLinear
from bqnn.core.files import FormatError
from bqnn.files.container import is_count
from bqnn.packed.convolutions import PADDING_MODES, PackedConv1d, PackedConv2d
from bqnn.packed.embedding import PackedEmbedding
from bqnn.packed.layers import PackedLinear
from bqnn.packed.weight import PackedWeight


class Kind(NamedTuple):
    """What a description calls a layer by: torch's class, the quantized ones, and how many numbers each of its steps
    has."""

    plain: type[nn.Module]
    bayes: type[BayesLayer]
    packed: type[PackedWeight]
    steps: int = 0


EMBEDDING = "embedding"
KINDS = {
    "linear": Kind(nn.Linear, BayesLinear, PackedLinear),
    "conv1d": Kind(nn.Conv1d, BayesConv1d, PackedConv1d, 1),
    "conv2d": Kind(nn.Conv2d, BayesConv2d, PackedConv2d, 2),
    EMBEDDING: Kind(nn.Embedding, BayesEmbedding, PackedEmbedding),
}
PLAIN_LAYERS = tuple(kind.plain for kind in KINDS.values())
LARGEST_GEOMETRY = (1 << 31) - 1  # torch's convolutions and ours count positions in 32 bits


def tensor_name(layer: str, part: str) -> str:
    """The name in the state dict of a tensor of a layer; the network itself may be the layer, with the name ""."""
    return f"{layer}.{part}" if layer else part


def usual(kind: str) -> dict[str, Any]:
    """The geometry that a layer of this kind has if its description does not say otherwise."""
    if kind == EMBEDDING:
        return {"padding_idx": None}
    if not (steps := KINDS[kind].steps):
        return {}
    ones, zeros = [1] * steps, [0] * steps
    return {"stride": ones, "padding": zeros, "dilation": ones, "groups": 1, "padding_mode": "zeros"}


def describe_product(layer: nn.Module) -> dict[str, Any]:
    """Kind, shape and geometry of a layer, quantized or not, without what is as usual.

    Raises:
        FormatError: ``layer`` is none of :data:`KINDS`.
    """
    found = [name for name, each in KINDS.items() if isinstance(layer, (each.packed, each.plain))]
    if not found:
        raise FormatError(f"model must have a layer of the kinds {', '.join(KINDS)} there, got {type(layer).__name__}")
    kind, module = found[0], cast(Any, layer)
    shape = module.shape if isinstance(layer, PackedWeight) else module.weight.shape
    geometry = usual(kind)
    values = {name: getattr(module, name) for name in geometry}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    own = {name: value for name, value in values.items() if value != geometry[name]}
    return {"kind": kind, "shape": list(shape), **own}


def product_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a layer's description, which has been checked, is that of its product."""
    return {key: value for key, value in spec.items() if key in ("kind", "shape", *usual(spec["kind"]))}


def geometry_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The geometry of a layer by its description, which has been checked: arguments of its classes."""
    return {name: spec.get(name, value) for name, value in usual(spec["kind"]).items()}


def sizes_of(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    """The sizes of the inputs of a layer by its description, which has been checked: columns, or input channels and
    kernel."""
    columns, *kernel = spec["shape"][1:]
    return (columns * spec.get("groups", 1), tuple(kernel)) if kernel else (columns,)


def check_product(name: str, spec: Mapping[str, Any]) -> set[str]:
    """Raises FormatError unless kind, shape and geometry are what :func:`describe_product` could have returned.

    Returns:
        the fields of ``spec`` that have been checked.
    """
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"layer {name!r}: kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    shape: Any = spec.get("shape")
    steps = KINDS[kind].steps
    if not _are_integers(shape, 2 + steps, least=1):
        raise FormatError(f"layer {name!r}: shape can not be {shape!r:.80}")
    values, checks = {**usual(kind), **spec}, {}
    if kind == EMBEDDING:
        checks["padding_idx"] = is_count(values["padding_idx"], 0) and values["padding_idx"] < shape[0]
    if steps:
        checks |= {each: _are_geometry(values[each], steps, least=1) for each in ("stride", "dilation")}
        checks["padding"] = isinstance(values["padding"], str) or _are_geometry(values["padding"], steps, least=0)
        checks["groups"] = _are_geometry([values["groups"]], 1, least=1)
        checks["padding_mode"] = isinstance(values["padding_mode"], str)
    for field, value in usual(kind).items():
        if field in spec and not (checks[field] and spec[field] != value):
            raise FormatError(f"layer {name!r}: {field} can not be {spec[field]!r:.80}")
    if steps:
        _check_geometry(name, values)
    return {"kind", "shape", *checks}


def _check_geometry(name: str, values: Mapping[str, Any]) -> None:
    """What a convolution asks of its geometry as a whole."""
    channels, groups, padding, mode = values["shape"][0], values["groups"], values["padding"], values["padding_mode"]
    if channels % groups:
        raise FormatError(f"{tensor_name(name, 'groups')} must divide the {channels} channels, got {groups}")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise FormatError(f"{tensor_name(name, 'padding')} must be numbers, 'same' or 'valid', got {padding!r:.80}")
    if padding == "same" and max(values["stride"]) > 1:
        raise FormatError(f"{tensor_name(name, 'stride')} must be 1 with padding='same', got {values['stride']}")
    if mode not in PADDING_MODES:
        modes = ", ".join(PADDING_MODES)
        raise FormatError(f"{tensor_name(name, 'padding_mode')} must be one of {modes}, got {mode!r:.80}")


def _are_integers(value: Any, count: int, least: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_count(v, least) for v in value)


def _are_geometry(value: Any, count: int, least: int) -> bool:
    return _are_integers(value, count, least) and max(value) <= LARGEST_GEOMETRY
