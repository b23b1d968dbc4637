"""How a file describes the product of a layer, packed or not: its kind, shape and geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bqnn.core.files import FormatError
from bqnn.files.container import is_count
from bqnn.packed.base import PackedLayer
from bqnn.packed.layers import PADDING_MODES, PackedLinear

# What a convolution has if its description does not say otherwise.
GEOMETRY = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
DIMENSIONS = {"linear": 2, "conv2d": 4}
LARGEST_GEOMETRY = (1 << 31) - 1  # torch's convolutions and ours count positions in 32 bits


def tensor_name(layer: str, part: str) -> str:
    """The name in the state dict of a tensor of a layer; the network itself may be the layer, with the name ""."""
    return f"{layer}.{part}" if layer else part


def describe_product(layer: nn.Module) -> dict[str, Any]:
    """Kind, shape and geometry of a linear layer or convolution, packed or not, without what is as usual.

    Raises:
        FormatError: ``layer`` is neither.
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d, PackedLayer)):
        raise FormatError(f"model must have a linear layer or a convolution there, got {type(layer).__name__}")
    shape = list(layer.shape if isinstance(layer, PackedLayer) else layer.weight.shape)
    if isinstance(layer, (nn.Linear, PackedLinear)):
        return {"kind": "linear", "shape": shape}
    values = {name: getattr(layer, name) for name in GEOMETRY}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"kind": "conv2d", "shape": shape, **{k: v for k, v in values.items() if v != GEOMETRY[k]}}


def product_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a layer's description is that of its product."""
    return {key: value for key, value in spec.items() if key in ("kind", "shape", *GEOMETRY)}


def check_product(name: str, spec: Mapping[str, Any]) -> set[str]:
    """Raises FormatError unless kind, shape and geometry are what :func:`describe_product` could have returned.

    Returns:
        the fields of ``spec`` that have been checked.
    """
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in DIMENSIONS:
        raise FormatError(f"layer {name!r}: kind must be one of {', '.join(DIMENSIONS)}, got {kind!r:.80}")
    shape: Any = spec.get("shape")
    if not _are_integers(shape, DIMENSIONS[kind], least=1):
        raise FormatError(f"layer {name!r}: shape can not be {shape!r:.80}")
    if kind != "conv2d":
        return {"kind", "shape"}
    values = {**GEOMETRY, **spec}
    checks = {each: _are_geometry(values[each], 2, least=1) for each in ("stride", "dilation")}
    checks["padding"] = isinstance(values["padding"], str) or _are_geometry(values["padding"], 2, least=0)
    checks["groups"] = _are_geometry([values["groups"]], 1, least=1)
    checks["padding_mode"] = isinstance(values["padding_mode"], str)
    for field, usual in GEOMETRY.items():
        if field in spec and not (checks[field] and spec[field] != usual):
            raise FormatError(f"layer {name!r}: {field} can not be {spec[field]!r:.80}")
    _check_geometry(name, values)
    return {"kind", "shape", *GEOMETRY}


def _check_geometry(name: str, values: Mapping[str, Any]) -> None:
    """What a convolution asks of its geometry as a whole."""
    channels, groups, padding, mode = values["shape"][0], values["groups"], values["padding"], values["padding_mode"]
    if channels % groups:
        raise FormatError(f"{tensor_name(name, 'groups')} must divide the {channels} channels, got {groups}")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise FormatError(f"{tensor_name(name, 'padding')} must be numbers, 'same' or 'valid', got {padding!r:.80}")
    if padding == "same" and values["stride"] != [1, 1]:
        raise FormatError(f"{tensor_name(name, 'stride')} must be 1 with padding='same', got {values['stride']}")
    if mode not in PADDING_MODES:
        modes = ", ".join(PADDING_MODES)
        raise FormatError(f"{tensor_name(name, 'padding_mode')} must be one of {modes}, got {mode!r:.80}")


def _are_integers(value: Any, count: int, least: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_count(v, least) for v in value)


def _are_geometry(value: Any, count: int, least: int) -> bool:
    return _are_integers(value, count, least) and max(value) <= LARGEST_GEOMETRY
