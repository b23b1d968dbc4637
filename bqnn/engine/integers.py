"""Weights of a quantized graph: levels, or dense rows, as small integers times a step for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.core.codes import unpack_codes
from bqnn.engine.operators import MAX_WEIGHT

LIMITS = (8, 16, 32)
"""What integers of levels are kept within, the first that serves: of smaller ones, 16 bits hold more products."""
TOLERANCE = 0.008
"""The error of a layer's weights, as a share of their size, that serves. 8 bits of activations make about as much."""


class CodedWeights:
    """The weights of a layer that are codes, ``[N, K]``, and what their products with the mean input add up to.

    A level that is off puts all its weights off by the same, and over many inputs whose mean is not 0 that adds up: an
    error of 0.2% of a level is 10% of an output of 4,608 weights. In the mean it is the same for all images, so a bias
    makes up for it, and what is left to make small is the error of the weights themselves.

    Args:
        codes: as in :mod:`bqnn.core.codes`.
        levels: float32 [1 or N, M], finite.
        columns: K.
        mean: of the inputs that the columns are multiplied with, float64 [groups, K]; None counts as 0.
    """

    def __init__(self, codes: Tensor, levels: Tensor, columns: int, mean: Tensor | None) -> None:
        digits = unpack_codes(codes, levels.shape[1], columns)
        each = [digits == code for code in range(levels.shape[1])]
        self.levels = levels.double()
        self.counts = torch.stack([where.sum(1) for where in each], 1).double()
        """How often a channel has each code, [N, M]."""
        self.sums = torch.zeros_like(self.counts)
        """The sum of the mean inputs at a channel's columns of each code, [N, M]."""
        if mean is not None:
            groups, mean = len(mean), mean.float()[..., None]
            sums = [torch.bmm(where.view(groups, -1, columns).float(), mean).flatten() for where in each]
            self.sums = torch.stack(sums, 1).double()

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integers of each codebook, and a step and a shift of each output channel: ``levels ~ integers * step``.

        Integers are ``rint(level / (max|level| / l))``, l from 1 to the limit, with the best l for each codebook; the
        step of a channel is the best for these integers and the channel's own codes. The limit is the first of
        :data:`LIMITS` whose error, over all channels, is within :data:`TOLERANCE`, or the last.

        Returns:
            integers, int8 [1 or N, M]; steps, float64 [N]; and what is missing in the mean of a channel's product,
            float64 [N].
        """
        exact, counts = self.levels, self.counts
        largest = exact.abs().amax(1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)  # [G, 1]
        fractions = torch.arange(1, LIMITS[-1] + 1, dtype=torch.float64)[:, None, None]
        integers = (exact / largest * fractions).round()  # [l, G, M]
        squares = (counts * integers**2).sum(2)
        steps = (counts * integers * exact).sum(2) / squares.clamp(min=1)
        errors = (counts * (exact - steps[..., None] * integers) ** 2).sum(2)  # [l, N]
        size = (counts * exact**2).sum(1)
        if len(exact) == 1:
            errors, size = errors.sum(1, keepdim=True), size.sum(0, keepdim=True)
        shares = errors / size.clamp(min=torch.finfo(torch.float64).tiny)  # [l, G]
        for limit in LIMITS:
            least, best = shares[:limit].min(0)
            if float(least.mean()) <= TOLERANCE**2:
                break
        chosen = integers.gather(0, best[None, :, None].expand(1, *exact.shape))[0]
        step = steps.gather(0, best.expand(1, len(counts)))[0]
        return chosen.to(torch.int8), step, (self.sums * (exact - step[:, None] * chosen)).sum(1)


def integer_rows(weight: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A dense weight, float32 [N, K], as int8 [N, K] within -64..64, and the steps and shifts of
    :meth:`CodedWeights.integers`; steps are positive."""
    exact = weight.double()
    largest = exact.abs().amax(1)
    steps = torch.where(largest > 0, largest, 1.0) / MAX_WEIGHT
    integers = (exact / steps[:, None]).round()
    if mean is None:
        return integers.to(torch.int8), steps, torch.zeros_like(steps)
    lost = (exact - integers * steps[:, None]).view(len(mean), -1, weight.shape[1])
    return integers.to(torch.int8), steps, torch.bmm(lost, mean[..., None]).flatten()
