"""Weights of a quantized graph: levels, or dense rows, as small integers times a step for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.core.codes import unpack_codes
from bqnn.engine.operators import MAX_WEIGHT

LIMITS = (16, 32, MAX_WEIGHT)
"""What a layer's integers are kept within, the first that serves: of smaller ones, 16 bits hold more products."""
TOLERANCE = 0.005
"""The error of a layer's outputs, as a share of their spread, that serves: 8 bits of activations make two to four times
as much. With three times the tolerance the logits of small networks of 3 and 5 levels were twice as far off."""


def integer_levels(levels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of each codebook, and a step for each output channel: ``levels ~ integers * step``.

    A level that is off puts all its weights off by the same, and over many positive inputs that adds up: an error of
    0.2% of a level is 10% of an output of 4,608 weights. So what is made small is the error of the *outputs*, for
    inputs that are independent, with mean and variance 1: of weights that are off by d_k it is sum d_k^2 + (sum d_k)^2
    in the mean square. Integers are ``rint(level / (max|level| / l))``, l from 1 to the limit, with the best l for each
    codebook; the step of a channel is the best for these integers and the channel's own codes. The limit is the first
    of :data:`LIMITS` with a root mean square over all channels within :data:`TOLERANCE`, or the last.

    Args:
        levels: float32 [1 or N, M], finite.
        counts: how often a channel has each code, float64 [N, M] (:func:`count_codes`).

    Returns:
        integers, int8 [1 or N, M], and steps, float64 [N].
    """
    exact = levels.double()
    largest = exact.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)  # [G, 1]
    fractions = torch.arange(1, MAX_WEIGHT + 1, dtype=torch.float64)[:, None, None]
    integers = (exact / largest * fractions).round()  # [l, G, M]
    # Of weights c and integers n of a channel: sums over its weights.
    sum_c, sum_n = (counts * exact).sum(1), (counts * integers).sum(2)  # [N], [l, N]
    sum_cc, sum_nn = (counts * exact**2).sum(1), (counts * integers**2).sum(2)
    norm = sum_nn + sum_n**2
    steps = ((counts * integers * exact).sum(2) + sum_n * sum_c) / norm.clamp(min=1)
    off = exact - steps[..., None] * integers  # [l, N, M]
    errors = (counts * off**2).sum(2) + (counts * off).sum(2) ** 2  # [l, N]
    spread = sum_cc
    if len(levels) == 1:
        errors, spread = errors.sum(1, keepdim=True), sum_cc.sum(0, keepdim=True)
    shares = errors / spread.clamp(min=torch.finfo(torch.float64).tiny)  # [l, G]
    for limit in LIMITS:
        least, best = shares[:limit].min(0)
        if float(least.mean()) <= TOLERANCE**2:
            break
    chosen = integers.gather(0, best[None, :, None].expand(1, *exact.shape))[0]
    return chosen.to(torch.int8), steps.gather(0, best.expand(1, len(counts)))[0]


def count_codes(codes: Tensor, num_levels: int, columns: int) -> Tensor:
    """How often each output channel has each code, float64 [N, num_levels]; ``codes`` as in :mod:`bqnn.core.codes`."""
    digits = unpack_codes(codes, num_levels, columns)
    return torch.stack([(digits == code).sum(1) for code in range(num_levels)], 1).double()


def integer_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A dense weight, float32 [N, K], as int8 [N, K] within -64..64, and each row's step, float64 [N], positive."""
    largest = weight.double().abs().amax(1)
    steps = torch.where(largest > 0, largest, 1.0) / MAX_WEIGHT
    return (weight.double() / steps[:, None]).round().to(torch.int8), steps
