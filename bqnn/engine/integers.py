"""Weights of a quantized graph: levels, or dense rows, as small integers times a step."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.engine.operators import MAX_WEIGHT

LIMITS = (16, 32, MAX_WEIGHT)
"""What a layer's integers are kept within, the first that serves: of smaller ones, 16 bits hold more products."""
TOLERANCE = 1 / 250
"""Of the largest level of a codebook: what a level may be off. 8-bit integers are off by as much."""


def integer_levels(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of each codebook and their step: ``levels ~ integers * step``.

    All codebooks keep one limit, the first of :data:`LIMITS` within which every level of every codebook comes within
    :data:`TOLERANCE`, or the last. A codebook's step is the one of ``max|level| / l``, for l from 1 to the limit, whose
    largest error is smallest; the smallest l where several are.

    Args:
        levels: float32 [G, M], finite.

    Returns:
        integers, int8 [G, M], and steps, float64 [G], positive.
    """
    exact = levels.double()
    largest = exact.abs().amax(1, keepdim=True)  # [G, 1]
    exact = torch.where(largest > 0, exact / largest, exact)
    fractions = torch.arange(1, MAX_WEIGHT + 1, dtype=torch.float64, device=levels.device)[:, None, None]  # [l, 1, 1]
    rounded = (exact * fractions).round()  # [l, G, M]
    errors = (rounded / fractions - exact).abs().amax(2)  # [l, G]
    for limit in LIMITS:
        best = errors[:limit].argmin(0)  # of equal ones the first
        if bool((errors.gather(0, best[None]) <= TOLERANCE).all()):
            break
    integers = rounded.gather(0, best[None, :, None].expand(1, *exact.shape))[0]
    steps = torch.where(largest > 0, largest, 1.0)[:, 0] / (best + 1)
    return integers.to(torch.int8), steps


def integer_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A dense weight, float32 [N, K], as int8 [N, K] within -64..64, and each row's step, float64 [N], positive."""
    largest = weight.double().abs().amax(1)
    steps = torch.where(largest > 0, largest, 1.0) / MAX_WEIGHT
    return (weight.double() / steps[:, None]).round().to(torch.int8), steps
