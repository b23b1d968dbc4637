"""The product with a packed weight, for a linear layer and a convolution alike.

packed_linear and packed_conv2d are this with the one geometry or the other: decoding, the rounding of each precision,
the reference, the gradient, and checks of arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.check import (
    check_bias,
    check_device,
    check_flag,
    check_floating,
    check_levels,
    check_precision,
    check_tensor,
)
from bqnn.core.codes import packed_width, unpack_codes
from bqnn.core.derived import Derived
from bqnn.core.geometry import Geometry
from bqnn.core.int8 import Product, integer_limit, multiply_int8, round_levels
from bqnn.core.precision import is_half, wide_dtype
from bqnn.core.structure import Structure, only
from bqnn.ops.register import call, register_op


class PackedCall(NamedTuple):
    """The arguments of packed_linear and packed_conv2d."""

    x: Tensor
    codes: Tensor
    levels: Tensor
    bias: Tensor | None
    geometry: Geometry
    precision: str
    layout: Tensor | None
    """What a backend has made of codes and levels; without it, the backend makes it and keeps it for as long as both
    tensors live and stay as they are."""
    relu: bool

    @property
    def columns(self) -> int:
        """Weights of an output channel."""
        return self.geometry.columns(self.x)


class PackedBackwardCall(NamedTuple):
    """The arguments of their backward ops; ``x`` is looked at for its shape alone."""

    grad: Tensor
    x: Tensor
    codes: Tensor
    levels: Tensor
    geometry: Geometry


class DenseWeight(NamedTuple):
    """A decoded weight as a precision uses it."""

    values: Tensor
    """float32, [N, columns] or the shape of a kernel: levels, those rounded to bfloat16, or for "int8" integers; the
    rounded ones may be bfloat16 themselves."""
    scale: Tensor | None
    """float32 [1 or N]: for "int8", what the integers are multiplied by."""


def decode(codes: Tensor, levels: Tensor, columns: int) -> Tensor:
    """The dense weight [N, columns] in the dtype of ``levels`` [1 or N, M], of ``codes`` uint8 [N, packed_width]."""
    index = unpack_codes(codes, levels.shape[1], columns)
    return torch.gather(levels.expand(len(index), -1), 1, index.long())


def decode_rounded(codes: Tensor, levels: Tensor, columns: int, precision: str) -> DenseWeight:
    """The dense weight [N, columns] rounded as ``precision`` says; arguments as for :func:`decode`."""
    if precision == "int8":
        integers, scale = round_levels(levels, columns)
        return DenseWeight(decode(codes, integers.to(levels.dtype), columns), scale)
    return DenseWeight(decode(codes, levels.bfloat16().float() if precision == "bf16" else levels, columns), None)


def multiply(
    product: Product, x: Tensor, weight: DenseWeight, bias: Tensor | None, precision: str, accumulate: torch.dtype
) -> Tensor:
    """``product(x, weight, bias)`` with x's rows (first dimension) rounded as ``precision`` says, in x's dtype.

    "fp32" and "bf16" multiply and add in x's dtype (on a GPU, in ``accumulate``), "int8" in ``accumulate``. Autocast
    does not reach inside: the precision is the layer's own.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return multiply(product, x, weight, bias, precision, accumulate)
    values, scale = weight
    if x.dtype == values.dtype == torch.bfloat16:
        return product(x, values, None if bias is None else bias.to(x.dtype))
    # On a GPU a float32 product may be one of TF32 operands, which keep 10 bits.
    dtype = accumulate if x.is_cuda else x.dtype
    bias = None if bias is None else bias.to(x.dtype)
    if scale is not None:
        return multiply_int8(product, x, values, scale, bias, accumulate)
    if precision == "bf16":
        x = x.bfloat16().to(x.dtype)
    return product(x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def rectified(y: Tensor, relu: bool) -> Tensor:
    """``y``, a product that nobody else has, or its ReLU in the same memory."""
    return y.relu_() if relu else y


def decoded_product(
    call: PackedCall, weight: DenseWeight, accumulate: torch.dtype
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What gives the call's output for x and bias, with its weight decoded to [N, columns]; sums of integers are taken
    in ``accumulate``."""
    geometry, precision, relu = call.geometry, call.precision, call.relu
    weight = weight._replace(values=weight.values.view(geometry.weight_shape(call.columns)))

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        y = multiply(geometry.product, geometry.samples(x), weight, bias, precision, accumulate)
        return geometry.as_output(rectified(y, relu), x)

    return run


def packed_product(call: PackedCall) -> Tensor:
    """The reference: decodes the weight, then multiplies; "int8" accumulates in float64."""
    if is_half(call.x):
        return packed_product(call._replace(x=call.x.float())).to(call.x.dtype)
    weight = decode_rounded(call.codes, call.levels, call.columns, call.precision)
    return decoded_product(call, weight, torch.float64)(call.x, call.bias)


_decoded = Derived(decode)


def packed_product_backward(call: PackedBackwardCall) -> Tensor:
    """The gradient for x through the decoded weight, straight-through where the precision rounds x or the levels."""
    geometry, grad = call.geometry, call.grad
    weight = _decoded((call.codes, call.levels), geometry.columns(call.x))
    wide = wide_dtype(grad.dtype)
    weight = weight.to(wide).view(geometry.weight_shape(weight.shape[1]))
    return geometry.input_gradient(grad.to(wide), call.x.to(wide), weight).to(grad.dtype)


def _fake(call: PackedCall) -> Tensor:
    return call.geometry.output(call.x, call.codes.shape[0])


def _fake_backward(call: PackedBackwardCall) -> Tensor:
    weight = call.levels.new_empty(len(call.codes), call.geometry.columns(call.x)).to(call.grad.dtype)
    return call.geometry.input_gradient(call.grad, call.x.to(call.grad.dtype), weight.view(_shape(call)))


def _shape(call: PackedBackwardCall) -> tuple[int, ...]:
    return call.geometry.weight_shape(call.geometry.columns(call.x))


def register(name: str, geometry: Callable[..., Geometry], schema: str = "") -> None:
    """Registers ``bqnn::<name>`` and ``bqnn::<name>_backward``.

    Args:
        geometry: the class of the geometry.
        schema: the part of the schema that describes its fields.
    """
    schema = schema and f"{schema}, "

    def save(ctx: Any, call: PackedCall, y: Tensor) -> None:
        # Of x the shape is needed alone: a view of one number has it.
        like_x = call.x.new_empty(1).expand(call.x.shape)
        ctx.save_for_backward(like_x, call.codes, call.levels, y if call.relu else None)
        ctx.geometry = call.geometry

    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.wants.levels or ctx.wants.bias:
            raise NotImplementedError(f"bqnn::{name} has a gradient for x, and no gradient for levels and bias")
        x, codes, levels, y = ctx.saved_tensors
        grad_x = None
        if ctx.wants.x:
            grad = grad if y is None else torch.where(y > 0, grad, 0.0)
            grad_x = call(f"{name}_backward", PackedBackwardCall(grad, x, codes, levels, ctx.geometry), "reference")
        return only(PackedCall, x=grad_x)

    register_op(
        f"{name}_backward",
        f"(Tensor grad, Tensor x, Tensor codes, Tensor levels, {schema}str? backend=None) -> Tensor",
        Structure(PackedBackwardCall, geometry=geometry),
        packed_product_backward,
        _fake_backward,
        flops=lambda call, _: 2 * call.grad.numel() * call.geometry.columns(call.x),
    )
    register_op(
        name,
        f"(Tensor x, Tensor codes, Tensor levels, Tensor? bias, {schema}str precision, Tensor? layout=None,"
        " str? backend=None, *, bool relu=False) -> Tensor",
        Structure(PackedCall, geometry=geometry),
        packed_product,
        _fake,
        save,
        backward,
        lambda call, y: 2 * y.numel() * call.columns,
    )


def check_codes(codes: Tensor) -> None:
    """Raises TypeError or ValueError unless ``codes`` is a matrix of bytes, with a row or more."""
    check_tensor("codes", codes)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[0] == 0:
        raise ValueError(f"codes must have the shape [channels, bytes], got {list(codes.shape)}")


def check_weight(codes: Tensor, levels: Tensor, bias: Tensor | None, columns: int) -> None:
    """Checks dtypes and shapes of a packed weight with ``columns`` weights an output channel, not its values.

    Raises:
        TypeError, ValueError: the message starts with the name of the argument.
    """
    if columns < 1:
        raise ValueError(f"weights an output channel must be 1 or more, got {columns}")
    check_codes(codes)
    check_tensor("levels", levels)
    if levels.dtype != torch.float32:
        raise TypeError(f"levels must be torch.float32, got {levels.dtype}")
    check_levels("levels", levels, codes)
    width = packed_width(columns, levels.shape[1])
    if codes.shape[1] != width:
        raise ValueError(
            f"codes must have {width} bytes a channel for {columns} weights of {levels.shape[1]} levels, "
            f"got {codes.shape[1]}"
        )
    check_bias(bias, codes.shape[0], codes)


def check_packed(call: PackedCall, columns: int) -> None:
    """Checks what both ops take, for ``columns`` weights an output channel; the message names the argument.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or the precision is wrong; "int8" with so many columns that sums could overflow.
    """
    check_precision(call.precision)
    check_flag("relu", call.relu)
    check_floating("x", call.x)
    check_weight(call.codes, call.levels, call.bias, columns)
    check_device("x", call.x, call.codes)
    if call.layout is not None:
        check_tensor("layout", call.layout)
    if call.precision == "int8":
        integer_limit(columns, call.levels.shape[1])
