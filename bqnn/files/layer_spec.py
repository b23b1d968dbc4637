"""How a file describes a packed layer, and the way from the description back to the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from bqnn.core.check import MAX_LEVELS, MIN_LEVELS
from bqnn.core.codes import packed_width
from bqnn.core.files import FormatError
from bqnn.files.container import DTYPES, Entry, is_count
from bqnn.packed.base import PackedLayer
from bqnn.packed.convolutions import PADDING_MODES, PackedConv1d, PackedConv2d
from bqnn.packed.embedding import PackedEmbedding
from bqnn.packed.layers import PackedLinear
from bqnn.packed.weight import PackedWeight


class Kind(NamedTuple):
    """What a description calls a layer by: its packed class, torch's, and how many numbers each of its steps has."""

    packed: type[PackedWeight]
    plain: type[nn.Module]
    steps: int = 0


KINDS = {
    "linear": Kind(PackedLinear, nn.Linear),
    "conv1d": Kind(PackedConv1d, nn.Conv1d, 1),
    "conv2d": Kind(PackedConv2d, nn.Conv2d, 2),
    "embedding": Kind(PackedEmbedding, nn.Embedding),
}
NEEDED, OPTIONAL = ("codes", "levels"), ("bias", "chances")
PARTS = (*NEEDED, *OPTIONAL)  # the tensors of a layer
LARGEST_GEOMETRY = (1 << 31) - 1  # torch's convolutions and ours count positions in 32 bits


def tensor_name(layer: str, part: str) -> str:
    """The name in the state dict of a tensor of a layer; the network itself may be the layer, with the name ""."""
    return f"{layer}.{part}" if layer else part


def describe(layer: PackedWeight) -> dict[str, Any]:
    """The description of ``layer``, JSON-able, without what is as usual."""
    spec = {**_describe_plain(layer), "num_levels": layer.num_levels}
    if layer.granularity != "tensor":
        spec["granularity"] = layer.granularity
    if isinstance(layer, PackedLayer) and layer.relu:
        spec["relu"] = True
    return spec


def _usual(kind: str) -> dict[str, Any]:
    """What a layer of this kind has if its description does not say otherwise."""
    if kind == "embedding":
        return {"padding_idx": None}
    if not (steps := KINDS[kind].steps):
        return {}
    ones, zeros = [1] * steps, [0] * steps
    return {"stride": ones, "padding": zeros, "dilation": ones, "groups": 1, "padding_mode": "zeros"}


def _describe_plain(layer: nn.Module) -> dict[str, Any]:
    """Kind, shape and geometry of a layer, packed or not.

    Raises:
        FormatError: ``layer`` is none of :data:`KINDS`.
    """
    found = [name for name, each in KINDS.items() if isinstance(layer, (each.packed, each.plain))]
    if not found:
        raise FormatError(f"model must have a layer of the kinds {', '.join(KINDS)} there, got {type(layer).__name__}")
    kind, module = found[0], cast(Any, layer)
    described = {"kind": kind, "shape": list(module.shape if isinstance(layer, PackedWeight) else module.weight.shape)}
    usual = _usual(kind)
    values = {name: getattr(layer, name) for name in usual}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {**described, **{name: value for name, value in values.items() if value != usual[name]}}


def check_fits(name: str, layer: nn.Module, spec: Mapping[str, Any], has_bias: bool) -> None:
    """Raises FormatError unless ``layer``, of the network to be filled, is of the kind that ``spec`` describes."""
    try:
        own = _describe_plain(layer)
    except FormatError as error:
        raise FormatError(f"layer {name!r}: {error}") from error
    stored = {key: value for key, value in spec.items() if key not in ("num_levels", "granularity", "relu")}
    if own != stored:
        raise FormatError(f"layer {name!r} is {stored} in the file and {own} in the model")
    if isinstance(layer, PackedLayer) and layer.relu and "relu" not in spec:
        raise FormatError(f"layer {name!r} ends with a ReLU in the model and not in the file")
    if (getattr(layer, "bias", None) is not None) != has_bias:
        where = ("file", "model") if has_bias else ("model", "file")
        raise FormatError(f"tensor {tensor_name(name, 'bias')!r} is in the {where[0]} and not in the {where[1]}")


