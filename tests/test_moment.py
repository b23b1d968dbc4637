"""The kernels of the moments of a weight, and of the noise of outputs, by themselves."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from bqnn.core.philox import normal
from bqnn.core.quantizer import MODES, Posterior
from bqnn.kernels.arguments import Noise
from bqnn.ops import moment_product
from tests.support.helpers import SEED, make_case, triton_devices
from tests.support.shapes import GRANULARITIES, SOME_M, LinearShape

DEVICES = triton_devices("moment_linear")
OFFSET = 2**32 - 2
ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


NOISE = Noise(SEED, OFFSET)


def kernels(module: str = "moment") -> Any:
    return importlib.import_module(f"bqnn.kernels.{module}")


@pytest.mark.parametrize("device", DEVICES)
def test_variance_keeps_its_relative_precision_in_both_tails(device: str) -> None:
    z = torch.linspace(-8.5, 8.5, 171).view(-1, 1)
    levels, thresholds = torch.tensor([[-1.0, 1.0]]), torch.tensor([[0.0]])
    posterior = Posterior(*(tensor.to(device) for tensor in (z, torch.zeros_like(z), levels, thresholds)))
    mean, variance = (moment.cpu() for moment in kernels().moments(posterior, "categorical", torch.float32))
    below, above = (0.5 * torch.erfc(side * z.double() * 0.5**0.5) for side in (-1.0, 1.0))
    torch.testing.assert_close(mean.double(), below - above, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(variance.double(), 4.0 * below * above, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
def test_moments_and_their_gradients(num_levels: int, granularity: str, mode: str, device: str) -> None:
    case = make_case(LinearShape(1, 7, 129), num_levels, granularity)
    posterior = (case.weight, case.log_sigma2, case.levels, case.thresholds)
    here, exact = (
        Posterior(*(tensor.to(place) for tensor in posterior)) for place in (torch.device(device), torch.float64)
    )
    expected = moment_product.weight_moments(exact, mode)
    for dtype, rtol in ((torch.float32, 2e-5), (torch.float16, 1e-3)):
        for found, moment in zip(kernels().moments(here, mode, dtype), expected, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.cpu().double(), moment, rtol=rtol, atol=1e-6)
    generator = torch.Generator().manual_seed(num_levels)
    upstream = [torch.randn(7, 129, generator=generator) for _ in range(2)]
    grad = kernels().Moments(*(grad.to(device) for grad in upstream))
    gradients = kernels().moments_backward(grad, here, mode)
    expected = moment_product.weight_moments_backward(*(grad.double() for grad in upstream), exact, mode)
    for found, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), gradient, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_is_no_number_gives_moments_that_are_none(mode: str, device: str) -> None:
    case = make_case(LinearShape(1, 3, 5), 3, "tensor")
    weight, log_sigma2 = case.weight.clone(), case.log_sigma2.clone()
    weight[1, 2] = log_sigma2[0, 4] = torch.nan
    posterior = Posterior(*(tensor.to(device) for tensor in (weight, log_sigma2, case.levels, case.thresholds)))
    mean, variance = kernels().moments(posterior, mode, torch.float32)
    lost = mean.isnan() | variance.isnan()
    expected = log_sigma2.isnan() if mode == "straight_through" else weight.isnan() | log_sigma2.isnan()
    assert torch.equal(lost.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 5), (5,), (2, 3, 5, 7), (2, 6, 8, 8), (3, 40, 1, 2)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slope_order", ORDERS)
def test_noise_counts_outputs_in_row_major_order(
    slope_order: str, order: str, shape: tuple[int, ...], device: str
) -> None:
    if len(shape) != 4 and "channels_last" in (order, slope_order):
        pytest.skip("no image")
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    variance.view(-1)[0], variance.view(-1)[1] = 0.0, -1e-9  # rounding can make it negative
    noise = normal(torch.tensor(SEED), OFFSET, shape, mean.device, mean.dtype)
    variance_of_y = variance.clamp(min=0.0)
    here = [tensor.to(device).contiguous(memory_format=ORDERS[order]) for tensor in (mean, variance)]

    y = torch.empty_like(here[0])
    kernels("noise").noisy(*here, NOISE, y, None)
    torch.testing.assert_close(y.cpu(), mean + variance_of_y.sqrt() * noise, rtol=1e-5, atol=1e-5)

    slope = torch.empty_like(here[1])
    kernels("noise").noisy(None, here[1], NOISE, None, slope)
    torch.testing.assert_close(slope.cpu(), moment_product.slope_of(variance_of_y, noise), rtol=1e-5, atol=1e-5)

    coarse = torch.empty_like(here[1], dtype=torch.bfloat16).contiguous(memory_format=ORDERS[slope_order])
    kernels("noise").noisy(*here, NOISE, y, coarse)
    torch.testing.assert_close(y.cpu(), mean + variance_of_y.sqrt() * noise, rtol=2.0**-7, atol=2.0**-7)
    assert not torch.equal(y.cpu(), mean + variance_of_y.sqrt() * noise)
    torch.testing.assert_close(coarse.cpu().float(), slope.cpu(), rtol=2.0**-6, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (3, 5, 7, 3)], ids=str)
def test_noise_does_not_depend_on_blocks(
    shape: tuple[int, ...], order: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros, ones = (
        make(shape, device=device).contiguous(memory_format=ORDERS[order]) for make in (torch.zeros, torch.ones)
    )
    results = []
    for elements in (1024, 64, 4096):
        monkeypatch.setattr(kernels("noise"), "MATRIX_BLOCK", elements)
        results.append(torch.empty_like(zeros))
        kernels("noise").noisy(zeros, ones, NOISE, results[-1], None)
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@pytest.mark.parametrize("device", DEVICES)
def test_noise_of_outputs_in_parts(device: str) -> None:
    mean, variance = torch.randn(3, 4, 7, device=device), torch.rand(3, 4, 7, device=device)
    y, expected, bias = torch.empty(4, 7, device=device), torch.empty(4, 7, device=device), torch.randn(7).to(device)
    kernels("noise").noisy(mean, variance, NOISE, y, None, bias)
    kernels("noise").noisy(mean.sum(0) + bias, variance.sum(0), NOISE, expected, None)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
