"""Levels and thresholds: how they are fitted to data, and what the parameters are that keep them in order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import check_data, check_floating, check_num_levels, check_number
from bqnn.core.level_spacing import Array, SmallestGap
from bqnn.core.scalar_quantizer import best_levels


def lloyd_max(values: Tensor, num_levels: int, spread: float = 1.0) -> Tensor:
    """The levels of the scalar quantizer with the least squared error (Max 1960, Lloyd 1982), by dynamic programming.

    Nothing depends on the size of the values: a multiple of them, and of ``spread``, has that multiple of the levels.
    They may be far from zero, unevenly distributed and few. What levels need is a distance, :func:`smallest_gap` and
    what ``values.dtype`` tells apart: values that are closer share a level. The error is within a hundredth of the
    least one. Sorting and sums are in float32 or float64, whatever the dtype.

    Args:
        values: [G, K] floating point, one data set a row.
        num_levels: M, 2 to 16.
        spread: the standard deviation to expect of a row that has one value only, in the unit of ``values``.

    Returns:
        [G, M], strictly increasing in each row. With fewer than M distinct values each of them is a level; the spare
        levels, which no value has, divide the widest gaps. A row of one value has levels around it, spaced as for a
        uniform distribution with the deviation ``spread``.

    Raises:
        TypeError, ValueError: values not floating point, not [G, K] with G, K >= 1, not finite; M out of range; a
            spread that is not positive, or so large that levels would not be finite.
    """
    check_num_levels(num_levels)
    check_floating("values", values)
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"values must have the shape [at least 1, at least 1], got {list(values.shape)}")
    check_data("values", values)
    if not torch.isfinite(values).all():
        raise ValueError("values must be finite, got NaN or infinity")
    check_number("spread", spread)
    if not 0.0 < spread < math.inf:
        raise ValueError(f"spread must be positive and finite, got {spread}")
    rows = values.detach().cpu().resolve_neg()
    ordered = np.sort((rows if rows.dtype == torch.float64 else rows.float()).numpy(), axis=1)
    levels = best_levels(ordered, num_levels, _gap_for(values.dtype), spread)
    found = torch.from_numpy(levels).to(values)
    if not torch.isfinite(found).all():
        raise ValueError(f"spread must be small enough for levels that {values.dtype} has, got {spread}")
    return found


def _gap_for(dtype: torch.dtype) -> SmallestGap:
    """The smallest gap that the parameters of a codebook can express in ``dtype``, and a margin for their rounding."""

    limits = torch.finfo(dtype)

    def gap(levels: Array) -> Any:
        rounding = limits.eps * np.maximum(np.abs(levels).max(-1), limits.smallest_normal)
        return 1.05 * np.maximum(MIN_GAP * (levels.std(-1) + np.abs(levels[..., 0])), rounding)

    return gap


def raw_from_levels(levels: Tensor, scale: Tensor) -> Tensor:
    """The inverse of :func:`levels_from_raw`."""
    relative = levels / scale
    steps = relative[:, 1:] - relative[:, :-1] - smallest_gap(relative[:, :1], 1.0)
    return torch.cat([relative[:, :1], steps + torch.log(-torch.expm1(-steps))], dim=1)


def raw_from_thresholds(thresholds: Tensor, levels: Tensor) -> Tensor:
    """The inverse of :func:`thresholds_from_raw`."""
    share = (thresholds - levels[:, :-1]) / (levels[:, 1:] - levels[:, :-1])
    return torch.logit((share - MARGIN) / (1.0 - 2.0 * MARGIN))


TAU_PER_GAP = 0.375  # the published window, tau = 0.075 at a gap of 0.2 between levels


MIN_GAP = 1e-4  # between two levels, in units of their size and spread: float32 tells them apart, windows have a width


MARGIN = 1e-3  # of a gap, that a learned threshold keeps from both its levels


def gaps(levels: Tensor) -> Tensor:
    """The distance of each level to its nearest neighbour: [G, M] -> [G, M]."""
    steps = levels[:, 1:] - levels[:, :-1]
    return torch.minimum(torch.cat([steps[:, :1], steps], dim=1), torch.cat([steps, steps[:, -1:]], dim=1))


def smallest_gap(first: Tensor, scale: Tensor | float) -> Tensor:
    """What two neighbouring levels of a codebook that starts at ``first`` [G, 1] are always apart, [G, 1]."""
    return MIN_GAP * (scale + first.abs())


def levels_from_raw(raw: Tensor, scale: Tensor) -> Tensor:
    """scale * (first, first + smallest + softplus(gap_1), ...): increasing whatever the raw values are, [G, M] each.

    ``scale`` [G, 1] is the spread of the weights when the codebook was fitted, so that an optimizer's step moves first
    value and gaps alike, in wide layers and narrow ones.
    """
    first = raw[:, :1]
    increments = torch.cat([first, smallest_gap(first, 1.0) + F.softplus(raw[:, 1:])], dim=1)
    return scale * increments.cumsum(1)


def thresholds_from_raw(raw: Tensor, levels: Tensor) -> Tensor:
    """t_j at a share of the way from c_{j-1} to c_j, sigmoid(raw_j) but for a margin: each level in its own cell."""
    share = MARGIN + (1.0 - 2.0 * MARGIN) * torch.sigmoid(raw)
    return levels[:, :-1] + share * (levels[:, 1:] - levels[:, :-1])
