"""What packed_linear and packed_conv2d share: decoding, the rounding of each precision, checks of arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bqnn.core.check import check_bias, check_device, check_floating, check_levels, check_precision
from bqnn.core.codes import packed_width, unpack_codes
from bqnn.core.int8 import Product, integer_limit, multiply_int8, round_levels


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
    if precision == "fp32" and x.dtype == values.dtype == dtype and (bias is None or bias.dtype == dtype):
        return product(x, values, bias)  # nothing to convert: a small layer is as fast as nn.Linear
    bias = None if bias is None else bias.to(x.dtype)
    if scale is not None:
        return multiply_int8(product, x, values, scale, bias, accumulate)
    if precision == "bf16":
        x = x.bfloat16().to(x.dtype)
    return product(x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def rectified(y: Tensor, relu: bool) -> Tensor:
    """``y``, a product that nobody else has, or its ReLU in the same memory."""
    return y.relu_() if relu else y


def is_half(x: Tensor) -> bool:
    """Whether ``x`` is float16 or bfloat16: such activations are computed in float32, and the output rounded."""
    return x.dtype in (torch.float16, torch.bfloat16)


def check_weight(codes: Tensor, levels: Tensor, bias: Tensor | None, columns: int) -> None:
    """Checks dtypes and shapes of a packed weight with ``columns`` weights an output channel, not its values.

    Raises:
        TypeError, ValueError: the message starts with the name of the argument.
    """
    if columns < 1:
        raise ValueError(f"weights an output channel must be 1 or more, got {columns}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8, got {codes.dtype}")
    if levels.dtype != torch.float32:
        raise TypeError(f"levels must be torch.float32, got {levels.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must have the shape [channels, bytes], got {list(codes.shape)}")
    check_levels("levels", levels, codes)
    width = packed_width(columns, levels.shape[1])
    if codes.shape[1] != width:
        raise ValueError(
            f"codes must have {width} bytes a channel for {columns} weights of {levels.shape[1]} levels, "
            f"got {codes.shape[1]}"
        )
    check_bias(bias, codes.shape[0], codes)


def check_packed(x: Tensor, codes: Tensor, levels: Tensor, bias: Tensor | None, columns: int, precision: str) -> None:
    """Checks what both ops take, for ``columns`` weights an output channel; the message names the argument.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or the precision is wrong; "int8" with so many columns that sums could overflow.
    """
    check_precision(precision)
    check_floating("x", x)
    check_weight(codes, levels, bias, columns)
    check_device("x", x, codes)
    if precision == "int8":
        integer_limit(columns, levels.shape[1])
