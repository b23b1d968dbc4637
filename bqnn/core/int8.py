"""The precision "int8": levels and activations as 8-bit integers, and the product of the two.

A level is ``c_m ~ s * n_m`` with one scale a codebook, an activation ``x ~ r * q`` with one scale a row (a sample, in a
convolution). With ``total = sum_k q_k n_code(k)``, an exact integer, the output is

    y = (float(total) * s) * r + bias

in the dtype of x, each operation rounded, in this order: every backend gives these bits for float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_INTEGER = 127
# From where 127 / max|row| would be infinite in float32 or lose bits, rows are scaled up first.
SMALL_ROW, SMALL_ROW_FACTOR = 2.0**-64, 2.0**64

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def integer_limit(columns: int, num_levels: int) -> int:
    """The largest ``|n|`` of a level: 127, and less where ``columns`` products of it could overflow 32 bits.

    Raises:
        ValueError: there are so many columns that evenly spaced levels of one sign would not all differ any more.
    """
    limit = min(MAX_INTEGER, (2**31 - 1) // (MAX_INTEGER * columns))
    if limit < num_levels - 1:
        most = (2**31 - 1) // (MAX_INTEGER * (num_levels - 1))
        raise ValueError(
            f"precision must not be 'int8' for {num_levels} levels and more than {most} weights an output channel "
            f"(sums in 32 bits could overflow), got {columns}"
        )
    return limit


def round_levels(levels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Integers and scale of each codebook, for ``columns`` weights an output channel.

    The scale is the one of ``max|c| / q``, q from half of :func:`integer_limit` to all of it, whose largest error over
    the codebook is smallest (the largest q where two are equal). ``|c_m - s n_m|`` is at most ``max|c| / (2 limit)``,
    but for the rounding of s to float32: 0.4% of the largest level, up to 133,000 columns. Levels nearer to each other
    than s may share an integer.

    Args:
        levels: float32 [G, M], finite, not all 0 in a row.
        columns: 1 or more.

    Returns:
        integers, int8 [G, M], and scales, float32 [G].

    Raises:
        ValueError: as :func:`integer_limit`.
    """
    limit = integer_limit(columns, levels.shape[1])
    exact = levels.double().unsqueeze(1)  # [G, 1, M]
    steps = torch.arange(limit, (limit - 1) // 2, -1, dtype=torch.float64, device=levels.device)  # [Q]
    # Float32 has no scale below its smallest number: levels that small are multiples of it.
    scale = (exact.abs().amax(2) / steps).float().clamp(min=2.0**-149)  # [G, Q]
    integers = (exact / scale.double().unsqueeze(2)).round().clamp(-limit, limit)  # [G, Q, M]
    errors = (exact - integers * scale.double().unsqueeze(2)).abs().amax(2)
    best = errors.argmin(1, keepdim=True)  # of equal ones the first
    chosen = integers.gather(1, best.unsqueeze(2).expand(-1, 1, levels.shape[1])).squeeze(1)
    return chosen.to(torch.int8), scale.gather(1, best).squeeze(1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit integers of ``x`` [B, ...], one scale a row (a sample), and the scales [B, 1, ...].

    With ``a = max|row|`` and p = 2**64 for rows below 2**-64, else 1: the scale is ``a / 127``, and ``q`` is
    ``(x * p) * (127 / (a * p))`` rounded, ties to even, within -127..127; both in x's dtype. A row of zeros has the
    scale 0; a row with NaN or infinity has the scale NaN, which makes its whole output NaN.
    """
    largest = x.flatten(1).abs().amax(1).view(-1, *[1] * (x.dim() - 1))
    factor = torch.where(largest < SMALL_ROW, SMALL_ROW_FACTOR, 1.0).to(x.dtype)
    # A tensor over a tensor: a number over a tensor would be a rounded reciprocal times that number.
    step = torch.full_like(largest, MAX_INTEGER) / (largest * factor)
    q = ((x * factor) * step).round().clamp(-MAX_INTEGER, MAX_INTEGER)
    q = torch.where((largest > 0) & largest.isfinite(), q, 0.0)
    scale = largest / torch.full_like(largest, MAX_INTEGER)  # a GPU would multiply by the reciprocal of a number
    return q, torch.where(largest.isfinite(), scale, torch.nan)


def multiply_int8(
    product: Product, x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None, accumulate: torch.dtype
) -> Tensor:
    """``product(x, weight, bias)`` with x rounded by :func:`quantize_rows` and the weight by :func:`round_levels`.

    Args:
        product: linear or convolution, of two tensors and a bias.
        x: [B, K] or [B, C, H, W].
        integers: the weight as integers, [N, ...], in any dtype.
        scale: float32 [1 or N], of the codebooks.
        bias: [N], in x's dtype, or None.
        accumulate: the dtype of the sums. All of them are exact in float64; in float32, those up to 2**24.

    Returns:
        [B, N, ...], in x's dtype.
    """
    q, row_scale = quantize_rows(x)
    total = product(q.to(accumulate), integers.to(accumulate), None)
    if total.is_cuda and accumulate == torch.float64:
        total = total.round()  # a library may choose a Fourier transform
    channels = [1] * (total.dim() - 2)
    y = (total.to(x.dtype) * scale.to(x.dtype).view(-1, *channels)) * row_scale
    return y if bias is None else y + bias.view(-1, *channels)
