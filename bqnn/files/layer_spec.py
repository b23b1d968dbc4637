"""How a file describes a packed layer, and the way from the description back to the layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bqnn.core.check import MAX_LEVELS, MIN_LEVELS
from bqnn.core.codes import packed_width
from bqnn.core.files import FormatError
from bqnn.files.container import is_count
from bqnn.packed.base import PackedLayer
from bqnn.packed.layers import PackedConv2d, PackedLinear

# What a convolution has if its description does not say otherwise.
GEOMETRY = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
DIMENSIONS = {"linear": 2, "conv2d": 4}


def tensor_name(layer: str, part: str) -> str:
    """The name in the state dict of a tensor of a layer; the network itself may be the layer, with the name ""."""
    return f"{layer}.{part}" if layer else part


def describe(layer: PackedLayer) -> dict[str, Any]:
    """The description of ``layer``, JSON-able, without what is as usual."""
    spec = {**_describe_product(layer), "num_levels": layer.num_levels}
    if layer.granularity != "tensor":
        spec["granularity"] = layer.granularity
    if layer.relu:
        spec["relu"] = True
    return spec


def _describe_product(layer: nn.Module) -> dict[str, Any]:
    """Kind, shape and geometry of a linear layer or convolution, packed or not.

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


def check_fits(name: str, layer: nn.Module, spec: Mapping[str, Any], has_bias: bool) -> None:
    """Raises FormatError unless ``layer``, of the network to be filled, is of the kind that ``spec`` describes."""
    try:
        own = _describe_product(layer)
    except FormatError as error:
        raise FormatError(f"layer {name!r}: {error}") from error
    stored = {key: value for key, value in spec.items() if key not in ("num_levels", "granularity", "relu")}
    if own != stored:
        raise FormatError(f"layer {name!r} is {stored} in the file and {own} in the model")
    if isinstance(layer, PackedLayer) and layer.relu and "relu" not in spec:
        raise FormatError(f"layer {name!r} ends with a ReLU in the model and not in the file")
    if (layer.bias is not None) != has_bias:
        where = ("file", "model") if has_bias else ("model", "file")
        raise FormatError(f"tensor {tensor_name(name, 'bias')!r} is in the {where[0]} and not in the {where[1]}")


def check_spec(name: str, spec: Any) -> None:
    """Raises FormatError unless ``spec`` is what :func:`describe` could have returned; names layer and field."""
    if not isinstance(spec, dict):
        raise FormatError(f"layer {name!r} must be described by an object, got {spec!r:.80}")
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in DIMENSIONS:
        raise FormatError(f"layer {name!r}: kind must be one of {', '.join(DIMENSIONS)}, got {kind!r:.80}")
    checks = {
        "kind": True,
        "shape": _are_integers(spec.get("shape"), DIMENSIONS[kind], least=1),
        "num_levels": type(spec.get("num_levels")) is int and MIN_LEVELS <= spec["num_levels"] <= MAX_LEVELS,
        "granularity": spec.get("granularity", "channel") == "channel",
        "relu": spec.get("relu") is True,
    }
    if kind == "conv2d":
        values = {**GEOMETRY, **spec}
        checks |= {name: _are_integers(values[name], 2, least=1) for name in ("stride", "dilation")}
        checks["padding"] = isinstance(values["padding"], str) or _are_integers(values["padding"], 2, least=0)
        checks["groups"] = _are_integers([values["groups"]], 1, least=1)
        checks["padding_mode"] = isinstance(values["padding_mode"], str)
    for field in ("kind", "shape", "num_levels", *spec):
        if not checks.get(field, False):
            raise FormatError(f"layer {name!r}: {field} can not be {spec.get(field)!r:.80}")


def build_layer(
    name: str, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], precision: str, execution: str
) -> PackedLayer:
    """The layer that ``spec`` (checked) describes, with copies of its tensors.

    Raises:
        FormatError: a tensor is missing, or does not agree with the description; names the tensor.
    """
    codes, levels = (_tensor(tensors, tensor_name(name, part)).clone() for part in ("codes", "levels"))
    bias = tensors.get(tensor_name(name, "bias"))
    shape, num_levels = spec["shape"], spec["num_levels"]
    codebooks = shape[0] if spec.get("granularity") == "channel" else 1
    for part, tensor, needed in (
        ("levels", levels, [codebooks, num_levels]),
        ("codes", codes, [shape[0], packed_width(math.prod(shape[1:]), num_levels)]),
    ):
        if list(tensor.shape) != needed:
            raise FormatError(
                f"tensor {tensor_name(name, part)!r} must have the shape {needed}, got {list(tensor.shape)}"
            )
    bias, relu = None if bias is None else bias.clone(), "relu" in spec
    try:
        if spec["kind"] == "linear":
            return PackedLinear(shape[1], codes, levels, bias, precision, execution, relu)
        geometry: dict[str, Any] = {key: spec.get(key, default) for key, default in GEOMETRY.items()}
        return PackedConv2d(
            shape[1] * geometry["groups"],
            shape[2:],
            codes,
            levels,
            bias,
            **geometry,
            precision=precision,
            execution=execution,
            relu=relu,
        )
    except (TypeError, ValueError) as error:
        # The message starts with the name of the argument, which is the last part of the tensor's name.
        raise FormatError(tensor_name(name, str(error))) from error


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FormatError(f"tensor {name!r} is missing")
    return tensors[name]


def _are_integers(value: Any, count: int, least: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_count(v, least) for v in value)
