"""Levels fitted to data, and the parameters that keep levels and thresholds in order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core import codebook
from bqnn.core.codebook import lloyd_max
from tests.support.shapes import EVERY_M


def squared_error(values: Tensor, levels: Tensor) -> float:
    return float((values.unsqueeze(-1) - levels).square().amin(-1).sum())


def best_levels(values: Tensor, num_levels: int) -> Tensor:
    """The optimum over all partitions of the sorted values into ``num_levels`` runs."""
    ordered = values.sort().values
    best: tuple[float, Tensor] | None = None
    for cuts in itertools.combinations(range(1, len(ordered)), num_levels - 1):
        levels = torch.stack([part.mean() for part in ordered.tensor_split(list(cuts))])
        candidate = squared_error(ordered, levels)
        if best is None or candidate < best[0]:
            best = candidate, levels
    assert best is not None
    return best[1]


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_separate_clusters_give_the_optimum(num_levels: int) -> None:
    generator = torch.Generator().manual_seed(num_levels)
    centres = torch.arange(num_levels, dtype=torch.float64) * 3.0 - 2.0
    values = (centres.repeat_interleave(4) + 0.3 * torch.randn(4 * num_levels, generator=generator)).double()
    shuffled = values[torch.randperm(len(values), generator=generator)]
    found = lloyd_max(shuffled.unsqueeze(0), num_levels)[0]
    torch.testing.assert_close(found, best_levels(values, num_levels))


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_any_small_set_is_near_the_optimum(num_levels: int) -> None:
    generator = torch.Generator().manual_seed(17)
    ratios = []
    for _ in range(25):
        values = torch.randn(13, generator=generator, dtype=torch.float64)
        found = squared_error(values, lloyd_max(values.unsqueeze(0), num_levels)[0])
        ratios.append(found / squared_error(values, best_levels(values, num_levels)))
    assert min(ratios) > 1.0 - 1e-9
    assert sum(ratio < 1.0 + 1e-9 for ratio in ratios) >= 8, "the optimum is hardly ever found"
    assert sorted(ratios)[len(ratios) // 2] < 1.2


@pytest.mark.parametrize("num_levels", EVERY_M)
def test_levels_are_centroids_of_their_cells(num_levels: int) -> None:
    values = torch.randn(3, 129, generator=torch.Generator().manual_seed(num_levels), dtype=torch.float64)
    levels = lloyd_max(values, num_levels)
    assert levels.shape == (3, num_levels)
    for row, row_levels in zip(values, levels, strict=True):
        nearest = (row.unsqueeze(1) - row_levels).abs().argmin(1)
        centroids = torch.stack([row[nearest == m].mean() for m in range(num_levels)])
        torch.testing.assert_close(row_levels, centroids, rtol=0.0, atol=1e-9)


def test_the_normal_distribution_has_its_published_levels() -> None:
    """Max 1960, table I: the optimum for N(0, 1)."""
    quantiles = torch.special.ndtri((torch.arange(100_001, dtype=torch.float64) + 0.5) / 100_001).unsqueeze(0)
    for published in ([0.7979], [0.0, 1.2240], [0.4528, 1.5104]):
        positive = torch.tensor(published, dtype=torch.float64)
        expected = torch.cat([-positive.flip(0), positive]).unique()
        found = lloyd_max(quantiles, len(expected))[0]
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_levels", [3, 16])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param([1.0] * 10, id="constant"),
        pytest.param([0.0] * 10, id="zero"),
        pytest.param([-0.4196], id="one-value"),
        pytest.param([0.0] * 9 + [1.0], id="two-values"),
        pytest.param([-1000.0, -1000.5, -1000.25], id="far-from-zero"),
        pytest.param([1e-20, -1e-20, 3e-20], id="tiny"),
    ],
)
def test_degenerate_rows_get_increasing_levels(row: list[float], num_levels: int, dtype: torch.dtype) -> None:
    levels = lloyd_max(torch.tensor([row], dtype=dtype), num_levels)
    assert levels.dtype == dtype
    assert torch.isfinite(levels).all()
    assert (levels[:, 1:] > levels[:, :-1]).all(), levels


def test_rows_are_fitted_one_by_one_and_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 63, generator=generator) * torch.tensor([[1.0], [10.0], [0.01], [1e4]])
    together = lloyd_max(values, 5)
    for row, levels in zip(values, together, strict=True):
        assert torch.equal(lloyd_max(row.flip(0).unsqueeze(0), 5)[0], levels)


@pytest.mark.parametrize(
    ("values", "num_levels", "error", "message"),
    [
        pytest.param(torch.zeros(5), 3, ValueError, r"values must have the shape .*\[5\]", id="vector"),
        pytest.param(torch.zeros(2, 0), 3, ValueError, r"values must have the shape .*\[2, 0\]", id="empty"),
        pytest.param(torch.tensor([[1.0, torch.nan]]), 3, ValueError, "values must be finite", id="nan"),
        pytest.param(torch.tensor([[1.0, -torch.inf]]), 3, ValueError, "values must be finite", id="inf"),
        pytest.param(torch.zeros(1, 5, dtype=torch.int64), 3, TypeError, "values must be floating point", id="int"),
        pytest.param(torch.zeros(1, 5), 1, ValueError, "num_levels must be from 2 to 16, got 1", id="M1"),
        pytest.param(torch.zeros(1, 5), 17, ValueError, "num_levels must be from 2 to 16, got 17", id="M17"),
        pytest.param(torch.zeros(1, 5), 3.0, TypeError, "num_levels must be an int, got float", id="M-float"),
        pytest.param(torch.zeros(1, 5), True, TypeError, "num_levels must be an int, got bool", id="M-bool"),
    ],
)
def test_bad_input(values: Tensor, num_levels: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lloyd_max(values, num_levels)


@pytest.mark.parametrize("spread", [0.0, -1.0, torch.nan, torch.inf])
def test_bad_spread(spread: float) -> None:
    with pytest.raises(ValueError, match="spread must be positive and finite, got"):
        lloyd_max(torch.zeros(1, 5), 3, spread)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400], ids=["2**63", "-2**63-1", "10**400"])
def test_integers_of_more_than_64_bits_are_no_numbers(number: int) -> None:
    """torch multiplies by none of them."""
    with pytest.raises(ValueError, match="spread must be a float or an integer of 64 bits, got"):
        lloyd_max(torch.zeros(1, 5), 3, number)
    with pytest.raises(ValueError, match="progress must be a float or an integer of 64 bits, got"):
        bqnn.kl_warmup(number, 1.0)


@pytest.mark.parametrize("num_levels", EVERY_M)
def test_a_row_of_one_value_has_levels_around_it_for_a_spread(num_levels: int) -> None:
    levels = lloyd_max(torch.full((1, 5), 0.3, dtype=torch.float64), num_levels, 0.1)
    gaps = torch.full((1, num_levels - 1), 0.1 * 12.0**0.5 / num_levels, dtype=torch.float64)
    torch.testing.assert_close(torch.diff(levels, dim=1), gaps)
    assert levels[0, (num_levels - 1) // 2].item() == 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fewer_values_than_levels_are_levels_and_the_others_divide_the_gaps(dtype: torch.dtype) -> None:
    values = torch.tensor([[-0.5, 0.0, 1.0, 0.0, -0.5]], dtype=dtype)
    for num_levels, expected in (
        (3, [-0.5, 0.0, 1.0]),
        (4, [-0.5, 0.0, 0.5, 1.0]),
        (6, [-0.5, -0.25, 0.0, 1 / 3, 2 / 3, 1.0]),
    ):
        assert torch.equal(lloyd_max(values, num_levels), torch.tensor([expected], dtype=dtype))


def test_values_without_room_between_them_have_the_spare_levels_outside() -> None:
    levels = lloyd_max(torch.tensor([[1000.0, 1000.3]], dtype=torch.float64), 6)[0]
    assert {1000.0, 1000.3} <= set(levels.tolist())
    assert levels[0] < 1000.0 and levels[-1] > 1000.3


def test_gaps_are_to_the_nearest_neighbour() -> None:
    levels = torch.tensor([[-1.0, 0.0, 0.25, 2.0], [0.0, 1.0, 3.0, 7.0]])
    assert codebook.gaps(levels).tolist() == [[1.0, 0.25, 0.25, 1.75], [1.0, 1.0, 2.0, 4.0]]
    assert codebook.gaps(torch.tensor([[1.0, 4.0]])).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_raw_levels_and_thresholds_round_trip(num_levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_levels)
    levels = torch.randn(5, num_levels, generator=generator).to(dtype).sort(1).values
    levels += torch.arange(num_levels) * 0.02
    scale = levels.std(1, keepdim=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    raw = codebook.raw_from_levels(levels, scale)
    torch.testing.assert_close(codebook.levels_from_raw(raw, scale), levels, rtol=tolerance, atol=tolerance)
    share = 0.05 + 0.9 * torch.rand(5, num_levels - 1, generator=generator).to(dtype)
    thresholds = levels[:, :-1] + share * torch.diff(levels, dim=1)
    raw = codebook.raw_from_thresholds(thresholds, levels)
    torch.testing.assert_close(codebook.thresholds_from_raw(raw, levels), thresholds, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 50.0, 1000.0])
def test_wide_and_narrow_gaps_round_trip(gap: float) -> None:
    levels = torch.tensor([[0.0, gap, 2.0 * gap]])
    raw = codebook.raw_from_levels(levels, torch.ones(1, 1))
    assert torch.isfinite(raw).all()
    torch.testing.assert_close(codebook.levels_from_raw(raw, torch.ones(1, 1)), levels, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("value", [-1e4, -20.0, 0.0, 20.0, 1e4])
@pytest.mark.parametrize("first", [-1.0, 0.0, 100.0])
def test_levels_stay_apart_whatever_the_parameters_are(first: float, value: float) -> None:
    raw = torch.tensor([[first, value, value, value]])
    levels = codebook.levels_from_raw(raw, torch.full((1, 1), 0.05))
    assert torch.isfinite(levels).all()
    assert (levels[:, 1:] > levels[:, :-1]).all(), levels


@pytest.mark.parametrize("value", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_each_level_stays_in_its_cell_whatever_the_thresholds_parameters_are(value: float) -> None:
    levels = torch.tensor([[-1.0, 0.5, 2.0]])
    thresholds = codebook.thresholds_from_raw(torch.full((1, 2), value), levels)
    codes = (levels.unsqueeze(-1) > thresholds.unsqueeze(1)).sum(-1)
    assert codes.tolist() == [[0, 1, 2]]


def test_gradients_reach_every_parameter() -> None:
    raw = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    cuts = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.float64)

    def function(raw: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        levels = codebook.levels_from_raw(raw, scale)
        return levels, codebook.thresholds_from_raw(cuts, levels)

    assert torch.autograd.gradcheck(function, (raw, cuts))
