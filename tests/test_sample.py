"""sample: quantized networks out of the posterior, and predictions by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import BayesConv2d, BayesLinear, predict, sample
from bqnn.bayes.layers import bayes_layers
from tests.support.odd_nets import TiedRows

X = torch.randn(9, 2, 6, 6, generator=torch.Generator().manual_seed(1))
BATCHES = [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


def make_net(dtype: torch.dtype = torch.float32, deviation: float = 0.4, **options: Any) -> nn.Sequential:
    """A network whose posterior deviations are ``deviation`` gaps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        BayesConv2d(2, 5, 3, **options), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), BayesLinear(80, 4, **options)
    ).to(dtype)
    for layer in bayes_layers(net).values():
        layer.start_sigma = deviation
        layer.reset_variances_()
    return net.eval()


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("estimator", ["moment", "sample", "local"])
def test_a_sample_is_a_quantized_network(estimator: str, granularity: str, partition: str) -> None:
    net = make_net(estimator=estimator, granularity=granularity, partition=partition).train()
    before = state(net)
    found = sample(net, seed=3)
    assert net.training and not any(module.training for module in found.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    for name, layer in bayes_layers(found).items():
        original = bayes_layers(net)[name]
        assert layer.estimator == "deterministic" and original.estimator == estimator
        assert torch.equal(layer.mean, layer.quantized_weight()), "a mean is not at its level"
        changed = (layer.codes() != original.codes()).float().mean().item()
        assert 0.02 < changed < 0.6
    again, other = sample(net, seed=3), sample(net, seed=4)
    assert torch.equal(found(X), again(X)) and not torch.equal(found(X), other(X))


def test_codes_have_the_chances_of_the_posterior() -> None:
    torch.manual_seed(0)
    layer = BayesLinear(200, 200, num_levels=4)
    with torch.no_grad():
        layer.mean.fill_(0.3 * layer.levels[0, 1] + 0.7 * layer.levels[0, 2])
        layer.log_sigma2.fill_(2.0 * math.log(0.5 * (layer.levels[0, 2] - layer.levels[0, 1]).item()))
    codes = bayes_layers(sample(nn.Sequential(layer), seed=5))["0"].codes()
    sigma = (0.5 * layer.log_sigma2[0, 0].double()).exp()
    z = (layer.thresholds[0].double() - layer.mean[0, 0].double()) / sigma
    below = torch.cat([torch.zeros(1), torch.special.ndtr(z), torch.ones(1)])
    chances = below.diff()
    frequencies = torch.bincount(codes.flatten().long(), minlength=4) / codes.numel()
    deviation = (chances * (1.0 - chances) / codes.numel()).sqrt()
    assert ((frequencies - chances).abs() < 5.0 * deviation + 1e-6).all(), (frequencies, chances)


def test_layers_have_noise_of_their_own() -> None:
    torch.manual_seed(0)
    twins = nn.Sequential(BayesLinear(40, 40, bias=False), BayesLinear(40, 40, bias=False))
    twins[1].load_state_dict(twins[0].state_dict())
    for layer in twins:
        layer.start_sigma = 0.4
        layer.reset_variances_()
    found = sample(twins, seed=0)
    assert not torch.equal(found[0].codes(), found[1].codes())


def test_seeds_come_from_torchs_generator() -> None:
    net = make_net()
    torch.manual_seed(7)
    first, second = sample(net)(X), sample(net)(X)
    torch.manual_seed(7)
    assert torch.equal(sample(net)(X), first) and not torch.equal(first, second)


@pytest.mark.parametrize("estimator", ["moment", "sample", "local"])
def test_predict_averages_samples(estimator: str) -> None:
    net = make_net(estimator=estimator).train()
    before = state(net)
    found = predict(net, X, samples=5, seed=11)
    with torch.no_grad():
        draws = torch.stack([sample(net, seed=11 + k)(X).softmax(-1) for k in range(5)])
    assert torch.equal(found.probs, draws.double().mean(0).float())
    assert (found.mutual_information > 1e-3).all()
    assert net.training and all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(layer.drawn is None for layer in bayes_layers(net).values())


def test_a_convolution_has_one_weight_for_all_places() -> None:
    net = nn.Sequential(make_net()[0])
    y = sample(net, seed=0)(torch.ones(1, 2, 6, 6))
    assert torch.equal(y, y[..., :1, :1].expand_as(y))
    assert not torch.equal(y, net(torch.ones(1, 2, 6, 6))), "the sample is the network itself"


def test_batchnorm_is_that_of_the_sample() -> None:
    net = make_net()
    before = state(net)
    found = sample(net, seed=2, batches=iter(BATCHES))
    activations = torch.cat([found[0](x) for x in BATCHES])
    torch.testing.assert_close(found[1].running_mean, activations.mean((0, 2, 3)))
    torch.testing.assert_close(found[1].running_var, activations.transpose(0, 1).flatten(1).var(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        draws = torch.stack([sample(net, seed=k, batches=BATCHES)(X).softmax(-1) for k in (2, 3)])
    assert torch.equal(predict(net, X, samples=2, seed=2, batches=iter(BATCHES)).probs, draws.double().mean(0).float())
    assert not torch.equal(predict(net, X, samples=2, seed=2).probs, draws.double().mean(0).float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_sample_is_packed() -> None:
    found = sample(make_net(), seed=6)
    packed = bqnn.pack(found)
    for name, layer in bayes_layers(found).items():
        assert torch.equal(packed.get_submodule(name).decode(), layer.quantized_weight())
    torch.testing.assert_close(packed(X), found(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_the_codes_of_its_numbers_in_float32(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    found = sample(net, seed=1)
    wide = make_net(dtype).float()
    for name, layer in bayes_layers(sample(wide, seed=1)).items():
        assert torch.equal(bayes_layers(found)[name].codes(), layer.codes())
    prediction = predict(net, X.to(dtype), samples=3, seed=1)
    assert prediction.probs.dtype == torch.float32
    assert (prediction.probs.sum(-1) - 1.0).abs().max() < 1e-6


def test_tied_layers_share_their_codes_and_readers_see_them() -> None:
    torch.manual_seed(0)
    net = bqnn.convert(TiedRows(), 3, start_sigma=0.4).eval()
    x = torch.arange(30)
    found = sample(net, seed=0)
    weight = found.head.quantized_weight()
    assert not torch.equal(weight, net.head.quantized_weight())
    torch.testing.assert_close(found(x), weight @ weight.T)
    draws = torch.stack([sample(net, seed=k)(x).softmax(-1) for k in range(2)])
    torch.testing.assert_close(predict(net, x, samples=2, seed=0).probs, draws.mean(0))


def test_a_deterministic_layer_keeps_its_codes() -> None:
    net = make_net()
    net[0].estimator = "deterministic"
    found = sample(net, seed=0)
    assert torch.equal(found[0].codes(), net[0].codes()) and not torch.equal(found[4].codes(), net[4].codes())


@pytest.mark.parametrize("ask", [sample, lambda net, **options: predict(net, X, samples=2, **options)])
def test_bad_input(ask: Any) -> None:
    with pytest.raises(ValueError, match="net has no Bayes layer with a posterior"):
        ask(nn.Linear(3, 2))
    with pytest.raises(TypeError, match="net must be an nn.Module"):
        ask(None)
    with pytest.raises(ValueError, match="seed must be from 0 to .*got -1"):
        ask(make_net(), seed=-1)
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        ask(make_net(), seed=1.5)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        ask(make_net(), batches=[])
    net = make_net()
    with torch.no_grad():
        net[4].mean[0, 0] = math.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        ask(net)
