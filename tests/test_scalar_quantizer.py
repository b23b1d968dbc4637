"""Levels against the exact optimum, for drawn weights of every kind, size and number.

BQNN_CODEBOOK_DRAWS is how many are drawn: `BQNN_CODEBOOK_DRAWS=2000` takes a quarter of an hour.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.random import Generator

from bqnn.core import codebook
from bqnn.core.codebook import lloyd_max
from bqnn.core.level_spacing import with_spare_levels
from tests.support.exact_quantizer import Array, optimal_levels, squared_error
from tests.support.shapes import EVERY_M

DRAWS = int(os.environ.get("BQNN_CODEBOOK_DRAWS", "96"))
MOST_WEIGHTS = 1e6 if "BQNN_CODEBOOK_DRAWS" in os.environ else 3e4
SHARE = 1.01  # of the exact optimum, that a fit may have as its squared error


def pruned(rng: Generator, n: int) -> Array:
    weights = rng.standard_normal(n)
    return weights * (np.abs(weights) > np.quantile(np.abs(weights), rng.choice([0.5, 0.9, 0.99])))


def with_an_outlier(rng: Generator, n: int) -> Array:
    weights = rng.standard_normal(n)
    weights[0] = rng.choice([-1.0, 1.0]) * 10.0 ** rng.uniform(1.0, 6.0)
    return weights


def few_values(rng: Generator, n: int) -> Array:
    return rng.choice(rng.standard_normal(rng.integers(2, 20)), n)


def noisy_ternary(rng: Generator, n: int) -> Array:
    return rng.choice([-1.0, 0.0, 0.7], n) + 10.0 ** rng.uniform(-7.0, -1.0) * rng.standard_normal(n)


def two_modes(rng: Generator, n: int) -> Array:
    width = rng.choice([0.01, 0.3, 1.0])
    return np.where(rng.random(n) < rng.uniform(0.01, 0.99), -1.0, 2.0) + width * rng.standard_normal(n)


def many_sizes(rng: Generator, n: int) -> Array:
    return rng.standard_normal(n) * 10.0 ** rng.uniform(-6.0, 0.0, n)


KINDS: dict[str, Callable[[Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.uniform(-1.0, 1.0, n),
    "pruned": pruned,
    "few-values": few_values,
    "constant": lambda rng, n: np.full(n, rng.choice([0.0, 1.0, -1.0]) * rng.random()),
    "heavy-tailed": lambda rng, n: rng.standard_t(rng.uniform(1.0, 4.0), n),
    "two-modes": two_modes,
    "outlier": with_an_outlier,
    "noisy-ternary": noisy_ternary,
    "many-sizes": many_sizes,
    "skewed": lambda rng, n: rng.lognormal(0.0, rng.uniform(0.3, 3.0), n),
    "far-from-zero": lambda rng, n: 10.0 ** rng.uniform(0.0, 3.0) + rng.standard_normal(n),
}


def smallest_gap(levels: Array) -> float:
    rows = torch.from_numpy(levels).unsqueeze(0)
    return float(codebook.smallest_gap(rows[:, :1], rows.std(1, correction=0, keepdim=True)))


def least_error(numbers: Array, num_levels: int) -> float:
    """The error of the exact optimum. Where its levels are closer than a codebook can have them, that of the best of
    the optima of fewer levels and of the same levels, each moved up where the one below is too near."""
    optima = optimal_levels(numbers, num_levels)
    errors = []
    for levels in reversed(optima):
        gap = 1.06 * smallest_gap(levels)
        apart = len(levels) == num_levels and bool((np.diff(levels) > gap).all())
        if apart:
            return squared_error(numbers, levels)
        moved = list(levels[:1])
        for level in levels[1:]:
            moved.append(max(level, moved[-1] + 1.1 * gap))
        errors.append(squared_error(numbers, np.array(moved)))
    return min(errors)


def check_fit(weights: Array, num_levels: int) -> None:
    """``weights`` [G, K] float32."""
    found = lloyd_max(torch.from_numpy(weights), num_levels)
    assert found.dtype == torch.float32 and found.shape == (len(weights), num_levels)
    scale = found.double().std(1, correction=0, keepdim=True)
    smallest = codebook.smallest_gap(found[:, :1].double(), scale)
    assert (torch.diff(found.double(), dim=1) > smallest).all(), "closer than the parameters of a codebook allow"
    for row, levels in zip(np.sort(weights.astype(np.float64), axis=1), found.double().numpy()):
        error, least = squared_error(row, levels), least_error(row, num_levels)
        rounding = len(row) * (2.0**-23 * np.abs(row).max()) ** 2
        assert error <= SHARE * least + rounding, f"{error / max(least, rounding):.4f} times the least error"


@pytest.mark.parametrize("draw", range(DRAWS))
def test_drawn_weights_have_the_least_error(draw: int) -> None:
    rng = np.random.default_rng(draw)
    kind = list(KINDS)[draw % len(KINDS)]
    size = int(10.0 ** rng.uniform(0.0, np.log10(MOST_WEIGHTS)))
    groups = 1 if rng.random() < 0.5 else min(size, int(rng.integers(2, 9)))
    weights = 10.0 ** rng.uniform(-30.0, 30.0) * KINDS[kind](rng, size - size % groups)
    check_fit(weights.reshape(groups, -1).astype(np.float32), int(rng.integers(2, 17)))


@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_levels(kind: str, num_levels: int) -> None:
    rng = np.random.default_rng(num_levels)
    check_fit(np.stack([KINDS[kind](rng, 341) for _ in range(2)]).astype(np.float32), num_levels)


@pytest.mark.parametrize("num_levels", [2, 3, 4, 5])
def test_the_reference_is_the_optimum_of_all_partitions(num_levels: int) -> None:
    rng = np.random.default_rng(num_levels)
    for size in range(num_levels, 13):
        numbers = np.sort(rng.standard_cauchy(size))
        partitions = itertools.combinations(range(1, size), num_levels - 1)
        errors = (
            sum(np.square(run - run.mean()).sum() for run in np.split(numbers, list(cuts))) for cuts in partitions
        )
        found = squared_error(numbers, optimal_levels(numbers, num_levels)[-1])
        assert found == pytest.approx(min(errors), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-30, 5e-324])
@pytest.mark.parametrize("value", [0.0, 1e-30, -0.7, 1e30])
def test_levels_around_one_value_are_found_in_a_few_steps(value: float, spread: float) -> None:
    """A spread that is tiny beside the value was doubled a thousand times, for each row."""
    asked = []

    def smallest_gap(levels: Array) -> float:
        asked.append(levels)
        return float(1e-4 * (np.std(levels) + np.abs(levels[0])))

    levels = with_spare_levels(np.array([value]), 5, smallest_gap, spread)
    assert len(levels) == 5 and levels[2] == value
    assert np.diff(levels).min() > smallest_gap(levels)
    assert len(asked) < 10
    assert np.ptp(levels) <= max(5.0 * spread, 1e-2 * abs(value), 1e-300), "no farther apart than they have to be"
