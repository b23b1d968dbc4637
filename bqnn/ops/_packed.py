"""What packed_linear and packed_conv2d share: decoding, the rounding of each precision, checks of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bqnn.ops._check import check_bias, check_device, check_floating, check_levels
from bqnn.packing import packed_width, unpack_codes

PRECISIONS = ("fp32", "bf16", "int8")

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def decode(codes: Tensor, levels: Tensor, columns: int) -> Tensor:
    """The dense weight [N, columns] in the dtype of ``levels`` [1 or N, M], of ``codes`` uint8 [N, packed_width]."""
    index = unpack_codes(codes, levels.shape[1], columns)
    return torch.gather(levels.expand(len(index), -1), 1, index.long())


def round_weight(weight: Tensor, precision: str) -> Tensor:
    """``weight`` as ``precision`` uses it, in its own dtype: rounded to bfloat16 for "bf16", exact otherwise."""
    return weight.bfloat16().to(weight.dtype) if precision == "bf16" else weight


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit integers of ``x`` [B, ...], one scale a row (a sample), and the scales [B, 1, ...].

    ``scale = max|row| / 127`` and ``q = round(x / scale)``, ties to even, within -127..127; both keep x's dtype. A row
    of zeros has the scale 0. A row with NaN or infinity has a scale that makes the row's product NaN.
    """
    scale = (x.flatten(1).abs().amax(1) / 127).view(-1, *[1] * (x.dim() - 1))
    # The clamp matters where the scale is subnormal and so itself rounded.
    q = torch.where(scale > 0, x / scale, torch.zeros_like(x)).round().clamp(-127, 127)
    return q, scale


def multiply(
    product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str, accumulate: torch.dtype
) -> Tensor:
    """``product(x, weight, bias)`` with x's rows (first dimension) rounded as ``precision`` says, in x's dtype.

    ``weight`` comes rounded by :func:`round_weight`. "fp32" and "bf16" multiply and add in x's dtype (on a GPU, in
    ``accumulate``); "int8" does it in ``accumulate``, in which float64 holds every sum of 8-bit integers times float32
    levels to about 1e-16. Autocast does not reach inside: the precision is the layer's own.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return multiply(product, x, weight, bias, precision, accumulate)
    # On a GPU a float32 product may be one of TF32 operands, which keep 10 bits.
    dtype = accumulate if x.is_cuda else x.dtype
    if precision == "fp32" and x.dtype == weight.dtype == dtype and (bias is None or bias.dtype == dtype):
        return product(x, weight, bias)  # nothing to convert: a small layer is as fast as nn.Linear
    bias = None if bias is None else bias.to(x.dtype)
    if precision == "int8":
        q, scale = quantize_rows(x)
        y = (product(q.to(accumulate), weight.to(accumulate), None) * scale.to(accumulate)).to(x.dtype)
        return y if bias is None else y + bias.view(-1, *[1] * (y.dim() - 2))
    if precision == "bf16":
        x = x.bfloat16().to(x.dtype)
    return product(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def is_half(x: Tensor) -> bool:
    """Whether ``x`` is float16 or bfloat16: such activations are computed in float32, and the output rounded."""
    return x.dtype in (torch.float16, torch.bfloat16)


def check_precision(precision: str) -> None:
    """Raises ValueError where ``precision`` is not one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """``value``, one integer or two, as two; raises ValueError where one is below ``least``."""
    first, second = (value, value) if isinstance(value, int) else value if len(value) == 2 else (least - 1, 0)
    if min(first, second) < least:
        raise ValueError(f"{name} must be one integer or two, each {least} or more, got {value}")
    return first, second


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
        ValueError: a shape, a device or the precision is wrong.
    """
    check_precision(precision)
    check_floating("x", x)
    check_weight(codes, levels, bias, columns)
    check_device("x", x, codes)
