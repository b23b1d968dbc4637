"""The rounding of levels and activations to 8-bit integers: the stated scale, error and bounds."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from bqnn.core.int8 import integer_limit, quantize_rows, round_levels
from tests.support import formulas
from tests.support.helpers import triton_devices
from tests.support.shapes import EVERY_M

# With so many columns level integers may reach 127, 60 and 15.
COLUMNS = [pytest.param(columns, id=f"K{columns}") for columns in (1, 281_000, 1_100_000)]


def draw_codebooks(num_levels: int) -> Tensor:
    """Codebooks of every kind, float32 [300, num_levels]: spread, crowded, far from zero, tiny and huge."""
    generator = torch.Generator().manual_seed(num_levels)
    spread = torch.randn(100, num_levels, generator=generator)
    crowded = spread.sign() * spread.abs() ** 4
    shifted = spread + 5.0
    books = torch.cat([spread, crowded, shifted]) * torch.logspace(-30, 30, 300)[:, None]
    return books.sort(1).values


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_the_largest_error_keeps_its_bound(num_levels: int, columns: int) -> None:
    levels, limit = draw_codebooks(num_levels), integer_limit(columns, num_levels)
    integers, scale = round_levels(levels, columns)
    assert (integers.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert int(integers.abs().max()) <= limit
    error = (levels.double() - integers.double() * scale.double()[:, None]).abs().amax(1)
    # The scale max|c| / limit is one of the candidates; its error is half of it, and 2**-24 of it by its own rounding.
    assert (error <= levels.abs().amax(1).double() / (2 * limit) * (1 + 2.0**-23)).all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_the_scale_is_the_best_candidate(num_levels: int, columns: int) -> None:
    levels = draw_codebooks(num_levels)[::7]
    integers, scale = round_levels(levels, columns)
    for n, row in enumerate(levels.tolist()):
        expected, expected_scale = formulas.int8_codebook(row, integer_limit(columns, num_levels))
        assert integers[n].tolist() == expected
        assert scale[n].item() == float(expected_scale)


@pytest.mark.parametrize("num_levels", EVERY_M)
def test_even_levels_stay_apart(num_levels: int) -> None:
    for columns in (1, 2**31 // (127 * (num_levels - 1)) - 1):
        integers, _ = round_levels(torch.arange(num_levels).float()[None] / 7, columns)
        assert integers.unique().numel() == num_levels


def test_levels_that_are_integers_are_exact() -> None:
    levels = torch.tensor([[-1.0, 0.0, 1.0], [-3.0, 1.0, 127.0], [0.0, 0.25, 0.75]])
    integers, scale = round_levels(levels, 9)
    assert torch.equal(integers * scale[:, None], levels)


def test_levels_below_every_normal_number() -> None:
    levels = torch.tensor([[-3.0, 0.0, 2.0]], dtype=torch.float64).mul(2.0**-149).float()
    integers, scale = round_levels(levels, 9)
    assert torch.equal(integers.double() * scale.double()[:, None], levels.double())


def test_no_sum_overflows() -> None:
    for num_levels in range(2, 17):
        most = (2**31 - 1) // (127 * (num_levels - 1))
        for columns in (1, 2, 4096, 133_144, 133_145, 300_000, most):
            if columns <= most:
                limit = integer_limit(columns, num_levels)
                assert num_levels - 1 <= limit <= 127
                assert columns * 127 * limit <= 2**31 - 1
        with pytest.raises(ValueError, match=f"precision must not be 'int8' .* more than {most} weights"):
            integer_limit(most + 1, num_levels)
    assert (integer_limit(133_144, 2), integer_limit(133_145, 2)) == (127, 126)


@pytest.mark.parametrize("device", triton_devices("packed_linear"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 5000])
def test_the_kernel_rounds_rows_by_the_rule(columns: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(9, columns, generator=generator)
    x[:, 0] = 1.0
    x = (x * torch.logspace(-37, 37, 9)[:, None]).to(dtype)
    x[3] = 0.0
    # An odd multiple of half a step is a tie.
    x[4] = 127.0 * (torch.arange(columns) == 0) + 0.5 * (torch.arange(columns) % 2)
    x[5, -1], x[6, 0] = float("nan"), float("-inf")
    q, scale = importlib.import_module("bqnn.kernels.packed").quantize_rows(x.to(device))
    expected, expected_scale = quantize_rows(x.float())
    assert torch.equal(q.cpu().float(), expected)
    assert torch.equal(scale.cpu().nan_to_num(-1.0), expected_scale.flatten().nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_rounded_to_the_nearest_step(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 3, 5, generator=generator, dtype=torch.float64) * torch.logspace(-37, 37, 200)[:, None, None]
    ).to(dtype)
    q, scale = quantize_rows(x)
    assert (q.dtype, scale.dtype, scale.shape) == (dtype, dtype, (200, 1, 1))
    assert torch.equal(q, q.round())
    assert (q.flatten(1).abs().amax(1) == 127).all()
    step = x.double().abs().amax((1, 2), keepdim=True) / 127
    assert ((x.double() - q.double() * step).abs() <= step * (0.5 + 1e-4)).all()


def test_rows_of_extreme_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[0.0, 0.0], [2e-43, -1e-43], [largest, -1e38], [float("nan"), 1.0], [float("inf"), 1.0]])
    q, scale = quantize_rows(x)
    assert q.abs().amax(1)[:3].tolist() == [0, 127, 127]
    assert q.isfinite().all()
    assert scale[0] == 0
    assert scale[1:3].isfinite().all()
    assert scale[3:].isnan().all()
