"""How a file describes a packed layer, and the way from the description back to the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bqnn.core.check import MAX_LEVELS, MIN_LEVELS
from bqnn.core.codes import packed_width
from bqnn.core.files import FormatError
from bqnn.files.container import DTYPES, Entry
from bqnn.files.product_spec import (
    EMBEDDING,
    KINDS,
    check_product,
    describe_product,
    geometry_of,
    sizes_of,
    tensor_name,
)
from bqnn.packed.base import PackedLayer
from bqnn.packed.weight import PackedWeight

FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
NEEDED, OPTIONAL = ("codes", "levels"), ("bias", "chances")
PARTS = (*NEEDED, *OPTIONAL)  # the tensors of a layer


def describe(layer: PackedWeight) -> dict[str, Any]:
    """The description of ``layer``, JSON-able, without what is as usual."""
    spec = {**describe_product(layer), "num_levels": layer.num_levels}
    if layer.granularity != "tensor":
        spec["granularity"] = layer.granularity
    if isinstance(layer, PackedLayer) and layer.relu:
        spec["relu"] = True
    if layer.weight_dtype != (torch.float32 if layer.bias is None else layer.bias.dtype):
        # A dtype that no file has is under no name, and refused by what checks the description.
        names = {dtype: name for name, dtype in FLOATS.items()}
        spec["dtype"] = names.get(layer.weight_dtype, str(layer.weight_dtype))
    return spec


def check_spec(name: str, spec: Mapping[str, Any]) -> None:
    """Raises FormatError unless ``spec`` is what :func:`describe` could have returned; names layer and field."""
    checks = dict.fromkeys(check_product(name, spec), True) | {
        "num_levels": type(spec.get("num_levels")) is int and MIN_LEVELS <= spec["num_levels"] <= MAX_LEVELS,
        # With one channel, one codebook a channel is one a tensor.
        "granularity": spec.get("granularity") == "channel" and spec["shape"][0] > 1,
        "relu": spec.get("relu") is True and spec["kind"] != EMBEDDING,
        "dtype": isinstance(spec.get("dtype"), str) and spec["dtype"] in FLOATS,
    }
    for field in ("num_levels", *spec):
        if not checks.get(field, False):
            raise FormatError(f"layer {name!r}: {field} can not be {spec.get(field)!r:.80}")


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
    tables = [(levels, "F32", [codebooks, num_levels]), (codes, "U8", [shape[0], width])]
    if chances in entries:
        tables.append((chances, "F32", [num_levels, num_levels]))
    for tensor, dtype, needed in tables:
        if entries[tensor].shape != needed:
            raise FormatError(f"tensor {tensor!r} must have the shape {needed}, got {entries[tensor].shape}")
        if entries[tensor].dtype != dtype:
            raise FormatError(f"{tensor} must be {DTYPES[dtype]}, got {DTYPES[entries[tensor].dtype]}")
    if spec.get("dtype") == (entries[bias].dtype if bias in entries else "F32"):
        raise FormatError(f"layer {name!r}: dtype can not be {spec['dtype']!r}, which it is anyway")
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
    kind: Any = KINDS[spec["kind"]].packed
    tensors: dict[str, Any] = {"codes": codes, "levels": levels, "chances": chances}
    if spec["kind"] != EMBEDDING:  # which adds nothing and multiplies nothing
        tensors |= {"bias": bias, "precision": precision, "execution": execution, "relu": "relu" in spec}
    try:
        layer: PackedWeight = kind(*sizes_of(spec), **tensors, **geometry_of(spec))
    except (TypeError, ValueError) as error:
        # The message starts with the name of the argument, which is the last part of the tensor's name.
        raise FormatError(tensor_name(name, str(error))) from error
    layer.weight_dtype = FLOATS.get(spec.get("dtype", ""), layer.weight_dtype)
    return layer
