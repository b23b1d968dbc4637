"""The backend "dense" of the packed products: torch's product with the weight, decoded once and kept.

No call gets it but those that ask for it: it needs as much memory as the weight had at full precision. It is what is
fast where rows are many, or where torch has instructions that the packed kernels have not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.core.derived import Derived
from bqnn.core.geometry import Conv2dGeometry
from bqnn.core.precision import is_half
from bqnn.ops import dispatch
from bqnn.ops.dispatch import Bound
from bqnn.ops.packed_product import (
    DenseWeight,
    PackedCall,
    decode_rounded,
    decoded_product,
    rectified,
)


def _decode(codes: Tensor, levels: Tensor, columns: int, precision: str) -> DenseWeight:
    weight = decode_rounded(codes, levels, columns, precision)
    if precision == "bf16" and codes.is_cuda:
        return weight._replace(values=weight.values.bfloat16())  # a GPU's libraries multiply them as they are
    return weight


weights = Derived(_decode)


def _run(call: PackedCall) -> Tensor:
    return _bind(call)(call.x, call.bias)


def _bind(call: PackedCall) -> Bound:
    x, geometry, relu = call.x, call.geometry, call.relu
    weight = weights((call.codes, call.levels), call.columns, call.precision)
    if is_half(x) and x.dtype != weight.values.dtype:
        wide = decoded_product(call, weight, torch.float32)
        return lambda x, bias: wide(x.float(), bias).to(x.dtype)
    general = decoded_product(call, weight, x.dtype)
    if call.precision != "fp32" or x.dtype != torch.float32 or x.is_cuda:
        return general
    values = weight.values.view(geometry.weight_shape(call.columns))
    convolves = isinstance(geometry, Conv2dGeometry)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        # With nothing to convert a small layer is as fast as nn.Linear.
        if torch.is_autocast_enabled("cpu") or (bias is not None and bias.dtype is not torch.float32):
            return general(x, bias)
        y = rectified(geometry.product(x, values, bias), relu)
        # A convolution of strides that are neither order gives one or the other.
        return geometry.as_output(y, x) if convolves else y

    return run


def _describe(call: PackedCall) -> str:
    return f"decoded, {call.precision}"


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>``."""
    dispatch.register(name, "dense", _run, bind=_bind, describe=_describe)
