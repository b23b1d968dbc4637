"""The scalar quantizer with the least squared error, for rows of sorted numbers.

The cells of the best M levels are runs of the sorted numbers, so dynamic programming finds them (Bruce, "Optimum
quantization", 1965). It runs on groups of neighbours, each a number with a weight: few at first, and more of them
where the error within groups could matter beside the error of the quantizer. Lloyd's alternation on all numbers then
moves the ends of the cells into the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bqnn.core.level_spacing import SmallestGap, spaced_levels

Array = NDArray[Any]

GROUPS_PER_LEVEL = 16  # to start with
TOLERANCE = 0.02  # of the quantizer's error, for a bound of the error within groups, which is about a third of it
LLOYD_ITERATIONS = 50
CHUNK = 1 << 17  # partial errors in one step of the dynamic programming, so that they stay in the cache


def best_levels(ordered: Array, num_levels: int, smallest_gap: SmallestGap, spread: float) -> Array:
    """The M levels with the least squared error for each row.

    Args:
        ordered: [G, K] float32 or float64, finite, ascending in each row; K >= 1.
        num_levels: M, at least 2.
        smallest_gap: how far apart the levels of a codebook have to be at least.
        spread: the standard deviation to expect of numbers that are all the same.

    Returns:
        [G, M] float64, ascending. Where there are fewer than M distinct numbers, or numbers too close for levels of
        their own, the others are placed by :func:`with_spare_levels`.
    """
    num_groups = max(num_levels, min(ordered.shape[1], GROUPS_PER_LEVEL * num_levels))
    rows = max(1, CHUNK // (num_levels * num_groups))
    levels = np.empty((len(ordered), num_levels))
    for first in range(0, len(ordered), rows):
        numbers = _Numbers(ordered[first : first + rows])
        edges = np.tile([0, ordered.shape[1]], (len(numbers.ordered), 1))
        levels[first : first + rows] = _levels_of(numbers, edges, num_groups, num_levels, smallest_gap, spread)
    return levels


class _Numbers:
    """Sorted rows [G, K], with the sums that make the mean of any run of them a difference."""

    def __init__(self, ordered: Array, sums: Array | None = None) -> None:
        self.ordered = ordered
        if sums is None:
            sums = np.zeros((ordered.shape[0], ordered.shape[1] + 1))
            np.cumsum(ordered, axis=1, dtype=np.float64, out=sums[:, 1:])
        self.sums = sums

    def of(self, rows: Array) -> _Numbers:
        return self if rows.all() else _Numbers(self.ordered[rows], self.sums[rows])

    def at(self, indices: Array) -> Array:
        """The numbers at ``indices`` [G, N] in float64; beyond an end, the number there."""
        return np.take_along_axis(self.ordered, indices.clip(0, self.ordered.shape[1] - 1), 1).astype(np.float64)

    def first_above(self, bounds: Array, low: Array, high: Array) -> Array:
        """The first index from ``low`` on whose number is above the bound, ``high`` without one; [G, N] each."""
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) >> 1
            above = (self.at(middle) > bounds) | (low == high)
            low, high = np.where(above, low, middle + 1), np.where(above, middle, high)
        return low

    def ends(self, edges: Array) -> tuple[Array, Array]:
        """The least and the greatest number of each run between two ``edges`` [G, N + 1]."""
        return self.at(edges[:, :-1]), self.at(np.maximum(edges[:, 1:] - 1, edges[:, :-1]))

    def means(self, edges: Array) -> Array:
        """The mean of each run: [G, N]. A run of one value has exactly that value."""
        sums = np.diff(np.take_along_axis(self.sums, edges, 1), axis=1)
        return (sums / np.maximum(np.diff(edges, axis=1), 1)).clip(*self.ends(edges))

    def error_bounds(self, edges: Array) -> Array:
        """No run has a larger squared error about its mean: [G, N]."""
        low, high = self.ends(edges)
        return 0.25 * np.diff(edges, axis=1) * np.square(high - low)


class _Groups:
    """Groups of neighbours of each row, and their best partition into 1 to M cells.

    Args:
        numbers: the rows.
        edges: [G, N + 1], where groups begin in their rows, and the end; a group may be empty.
        num_levels: M, at most N.
    """

    def __init__(self, numbers: _Numbers, edges: Array, num_levels: int) -> None:
        self.numbers, self.edges, self.num_levels = numbers, edges, num_levels
        self.weights = np.diff(edges, axis=1).astype(np.float64)
        self.means = numbers.means(edges)
        rows, groups = self.means.shape
        # errors[:, k, n]: of the first n groups in k cells; starts[:, k, n]: where the last of these cells begins.
        self.errors = np.full((rows, num_levels + 1, groups + 1), np.inf)
        self.errors[:, 0, 0] = 0.0
        self.starts = np.zeros((rows, num_levels + 1, groups + 1), dtype=np.int32)
        # Of the cell that begins at each group and ends at the one that is added. Merged so, no error is the small
        # difference of large sums.
        weight, mean, error = (np.zeros((rows, groups)) for _ in range(3))
        for last in range(groups):
            cells = np.s_[:, : last + 1]
            added = self.weights[:, last : last + 1]
            joined = weight[cells] + added
            share = added / np.maximum(joined, 1.0)
            step = self.means[:, last : last + 1] - mean[cells]
            error[cells] += weight[cells] * share * step * step
            mean[cells] += share * step
            weight[cells] = joined
            totals = self.errors[:, :-1, : last + 1] + error[:, None, : last + 1]
            start = totals.argmin(2)
            self.starts[:, 1:, last + 1] = start
            self.errors[:, 1:, last + 1] = np.take_along_axis(totals, start[:, :, None], 2)[:, :, 0]

    def is_too_coarse(self) -> Array:
        """Whether a row's error within groups could matter beside that of its quantizer: [G]."""
        return self.numbers.error_bounds(self.edges).sum(1) > TOLERANCE * self.errors[:, self.num_levels, -1]

    def cells(self, rows: Array, num_cells: int) -> Array:
        """The first group of each cell, and the end, of ``rows`` in so many cells: [rows, cells + 1]."""
        ends = [np.full(len(rows), self.means.shape[1])]
        for k in range(num_cells, 0, -1):
            ends.append(self.starts[rows, k, ends[-1]])
        return np.stack(ends[::-1], axis=1)

    def centroids(self, row: int) -> Iterator[Array]:
        """The best levels of a row: M, or as many as there are distinct numbers, then ever fewer down to one."""
        errors = self.errors[row, :, -1]
        for num_cells in range(int(errors.argmin()), 0, -1):
            cells = self.cells(np.array([row]), num_cells)
            edges = np.take_along_axis(self.edges[row : row + 1], cells, 1)
            yield _Numbers(self.numbers.ordered[row : row + 1], self.numbers.sums[row : row + 1]).means(edges)[0]


