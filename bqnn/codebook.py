"""Levels and thresholds: how they are fitted to data, and what the parameters are that keep them in order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.ops._check import check_floating, check_num_levels
from bqnn.ops.codebook_from_raw import MARGIN as MARGIN
from bqnn.ops.codebook_from_raw import MIN_GAP as MIN_GAP
from bqnn.ops.codebook_from_raw import TAU_PER_GAP as TAU_PER_GAP
from bqnn.ops.codebook_from_raw import gaps as gaps
from bqnn.ops.codebook_from_raw import levels_from_raw as levels_from_raw
from bqnn.ops.codebook_from_raw import smallest_gap as smallest_gap
from bqnn.ops.codebook_from_raw import thresholds_from_raw as thresholds_from_raw

LLOYD_ITERATIONS = 50
MIN_SCALE = 1e-6


def lloyd_max(values: Tensor, num_levels: int) -> Tensor:
    """The levels of the scalar quantizer with the least squared error (Lloyd 1982), by alternation from quantiles.

    Args:
        values: [G, K] floating point, one data set a row.
        num_levels: M, 2 to 16.

    Returns:
        [G, M], strictly increasing in each row; a row with fewer than M distinct values gets evenly spaced levels.

    Raises:
        TypeError, ValueError: values not floating point, not [G, K] with K >= 1, or not finite; M out of range.
    """
    check_num_levels(num_levels)
    check_floating("values", values)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"values must have the shape [groups, at least 1], got {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError("values must be finite, got NaN or infinity")
    ordered = values.detach().double().sort(dim=1).values
    levels = torch.stack([_lloyd_max_row(row, num_levels, torch.finfo(values.dtype).eps) for row in ordered])
    return levels.to(values.dtype)


def _lloyd_max_row(ordered: Tensor, num_levels: int, eps: float) -> Tensor:
    total = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    closest = 2.0 * max(eps, MIN_GAP) * ordered.abs().max().item()
    spread = max((ordered[-1] - ordered[0]).item(), 2.0 * num_levels * closest, MIN_SCALE)
    evenly = ordered.mean() + spread * torch.linspace(-0.5, 0.5, num_levels, dtype=ordered.dtype, device=ordered.device)
    quantile = (torch.arange(num_levels, device=ordered.device) + 0.5) / num_levels * ordered.numel()
    levels = ordered[quantile.long()]
    for _ in range(LLOYD_ITERATIONS):
        cuts = torch.searchsorted(ordered, 0.5 * (levels[1:] + levels[:-1]), right=True)
        edges = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=ordered.numel())
        count = edges[1:] - edges[:-1]
        centroids = (total[edges[1:]] - total[edges[:-1]]) / count.clamp(min=1)
        updated = torch.where(count > 0, centroids, levels)
        if torch.equal(updated, levels):
            break
        levels = updated
    return levels if (levels[1:] - levels[:-1] > closest + 2.0 * MIN_GAP * spread).all() else evenly


def raw_from_levels(levels: Tensor, scale: Tensor) -> Tensor:
    """The inverse of :func:`levels_from_raw`."""
    relative = levels / scale
    steps = relative[:, 1:] - relative[:, :-1] - smallest_gap(relative[:, :1], 1.0)
    return torch.cat([relative[:, :1], steps + torch.log(-torch.expm1(-steps))], dim=1)


def raw_from_thresholds(thresholds: Tensor, levels: Tensor) -> Tensor:
    """The inverse of :func:`thresholds_from_raw`."""
    share = (thresholds - levels[:, :-1]) / (levels[:, 1:] - levels[:, :-1])
    return torch.logit((share - MARGIN) / (1.0 - 2.0 * MARGIN))
