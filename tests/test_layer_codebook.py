"""The codebook of a layer whose weights are of an odd size, hardly any different, all the same or mostly zero."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bqnn
from bqnn import BayesConv2d, BayesLinear
from tests.support.shapes import GRANULARITIES, SOME_M

ESTIMATORS = {
    "moment": {"estimator": "moment"},
    "moment-gaussian": {"estimator": "moment", "prior": "gaussian"},
    "sample": {"estimator": "sample"},
    "local": {"estimator": "local"},
    "local-quantized": {"estimator": "local", "quantize_mean": True},
    "deterministic": {"estimator": "deterministic"},
}


def layer_of(weight: Tensor, num_levels: int, **options: Any) -> BayesLinear | BayesConv2d:
    """A layer converted from one with this weight, [N, K] or [N, C, H, W], without a bias."""
    channels, inputs = weight.shape[:2]
    kernel = tuple(weight.shape[2:])
    plain = nn.Conv2d(inputs, channels, kernel, bias=False) if kernel else nn.Linear(inputs, channels, bias=False)
    plain = plain.to(weight.dtype)
    plain.weight.data.copy_(weight)
    layer = bqnn.convert(plain, num_levels, **options)
    assert isinstance(layer, (BayesLinear, BayesConv2d))
    return layer


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("exponent", [-30, -10, 4, 10, 30])
def test_weights_of_any_size(exponent: int, num_levels: int, granularity: str, partition: str) -> None:
    options = {"granularity": granularity, "partition": partition}
    size, weight = 2.0 ** round(exponent / math.log10(2.0)), random_weight(7, 33)
    layer, ordinary = layer_of(size * weight, num_levels, **options), layer_of(weight, num_levels, **options)
    assert torch.equal(layer.levels, size * ordinary.levels)
    assert torch.equal(layer.codes(), ordinary.codes())
    torch.testing.assert_close(layer.log_sigma2, ordinary.log_sigma2 + 2.0 * math.log(size), rtol=1e-5, atol=1e-4)
    x = random_weight(5, 33, seed=1)
    exact = size * F.linear(x, ordinary.quantized_weight())
    torch.testing.assert_close(layer.eval()(x), exact, rtol=1e-5, atol=1e-5 * size)
    torch.testing.assert_close(bqnn.pack(layer)(x), exact, rtol=1e-5, atol=1e-5 * size)
    loss, expected = (bqnn.report(each).layers[0].quantization_loss for each in (layer, ordinary))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(layer.prior_sigma2.item()) and layer.prior_sigma2.item() > 0.0


@pytest.mark.parametrize("exponent", [-10, 4, 10])
@pytest.mark.parametrize("estimator", ["moment", "moment-gaussian", "sample", "local"])
def test_training_goes_with_the_size_of_the_weights(estimator: str, exponent: int) -> None:
    size, weight = 2.0 ** round(exponent / math.log10(2.0)), random_weight(7, 33)
    outputs, gradients = [], []
    for scale in (1.0, size):
        layer = layer_of(scale * weight, 4, **ESTIMATORS[estimator])
        torch.manual_seed(2)
        outputs.append(layer(random_weight(5, 33, seed=1)) / scale)
        layer.kl_divergence().backward()
        gradients.append(layer.mean.grad * scale)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())


@pytest.mark.parametrize("log_sigma2", [-70.0, 70.0])
def test_the_range_of_log_sigma2_goes_with_the_size_of_the_weights(log_sigma2: float) -> None:
    size = math.exp(0.5 * log_sigma2)
    layer = layer_of(size * random_weight(7, 33), 4)
    with torch.no_grad():
        layer.log_sigma2[0, 0] = log_sigma2
    layer.check_parameters()
    with torch.no_grad():
        layer.log_sigma2[0, 0] = log_sigma2 + math.copysign(40.0, log_sigma2)
    with pytest.raises(ValueError, match="log_sigma2 must be from"):
        layer.check_parameters()


@pytest.mark.parametrize("num_levels", [4, 5, 16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(7, 33), (6, 4, 3, 2)], ids=["linear", "conv2d"])
def test_few_values_are_kept_and_spare_levels_are_dead(
    shape: tuple[int, ...], granularity: str, num_levels: int
) -> None:
    values = torch.tensor([-0.3, 0.0, 0.2])
    weight = values[torch.arange(math.prod(shape)).view(shape) % 3]
    layer = layer_of(weight, num_levels, granularity=granularity)
    torch.testing.assert_close(layer.quantized_weight(), weight, rtol=0.0, atol=1e-7)
    (row,) = bqnn.report(layer).layers
    assert row.dead_levels == layer.levels.shape[0] * (num_levels - 3)
    assert torch.diff(layer.levels, dim=1).min() > 0.8 * 0.5 / num_levels, "spare levels crowd"
    assert layer.levels.min() >= -0.3 - 1e-6 and layer.levels.max() <= 0.2 + 1e-6


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("value", [0.0, 0.11, -1.0])
@pytest.mark.parametrize("noise", [0.0, 1e-6], ids=["same", "rounded"])
def test_a_layer_of_one_value_has_the_levels_of_weights_to_be_expected(
    noise: float, value: float, num_levels: int, granularity: str
) -> None:
    weight = value * (1.0 + noise * random_weight(7, 50))
    layer = layer_of(weight, num_levels, granularity=granularity)
    expected = 0.2  # sqrt(2 / 50)
    torch.testing.assert_close(layer.quantized_weight(), weight, rtol=1e-5, atol=1e-7)
    gap = expected * math.sqrt(12.0) / num_levels
    torch.testing.assert_close(torch.diff(layer.levels, dim=1), torch.full_like(layer.levels[:, 1:], gap))
    sigma = (0.5 * layer.log_sigma2).exp()
    torch.testing.assert_close(sigma, layer.level_scale.expand_as(sigma), rtol=1e-4, atol=0.0)
    assert layer.prior_sigma2.item() == pytest.approx(value**2 + expected**2, rel=1e-4)
    (row,) = bqnn.report(layer).layers
    assert row.dead_levels == layer.levels.shape[0] * (num_levels - 1)
    assert row.quantization_loss < 1e-6


def test_a_constant_of_any_size_has_levels_that_float32_tells_apart() -> None:
    for value in (1e-30, 1e-5, 1e4, -1e10, 1e30):
        layer = layer_of(torch.full((7, 50), value), 16)
        assert (torch.diff(layer.levels, dim=1) > 0.0).all()
        torch.testing.assert_close(layer.quantized_weight(), layer.mean.detach(), rtol=1e-5, atol=1e-7)
        layer.check_parameters()
        assert math.isfinite(layer.prior_sigma2.item())


def test_a_channel_of_one_value_has_the_spread_of_the_others() -> None:
    weight = 0.01 * random_weight(8, 99)
    weight[3] = 0.0
    layer = layer_of(weight, 3, granularity="channel")
    gap = weight.std().item() * math.sqrt(12.0) / 3
    torch.testing.assert_close(layer.levels[3], torch.tensor([-gap, 0.0, gap]), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(layer.quantized_weight()[3], torch.zeros(99), rtol=0.0, atol=1e-8)
    torch.testing.assert_close((0.5 * layer.log_sigma2[3]).exp(), torch.full((99,), 0.1 * gap), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deviation", [0.0, 1e-4, 1e-3, 0.02])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_levels_of_half_precision_weights_are_those_of_float64(
    granularity: str, deviation: float, dtype: torch.dtype
) -> None:
    weight = (deviation * random_weight(8, 64)).to(dtype)
    layer, exact = (layer_of(each, 3, granularity=granularity) for each in (weight, weight.double()))
    assert layer.levels.dtype == dtype and torch.isfinite(layer.levels).all()
    assert (torch.diff(layer.levels, dim=1) > 0.0).all()
    tolerance = 4.0 * torch.finfo(dtype).eps * exact.levels.abs().max().item()
    torch.testing.assert_close(layer.levels.double(), exact.levels.detach(), rtol=0.0, atol=tolerance)
    layer.check_parameters()


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16.0, torch.tensor(data.target)


@lru_cache
def trained_accuracy(estimator: str, start: float | None) -> float:
    """Percent of held-out digits, of two nets whose last layer starts at one value, or at random (None)."""
    images, labels = digits()
    right = []
    for seed in range(2):
        torch.manual_seed(seed)
        net: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        if start is not None:
            nn.init.constant_(net[2].weight, start)
            nn.init.zeros_(net[2].bias)
        net = bqnn.convert(net, 3, **ESTIMATORS[estimator])
        optimizer = torch.optim.AdamW(bqnn.parameter_groups(net, lr=4e-3), lr=4e-3)
        batches = torch.Generator().manual_seed(1)
        for step in range(300):
            batch = torch.randint(1400, (128,), generator=batches)
            loss = bqnn.elbo(net(images[batch]), labels[batch], net, 1400, kl_weight=min(1.0, step / 150)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right.append((net.eval()(images[1400:]).argmax(1) == labels[1400:]).double().mean())
    return 100.0 * torch.stack(right).mean().item()


@pytest.mark.parametrize("start", [0.0, 0.1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_that_starts_at_one_value_learns_as_one_that_starts_at_random(estimator: str, start: float) -> None:
    assert trained_accuracy(estimator, start) > trained_accuracy(estimator, None) - 5.0