def _split(numbers: _Numbers, edges: Array, count: int) -> Array:
    """``count`` groups, as [G, count + 1] edges: the half with the larger errors is divided, again and again."""
    columns = numbers.ordered.shape[1]
    if columns <= count:
        return np.broadcast_to(np.arange(count + 1).clip(max=columns), (len(edges), count + 1))
    while (groups := edges.shape[1] - 1) < count:
        halved = min((groups + 1) // 2, count - groups)
        worst = np.argpartition(-numbers.error_bounds(edges), halved - 1, axis=1)[:, :halved]
        low, high = (np.take_along_axis(end, worst, 1) for end in numbers.ends(edges))
        begin, end = np.take_along_axis(edges, worst, 1), np.take_along_axis(edges, worst + 1, 1)
        cuts = numbers.first_above(0.5 * low + 0.5 * high, begin, end)
        edges = np.sort(np.concatenate([edges, cuts], axis=1), axis=1)
    return edges


def _alternate(numbers: _Numbers, levels: Array) -> Array:
    """Levels and the numbers that are nearest to each by turns, until neither changes (Lloyd 1982)."""
    low = np.zeros((len(levels), levels.shape[1] - 1), dtype=np.int64)
    high = np.full_like(low, numbers.ordered.shape[1])
    for _ in range(LLOYD_ITERATIONS):
        cuts = numbers.first_above(0.5 * levels[:, 1:] + 0.5 * levels[:, :-1], low, high)
        edges = np.concatenate([low[:, :1], cuts, high[:, :1]], axis=1)
        updated = np.where(np.diff(edges, axis=1) > 0, numbers.means(edges), levels)
        if np.array_equal(updated, levels):
            break
        levels = updated
    return levels


def _levels_of(
    numbers: _Numbers, edges: Array, num_groups: int, num_levels: int, smallest_gap: SmallestGap, spread: float
) -> Array:
    edges = _split(numbers, edges, num_groups)
    groups = _Groups(numbers, edges, num_levels)
    levels, coarse = np.empty((len(edges), num_levels)), groups.is_too_coarse()
    if coarse.any():
        finer = numbers.of(coarse), edges[coarse], 2 * num_groups
        levels[coarse] = _levels_of(*finer, num_levels, smallest_gap, spread)
    if coarse.all():
        return levels
    rows = np.flatnonzero(~coarse)
    cells = np.take_along_axis(edges[rows], groups.cells(rows, num_levels), 1)
    fine = numbers.of(~coarse)
    levels[rows] = _alternate(fine, fine.means(cells))
    crowded = np.diff(levels[rows], axis=1).min(1) <= smallest_gap(levels[rows])
    for row in rows[crowded]:
        candidates = groups.centroids(row)
        numbers_of_row = groups.means[row], groups.weights[row]
        levels[row] = spaced_levels(*numbers_of_row, candidates, num_levels, smallest_gap, spread)
    return levels