def check_spec(name: str, spec: Any) -> None:
    """Raises FormatError unless ``spec`` is what :func:`describe` could have returned; names layer and field."""
    if not isinstance(spec, dict):
        raise FormatError(f"layer {name!r} must be described by an object, got {spec!r:.80}")
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"layer {name!r}: kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    shape: Any = spec.get("shape")
    steps = KINDS[kind].steps
    if not _are_integers(shape, 2 + steps, least=1):
        raise FormatError(f"layer {name!r}: shape can not be {shape!r:.80}")
    checks = {
        "kind": True,
        "shape": True,
        "num_levels": type(spec.get("num_levels")) is int and MIN_LEVELS <= spec["num_levels"] <= MAX_LEVELS,
        # With one channel, one codebook a channel is one a tensor.
        "granularity": spec.get("granularity") == "channel" and shape[0] > 1,
        "relu": spec.get("relu") is True and kind != "embedding",
    }
    values = {**_usual(kind), **spec}
    if kind == "embedding":
        checks["padding_idx"] = is_count(values["padding_idx"], 0) and values["padding_idx"] < shape[0]
    if steps:
        checks |= {name: _are_geometry(values[name], steps, least=1) for name in ("stride", "dilation")}
        checks["padding"] = isinstance(values["padding"], str) or _are_geometry(values["padding"], steps, least=0)
        checks["groups"] = _are_geometry([values["groups"]], 1, least=1)
        checks["padding_mode"] = isinstance(values["padding_mode"], str)
    checks |= {name: checks[name] and spec[name] != usual for name, usual in _usual(kind).items() if name in spec}
    for field in ("num_levels", *spec):
        if not checks.get(field, False):
            raise FormatError(f"layer {name!r}: {field} can not be {spec.get(field)!r:.80}")
    if steps:
        _check_geometry(name, values)


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


def check_tensors(name: str, spec: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raises FormatError unless dtypes and shapes of a layer's tensors are those that ``spec`` (checked) asks for.

    ``entries`` are the tensors of the file by every name that they have.
    """
    codes, levels, bias, chances = (tensor_name(name, part) for part in PARTS)
    if missing := [tensor for tensor in (codes, levels) if tensor not in entries]:
        raise FormatError(f"tensor {missing[0]!r} is missing")
    shape, num_levels = spec["shape"], spec["num_levels"]
    codebooks = shape[0] if spec.get("granularity") == "channel" else 1
    width = packed_width(math.prod(shape[1:]), num_levels)
    if spec["kind"] == "embedding" and bias in entries:
        raise FormatError(f"tensor {bias!r} is of an embedding, which has none")
    tables = [(levels, "F32", [codebooks, num_levels]), (codes, "U8", [shape[0], width])]
    if chances in entries:
        tables.append((chances, "F32", [num_levels, num_levels]))
    for tensor, dtype, needed in tables:
        if entries[tensor].shape != needed:
            raise FormatError(f"tensor {tensor!r} must have the shape {needed}, got {entries[tensor].shape}")
        if entries[tensor].dtype != dtype:
            raise FormatError(f"{tensor} must be {DTYPES[dtype]}, got {DTYPES[entries[tensor].dtype]}")
    if bias not in entries:
        return
    if not DTYPES[entries[bias].dtype].is_floating_point:
        raise FormatError(f"{bias} must be floating point, got {DTYPES[entries[bias].dtype]}")
    if entries[bias].shape != [shape[0]]:
        raise FormatError(f"{bias} must have the shape [{shape[0]}], got {entries[bias].shape}")


def build_layer(
    name: str, spec: Mapping[str, Any], part: Callable[[str], Tensor | None], precision: str, execution: str
) -> PackedWeight:
    """The layer that ``spec`` describes, both checked; ``part`` gives it each of :data:`PARTS` to keep.

    Raises:
        FormatError: a tensor has a value that no layer can have; names the tensor.
    """
    codes, levels, bias, chances = (part(each) for each in PARTS)
    assert codes is not None and levels is not None
    shape, relu = spec["shape"], "relu" in spec
    try:
        own: dict[str, Any] = {key: spec.get(key, default) for key, default in _usual(spec["kind"]).items()}
        kind: Any = KINDS[spec["kind"]].packed
        if spec["kind"] == "embedding":
            return kind(shape[1], codes, levels, **own, chances=chances)
        sizes = (shape[1] * own["groups"], shape[2:]) if own else (shape[1],)
        run = {"precision": precision, "execution": execution, "relu": relu}
        return kind(*sizes, codes, levels, bias, **own, **run, chances=chances)
    except (TypeError, ValueError) as error:
        # The message starts with the name of the argument, which is the last part of the tensor's name.
        raise FormatError(tensor_name(name, str(error))) from error


def _are_integers(value: Any, count: int, least: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_count(v, least) for v in value)


def _are_geometry(value: Any, count: int, least: int) -> bool:
    return _are_integers(value, count, least) and max(value) <= LARGEST_GEOMETRY
