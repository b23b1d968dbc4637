"""predict: probabilities, entropy and mutual information of the posterior."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import BayesLinear, predict, sample


def make_net(estimator: str = "moment") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        BayesLinear(11, 9, estimator=estimator), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 5)
    )
    for layer in bqnn.bayes.layers.bayes_layers(net).values():
        with torch.no_grad():
            layer.log_sigma2.fill_(-3.0)
    return net


X = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))


def entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-30).log()).sum(-1)


@pytest.mark.parametrize("estimator", ["moment", "sample", "local", "deterministic"])
def test_one_sample_is_the_quantized_network(estimator: str) -> None:
    net = make_net(estimator).train()
    found = predict(net, X)
    expected = net.eval()(X).softmax(-1)
    assert torch.equal(found.probs, expected)
    torch.testing.assert_close(found.entropy, entropy(expected))
    assert torch.equal(found.mutual_information, torch.zeros(7))


@pytest.mark.parametrize("estimator", ["moment", "sample", "local"])
def test_samples_are_averaged(estimator: str) -> None:
    net = make_net(estimator).train()
    torch.manual_seed(3)
    found = predict(net, X, samples=6)
    torch.manual_seed(3)
    with torch.no_grad():
        draws = torch.stack([sample(net)(X).softmax(-1) for _ in range(6)])
    assert (draws.std(0) > 0.0).any(), "the samples are all the same"
    torch.testing.assert_close(found.probs, draws.mean(0))
    torch.testing.assert_close(found.entropy, entropy(draws.mean(0)))
    torch.testing.assert_close(found.mutual_information, entropy(draws.mean(0)) - entropy(draws).mean(0))
    assert (found.mutual_information > 0.0).all()
    torch.manual_seed(4)
    assert not torch.equal(predict(net, X, samples=6).probs, found.probs)


def test_certainty_and_ignorance() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.tensor([200.0, 0.0, 0.0, 0.0]), torch.zeros(4)])

    found = predict(Constant(), X[:2])
    assert found.entropy.tolist() == pytest.approx([0.0, math.log(4.0)])
    assert found.probs[1].tolist() == [0.25] * 4


def test_disagreement_alone_is_mutual_information() -> None:
    class Coin(BayesLinear):
        """Sure of a class at every draw, of another one at the next."""

        draws = 0

        def forward(self, x: Tensor) -> Tensor:
            self.draws += 1
            return 500.0 * torch.eye(2)[self.draws % 2].expand(len(x), 2)

    found = predict(Coin(2, 2), X[:3, :2], samples=4)
    assert found.probs.flatten().tolist() == pytest.approx([0.5] * 6)
    assert found.entropy.tolist() == pytest.approx([math.log(2.0)] * 3)
    assert found.mutual_information.tolist() == pytest.approx([math.log(2.0)] * 3)


@pytest.mark.parametrize("samples", [1, 3])
def test_modes_and_statistics_are_as_before(samples: int) -> None:
    net = make_net().train()
    net[3].eval()
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = predict(net, X, samples=samples)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net[0].sampling
    assert not found.probs.requires_grad
    with pytest.raises(ValueError, match="x must have the shape"):
        predict(net, X[:, :3], samples=samples)
    assert [module.training for module in net.modules()] == modes
    assert not net[0].sampling


@pytest.mark.parametrize("samples", [1, 3])
def test_empty_batch(samples: int) -> None:
    found = predict(make_net(), X[:0], samples=samples)
    assert found.probs.shape == (0, 5)
    assert found.entropy.shape == found.mutual_information.shape == (0,)


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_below_one(samples: int) -> None:
    with pytest.raises(ValueError, match=f"samples must be at least 1, got {samples}"):
        predict(make_net(), X, samples=samples)


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(nn.Linear(11, 3), id="full-precision"),
        pytest.param(make_net("deterministic"), id="deterministic"),
    ],
)
def test_samples_of_a_network_without_posterior(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="net has no Bayes layer with a posterior to draw 2 samples"):
        predict(net, X, samples=2)
    assert predict(net, X).probs.shape[0] == 7


@pytest.mark.parametrize("noise", [None, 0.25, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])], ids=["none", "one", "each"])
def test_regression(noise: float | Tensor | None) -> None:
    net = make_net().train()
    found = predict(net, X, 6, task="regression", noise_variance=noise, seed=3)
    with torch.no_grad():
        draws = torch.stack([sample(net, 3 + k)(X).double() for k in range(6)])
    variance = draws.var(0, correction=0)
    assert (variance > 0.0).any()
    torch.testing.assert_close(found.mean.double(), draws.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.epistemic.double(), variance.sqrt(), rtol=1e-5, atol=1e-7)
    total = (variance + (0.0 if noise is None else noise)).sqrt()
    torch.testing.assert_close(found.deviation.double(), total, rtol=1e-5, atol=1e-7)
    assert not found.mean.requires_grad


def test_regression_of_one_network() -> None:
    net = make_net()
    found = predict(net, X, task="regression", noise_variance=4.0)
    assert torch.equal(found.mean, net.eval()(X))
    assert torch.equal(found.epistemic, torch.zeros(7, 5))
    assert torch.equal(found.deviation, torch.full((7, 5), 2.0))
    both = predict(bqnn.Ensemble([net, nn.Linear(11, 5)]), X, task="regression")
    assert torch.equal(both.deviation, both.epistemic) and (both.epistemic > 0.0).all()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"task": "ranking"}, "task must be one of classification, regression, got 'ranking'"),
        ({"noise_variance": 1.0}, 'noise_variance must be None but for task="regression", got 1.0'),
        ({"task": "regression", "noise_variance": -1.0}, "noise_variance must be at least 0, got -1.0"),
        ({"task": "regression", "noise_variance": float("nan")}, "noise_variance must be at least 0, got nan"),
        ({"task": "regression", "noise_variance": torch.ones(4)}, r"must go with the output \[7, 5\], got \[4\]"),
    ],
)
def test_arguments_of_a_task(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        predict(make_net(), X, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("samples", [1, 3])
def test_one_logit_is_no_classification(samples: int) -> None:
    net = BayesLinear(11, 1)
    with pytest.raises(ValueError, match=r'two classes or more, got the shape \[7, 1\]; task="regression"'):
        predict(net, X, samples)
    assert predict(net, X, samples, task="regression").mean.shape == (7, 1)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = BayesLinear(11, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.layer(x) + shift


@pytest.mark.parametrize("samples", [1, 3])
def test_inputs_by_position_and_by_name(samples: int) -> None:
    net, shift = Sum(), torch.arange(3.0)
    by_position = predict(net, (X, shift), samples, seed=0)
    assert torch.equal(by_position.probs, predict(net, {"x": X, "shift": shift}, samples, seed=0).probs)
    if samples == 1:
        assert torch.equal(by_position.probs, net.eval()(X, shift).softmax(-1))
