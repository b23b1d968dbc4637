"""Levels that have to keep a distance: where spare ones go, and how crowded ones move apart at the least error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# The least distance between neighbours that a codebook has to keep, from its levels [..., M], ascending: [...].
SmallestGap = Callable[[Array], Any]

ROUNDS = 16  # of any of the alternations below, which settle in a few


def spaced_levels(
    values: Array,
    weights: Array,
    candidates: Iterable[Array],
    num_levels: int,
    smallest_gap: SmallestGap,
    spread: float,
) -> Array:
    """M levels with the smallest gap between neighbours, made of the candidate with the least squared error.

    Args:
        values, weights: [N] float64, numbers in ascending order and how often each occurs.
        candidates: levels in ascending order, 1 to M of them each, and each with an error that is no less than that of
            the one before it. Those after the first that keeps the gap are not looked at; of values that are closer
            than the smallest gap, only the last, a single level.
        num_levels: M.
        smallest_gap: of a codebook.
        spread: the standard deviation to expect of numbers around a single level.

    Returns:
        [M] float64, ascending.
    """
    if values[-1] - values[0] <= smallest_gap(values[[0, -1]]):
        *_, single = candidates
        candidates = [single]
    best, least = np.empty(0), np.inf
    for levels in candidates:
        complete = with_spare_levels(levels, num_levels, smallest_gap, spread)
        keeps_gap = bool(np.diff(complete).min() > smallest_gap(complete))
        if not keeps_gap:
            complete = _alternate(values, weights, complete, smallest_gap)
        error = _squared_error(values, weights, complete)
        if error < least or len(best) == 0:  # squares of the largest numbers are infinite
            best, least = complete, error
        if keeps_gap:
            break
    return best


def with_spare_levels(levels: Array, num_levels: int, smallest_gap: SmallestGap, spread: float) -> Array:
    """``levels`` as they are, and spare ones up to M of them where they do least harm: [k] -> [M], ascending.

    A spare level goes where it leaves the widest gaps, and divides its gap evenly, so that the narrowest of all stays
    as wide as can be. Where the gaps have no room left, spare levels go on at both ends, as far apart as the widest gap
    is. A single level gets them on both sides, spaced as the best quantizer of a uniform distribution with the
    deviation ``spread``.
    """
    spare = num_levels - len(levels)
    if len(levels) == 1:
        # A step of 0 would never reach the gap, and one that is tiny beside the level takes a thousand doublings: the
        # first ones, up to a quarter of the gap of the level alone, are made at once.
        step = max(spread * 12.0**0.5 / num_levels, float(np.finfo(np.float64).smallest_normal))
        gap = float(smallest_gap(levels))
        if gap > step:
            step = math.ldexp(step, max(0, math.frexp(gap)[1] - math.frexp(step)[1] - 2))
        while step <= smallest_gap(_extended(levels, spare, step)):
            step *= 2.0
        return _extended(levels, spare, step)
    room, gaps, parts = 2.0 * smallest_gap(levels), np.diff(levels), np.ones(len(levels) - 1, dtype=np.int64)
    while spare and (divided := gaps / (parts + 1)).max() > room:
        parts[divided.argmax()] += 1
        spare -= 1
    inside = [low + gap / n * np.arange(n) for low, gap, n in zip(levels, gaps, parts)]
    return _extended(np.concatenate([*inside, levels[-1:]]), spare, max(float((gaps / parts).max()), room))


def _extended(levels: Array, spare: int, step: float) -> Array:
    above, below = (spare + 1) // 2, spare // 2
    lower, upper = levels[0] - step * np.arange(below, 0, -1), levels[-1] + step * np.arange(1, above + 1)
    return np.concatenate([lower, levels, upper])


def _alternate(values: Array, weights: Array, levels: Array, smallest_gap: SmallestGap) -> Array:
    """Lloyd's alternation with levels that keep the smallest gap."""
    levels, least = _moved_apart(levels, np.ones(len(levels)), smallest_gap), np.inf
    best = levels
    for _ in range(ROUNDS):
        error = _squared_error(values, weights, levels)
        if not error < least:
            break
        best, least = levels, error
        cells = _cells(values, levels)
        counts = np.bincount(cells, weights, len(levels))
        sums = np.bincount(cells, weights * (values - values[0]), len(levels))
        means = np.where(counts > 0.0, values[0] + sums / np.maximum(counts, 1.0), levels)
        levels = _moved_apart(means, counts, smallest_gap)
    return best


def _moved_apart(levels: Array, weights: Array, smallest_gap: SmallestGap) -> Array:
    """The levels with the smallest gap that are nearest to ``levels``, in squared distance with ``weights``: [M].

    Less the gaps below them they are the isotonic regression of the given ones (pool adjacent violators). How large the
    smallest gap is depends on the levels in turn, though little.
    """
    steps, gap = np.arange(len(levels)), 0.0
    weights = weights + 1e-9 * weights.sum()  # a level without numbers gives way to others
    for _ in range(ROUNDS):
        blocks: list[tuple[float, float, int]] = []  # mean, weight and number of levels
        for mean, weight in zip(levels - gap * steps, weights):
            size = 1
            while blocks and blocks[-1][0] >= mean:
                other, other_weight, other_size = blocks.pop()
                mean += (other - mean) * other_weight / (weight + other_weight)
                weight, size = weight + other_weight, size + other_size
            blocks.append((mean, weight, size))
        moved = np.repeat([mean for mean, _, _ in blocks], [size for _, _, size in blocks]) + gap * steps
        if np.diff(moved).min() > smallest_gap(moved):
            break
        gap = 1.01 * float(smallest_gap(moved))
    return moved


def _cells(values: Array, levels: Array) -> Array:
    return np.searchsorted(0.5 * levels[1:] + 0.5 * levels[:-1], values)


def _squared_error(values: Array, weights: Array, levels: Array) -> float:
    return float((weights * np.square(values - levels[_cells(values, levels)])).sum())
