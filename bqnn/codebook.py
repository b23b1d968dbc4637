"""Levels and thresholds: how they are fitted to data, and what the parameters are that keep them in order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.level_spacing import Array, SmallestGap
from bqnn.ops._check import check_floating, check_num_levels
from bqnn.ops.codebook_from_raw import MARGIN as MARGIN
from bqnn.ops.codebook_from_raw import MIN_GAP as MIN_GAP
from bqnn.ops.codebook_from_raw import TAU_PER_GAP as TAU_PER_GAP
from bqnn.ops.codebook_from_raw import gaps as gaps
from bqnn.ops.codebook_from_raw import levels_from_raw as levels_from_raw
from bqnn.ops.codebook_from_raw import smallest_gap as smallest_gap
from bqnn.ops.codebook_from_raw import thresholds_from_raw as thresholds_from_raw
from bqnn.scalar_quantizer import best_levels


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
        TypeError, ValueError: values not floating point, not [G, K] with K >= 1, or not finite; M out of range; a
            spread that is not positive.
    """
    check_num_levels(num_levels)
    check_floating("values", values)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"values must have the shape [groups, at least 1], got {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError("values must be finite, got NaN or infinity")
    if not 0.0 < spread < math.inf:
        raise ValueError(f"spread must be positive and finite, got {spread}")
    rows = values.detach().cpu()
    ordered = np.sort((rows if rows.dtype == torch.float64 else rows.float()).numpy(), axis=1)
    levels = best_levels(ordered, num_levels, _gap_for(values.dtype), spread)
    return torch.from_numpy(levels).to(values)


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
