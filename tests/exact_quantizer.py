"""The optimal scalar quantizer by dynamic programming over every number: exact, slow, and nothing of the package's."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def squared_error(numbers: Array, levels: Array) -> float:
    """Of ascending ``numbers`` [K] at their nearest levels, without a difference of large sums."""
    levels = np.sort(np.asarray(levels, dtype=np.float64))
    nearest = np.searchsorted(0.5 * levels[1:] + 0.5 * levels[:-1], numbers)
    return float(np.square(numbers - levels[nearest]).sum())


def optimal_levels(numbers: Array, most: int) -> list[Array]:
    """The levels with the least squared error: 1 of them, 2 of them, up to ``most``, for ascending numbers [K].

    The first number of a run's last cell does not go back as the run grows. So every other run's is searched between
    those of its two neighbours, which were searched among half as many runs before: most * K * log K steps.
    """
    count = len(numbers)
    centred = (numbers - numbers[count // 2]) / max(float(np.abs(numbers).max()), 1e-300)
    sums = np.concatenate([[0.0], centred.cumsum()])
    squares = np.concatenate([[0.0], np.square(centred).cumsum()])

    def error(first: NDArray[np.int64], end: NDArray[np.int64]) -> Array:
        total = sums[end] - sums[first]
        return np.maximum(squares[end] - squares[first] - total * total / np.maximum(end - first, 1), 0.0)

    ends = np.arange(count + 1)
    least = error(np.zeros_like(ends), ends)
    starts = [np.zeros_like(ends)]
    for _ in range(1, most):
        start, updated = np.zeros_like(ends), least.copy()
        stride = 1 << count.bit_length()
        while stride:
            runs = np.arange(stride, count + 1, 2 * stride)
            low, high = start[runs - stride], start[np.minimum(runs + stride, count)]
            high = np.where(runs + stride > count, runs, np.minimum(high, runs))
            length = high - low + 1
            offsets = np.concatenate([[0], length.cumsum()[:-1]]).astype(np.int64)
            owner = np.repeat(np.arange(len(runs)), length)
            first = np.arange(int(length.sum())) - offsets[owner] + low[owner]
            if len(runs):
                candidates = least[first] + error(first, runs[owner])
                updated[runs] = np.minimum.reduceat(candidates, offsets)
                ties = np.where(candidates == updated[runs][owner], first, count)
                start[runs] = np.minimum.reduceat(ties, offsets)
            stride >>= 1
        least = updated
        starts.append(start)
    levels = []
    for cells in range(1, most + 1):
        edges = [count]
        for start in reversed(starts[:cells]):
            edges.append(int(start[edges[-1]]))
        runs = [numbers[low:end] for end, low in itertools.pairwise(edges) if end > low]
        levels.append(np.sort([run[0] + (run - run[0]).mean() for run in runs]))
    return levels
