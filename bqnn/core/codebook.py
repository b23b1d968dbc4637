"""Levels and thresholds: how they are fitted to data, and what the parameters are that keep them in order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import check_floating, check_num_levels

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
