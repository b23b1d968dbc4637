"""Weights of a quantized graph: levels, or dense rows, as small integers times a step for each output channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bqnn.core.codes import unpack_codes
from bqnn.engine import reference
from bqnn.engine.node import Node
from bqnn.engine.operators import MAX_WEIGHT

LIMITS = (8, 16, 32, MAX_WEIGHT)
"""What integers of levels are kept within, the first that serves: of smaller ones, 16 bits hold more products."""
TOLERANCE = 0.01
"""The error of a layer's outputs, as a share of their deviation, that serves; 8 bits of activations make as much."""
PLACES = 256  # of a layer's output, that a batch adds at least to what is known of its inputs
DECIMALS = 12  # of an error's square, beyond which it is rounding
RIDGE = 1e-6  # share of a covariance that inputs have which are of one size and do not depend on each other


class CodeSums(NamedTuple):
    """Of each output channel and each of its codes: the sum of the inputs at the columns that have the code.

    A product of the layer is this sum times the level, added up over the codes. So these few numbers, over images and
    places, tell what any change of the levels does to the outputs: exactly, however inputs depend on each other.
    """

    mean: Tensor
    """Float64 [N, M]."""
    covariance: Tensor
    """Float64 [N, M, M]."""


class CodeSumsObserver:
    """:class:`CodeSums` of a conv2d or linear node with codes, over batches of its input.

    Args:
        node: the layer.
        columns: weights of a channel.
        places: of an image's output.
    """

    def __init__(self, node: Node, columns: int, places: int) -> None:
        self.node, self._levels, self._of_image = node, node.tensors["levels"].shape[1], places
        digits = unpack_codes(node.tensors["codes"], self._levels, columns)
        chosen = digits[:, None] == torch.arange(self._levels, dtype=digits.dtype)[:, None]  # [N, M, K]
        self._chosen = chosen.flatten(0, 1).float()
        self._places = 0
        self._sum: Tensor = torch.zeros((), dtype=torch.float64)
        self._products: Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Some images of x [B, ...]."""
        some = x[: math.ceil(PLACES / self._of_image)]
        sums = reference.sums_of_products(self.node, some, self._chosen)  # [B, N * M, ...]
        channels = len(self._chosen) // self._levels
        sums = sums.transpose(0, 1).reshape(channels, self._levels, len(some) * self._of_image).double()
        self._places += sums.shape[2]
        self._sum = self._sum + sums.sum(2)
        self._products = self._products + sums @ sums.transpose(1, 2)

    def found(self) -> CodeSums:
        mean = self._sum / self._places
        return CodeSums(mean, self._products / self._places - mean[..., None] * mean[:, None])


class CodedWeights:
    """The weights of a layer that are codes, ``[N, K]``.

    A level that is off puts all its weights off by the same, and over many inputs that adds up: an error of 0.2% of a
    level can be 10% of an output of 4,608 weights. What it is in the mean is the same for all images, so a bias makes
    up for it. What is left is made small: the deviation of the outputs' errors.

    Args:
        codes: as in :mod:`bqnn.core.codes`.
        levels: float32 [1 or N, M], finite.
        columns: K.
        sums: of the layer's inputs; None stands for inputs that are independent, of one size, and 0 in the mean.
    """

    def __init__(self, codes: Tensor, levels: Tensor, columns: int, sums: CodeSums | None) -> None:
        digits = unpack_codes(codes, levels.shape[1], columns)
        self.levels = levels.double()
        self.counts = torch.stack([(digits == code).sum(1) for code in range(levels.shape[1])], 1).double()
        """How often a channel has each code, [N, M]."""
        independent = torch.diag_embed(self.counts)
        self.mean, self.covariance = torch.zeros_like(self.counts), independent
        if sums is not None:
            # Inputs that were all 0 say nothing, and with few of them a covariance is not of full rank.
            size = torch.diagonal(sums.covariance, dim1=1, dim2=2).sum() / self.counts.sum()
            self.mean = sums.mean
            self.covariance = sums.covariance + RIDGE * float(size or 1.0) * independent

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integers of each codebook, and a step and a shift of each output channel: ``levels ~ integers * step``.

        Integers are ``rint(level / (max|level| / l))``, l from 1 to the limit, with the best l for each codebook; the
        step of a channel is the best for these integers. Best is the least mean square of what the outputs are off by,
        less their mean. The limit is the first of :data:`LIMITS` whose error, over all channels, is within
        :data:`TOLERANCE`, or the last.

        Returns:
            integers, int8 [1 or N, M]; steps, float64 [N]; and what is missing in the mean of a channel's product,
            float64 [N].
        """
        largest = self.levels.abs().amax(1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)  # [G, 1]
        fractions = torch.arange(1, LIMITS[-1] + 1, dtype=torch.float64)[:, None, None]
        integers = (self.levels / largest * fractions).round()  # [l, G, M]
        exact = self.levels.expand_as(self.mean)
        theirs = torch.einsum("nm,nmk->nk", exact, self.covariance)
        size = (theirs * exact).sum(1)  # [N], the variance of the outputs
        squares = torch.einsum("lnm,nmk,lnk->ln", integers.expand(-1, *exact.shape), self.covariance, integers)
        common = (integers * theirs).sum(2)
        steps = common / torch.where(squares > 0, squares, 1.0)  # [l, N]
        off = exact - steps[..., None] * integers  # [l, N, M]
        errors = torch.einsum("lnm,nmk,lnk->ln", off, self.covariance, off)
        # Outputs that nearly cancel could ask for a negative step, which is none.
        errors = torch.where((steps > 0) | (size <= 0), errors, size)
        if len(self.levels) == 1:
            errors, size = errors.sum(1, keepdim=True), size.sum(0, keepdim=True)
        shares = errors / size.clamp(min=torch.finfo(torch.float64).tiny)  # [l, G]
        shares = shares.round(decimals=DECIMALS)  # of integers and their multiples, the smaller ones
        for limit in LIMITS:
            least, best = shares[:limit].min(0)
            if float(least.mean()) <= TOLERANCE**2:
                break
        chosen = integers.gather(0, best[None, :, None].expand(1, *self.levels.shape))[0]
        step = steps.gather(0, best.expand(1, len(self.mean)))[0].clamp(min=0)
        return chosen.to(torch.int8), step, (self.mean * (exact - step[:, None] * chosen)).sum(1)


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
