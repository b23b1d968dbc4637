"""fit: any network and any batches, trained in three phases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import bqnn
from bqnn.bayes.layers import bayes_layers

EPOCHS = (1, 1, 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = draw(48, 6)
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]


def make_net(*, norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    between: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *between, nn.ReLU(), nn.Linear(8, 4))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_network_is_trained_in_three_phases() -> None:
    net, lines = make_net(norm=True), []
    before = state(net)
    result = bqnn.fit(net, BATCHES, validation=BATCHES, epochs=(2, 1, 2), log=lines.append)
    assert same(state(net), before), "the network that was given is as it was"
    assert all(parameter.grad is None for parameter in result.net.parameters())
    assert len(bayes_layers(result.net)) == 2 and not result.net.training and result.noise_variance is None
    assert {layer.estimator for layer in bayes_layers(result.net).values()} == {"moment"}
    assert [r["phase"] for r in result.history] == ["full precision"] * 2 + ["deterministic"] + ["bayes"] * 2
    assert [r["epoch"] for r in result.history] == [1, 2, 3, 4, 5]
    assert [r["kl"] > 0 for r in result.history] == [False] * 3 + [True] * 2
    last = result.history[-1]
    logits = result.net(X)
    assert last["validation_nll"] == pytest.approx(F.cross_entropy(logits, Y).item())
    assert last["validation_error"] == pytest.approx(100 * (logits.argmax(1) != Y).float().mean().item())
    assert last["loss"] == pytest.approx(last["nll"] + last["kl"] / 48), "the whole divergence after the warm-up"
    assert len(lines) == 5 and "kl" not in lines[2] and "nats" in lines[3] and "error" in lines[0]
    assert bqnn.pack(result.net)(X).shape == (48, 4)


def test_statistics_are_those_of_the_quantized_network() -> None:
    result = bqnn.fit(make_net(norm=True), BATCHES, epochs=(1, 1, 1))
    hidden = result.net[0](X)
    torch.testing.assert_close(result.net[1].running_mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.net[1].running_var, hidden.var(0), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, list[tuple[Tensor, Tensor]]]:
    data = load_digits()
    x, y = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return TensorDataset(x[:1400], y[:1400]), [(x[1400:], y[1400:])]


def by_hand(net: nn.Module, batches: DataLoader[Any]) -> nn.Module:
    """The three phases as README's parts of a loop of one's own, with the defaults of 20 epochs."""
    lrs, betas = (4e-3, 3e-3, 5e-3), ((0.9, 0.999), (0.9, 0.999), (0.9, 0.99))
    for phase, epochs in enumerate((6, 10, 4)):
        if phase == 1:
            net = bqnn.convert(net, 3)
        for layer in bayes_layers(net).values():
            layer.estimator = "deterministic" if phase == 1 else "moment"
            layer.reset_variances_()
        groups = bqnn.parameter_groups(net, lrs[phase])
        optimizer = torch.optim.AdamW(groups, betas=betas[phase], fused=True)
        steps = epochs * len(batches)
        highest = [group["lr"] for group in groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, steps, pct_start=0.1, cycle_momentum=False)
        for step in range(steps):
            if step % len(batches) == 0:
                left = iter(batches)
            x, y = next(left)
            output = net.train()(x)
            if phase:
                weight = bqnn.kl_warmup(step / len(batches), 1.0)
                loss = bqnn.elbo(output, y, net, 1400, weight).loss
            else:
                loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def test_digits_to_the_bits_of_three_phases_by_hand(digits: tuple[TensorDataset, list[tuple[Tensor, Tensor]]]) -> None:
    train, validation = digits
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    loader = DataLoader(train, 64, shuffle=True)
    result = bqnn.fit(net, loader, validation=validation, seed=1)
    ((x, y),) = validation
    error = 100 * (result.net(x).argmax(1) != y).float().mean().item()
    torch.manual_seed(1)
    assert same(state(result.net), state(by_hand(net, loader)))
    assert result.history[-1]["validation_error"] == pytest.approx(error)
    assert error < 8.0


def test_regression_finds_the_function_and_its_noise() -> None:
    x = draw(600, 2, seed=1)
    function = torch.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
    y = function + torch.tensor([0.1, 0.4]) * draw(600, 2, seed=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    loader = DataLoader(TensorDataset(x[:400], y[:400]), 32, shuffle=True)
    held = [(x[400:], y[400:])]
    result = bqnn.fit(net, loader, validation=held, task="regression", num_levels=16, epochs=40, seed=0)
    rmse = (result.net(x[400:]) - y[400:]).square().mean().sqrt().item()
    assert result.history[-1]["validation_rmse"] == pytest.approx(rmse, rel=1e-5)
    variance = (result.net(x[400:]) - y[400:]).square().mean(0)
    assert result.noise_variance is not None
    torch.testing.assert_close(result.noise_variance, variance.detach(), rtol=1e-4, atol=1e-6)
    assert 0.09 < variance[0].sqrt() < 0.16 and 0.35 < variance[1].sqrt() < 0.46
    found = bqnn.predict(result.net, x[400:], 4, task="regression", noise_variance=result.noise_variance)
    normalised = ((y[400:] - found.mean) / found.deviation).square().mean().item()
    assert normalised == pytest.approx(1.0, abs=0.1)


def test_noise_without_validation_is_that_of_training() -> None:
    batches = [(x, x[:, :1] + 0.5 * draw(16, 1, seed=i)) for i, (x, _) in enumerate(BATCHES)]
    result = bqnn.fit(nn.Linear(6, 1), batches, task="regression", epochs=(30, 10, 10), num_levels=16)
    assert result.noise_variance is not None and result.noise_variance.shape == (1,)
    assert result.noise_variance.sqrt().item() == pytest.approx(result.history[-1]["rmse"], rel=0.2)
    assert result.history[-1]["validation_rmse"] is None


@pytest.mark.parametrize("estimator", ["moment", "sample", "local", "deterministic"])
def test_the_same_seed_gives_the_same_bits(estimator: str) -> None:
    loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True)
    options: dict[str, Any] = {"epochs": (1, 1, 2), "estimator": estimator}
    runs = [bqnn.fit(make_net(norm=True), loader, seed=seed, **options) for seed in (7, 7, 8)]
    assert same(state(runs[0].net), state(runs[1].net))
    assert not same(state(runs[0].net), state(runs[2].net))


def test_the_state_of_generators_is_as_before() -> None:
    net = make_net()
    before = torch.get_rng_state()
    bqnn.fit(net, BATCHES, seed=7, epochs=EPOCHS)
    assert torch.equal(torch.get_rng_state(), before)
    bqnn.fit(net, BATCHES, epochs=EPOCHS)
    assert not torch.equal(torch.get_rng_state(), before)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(10, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.second(torch.cat([self.norm(self.first(left)).relu(), right], 1))


def test_inputs_by_position_and_by_name() -> None:
    by_position = [((x[:, :4], x[:, 4:]), y) for x, y in BATCHES]
    by_name = [[{"right": x[:, 4:], "left": x[:, :4]}, y] for x, y in BATCHES]
    results = [bqnn.fit(TwoInputs(), each, validation=each, seed=0, epochs=EPOCHS) for each in (by_position, by_name)]
    assert same(*(state(each.net) for each in results))
    first, second = (each.history[-1]["validation_nll"] for each in results)
    assert first == second


class Odd(nn.Module):
    """A layer that is used twice, two with one weight, a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, (1, 2), groups=2)
        self.twice, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x.view(-1, 2, 1, 3)).flatten(1).relu()
        return self.last(self.second(self.first(self.twice(self.twice(hidden).relu())).relu()))


@pytest.mark.parametrize("prior", ["spike_slab", "mixture", "gaussian"])
def test_odd_networks(prior: str) -> None:
    options: dict[str, Any] = {"granularity": "channel", "partition": "learned", "prior": prior}
    result = bqnn.fit(Odd(), BATCHES, validation=BATCHES, epochs=(1, 2, 3), num_levels=2, **options)
    assert result.net.second.mean is result.net.first.mean
    assert all(layer.granularity == "channel" for layer in bayes_layers(result.net).values())
    torch.testing.assert_close(bqnn.pack(result.net)(X), result.net(X), rtol=1e-4, atol=1e-5)


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y)


class Growing:
    """An iterable with a batch more each time, of which the first decides."""

    times = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.times += 1
        return iter((BATCHES * 9)[: self.times])


@pytest.mark.parametrize(
    "data", [pytest.param(DataLoader(Stream(), 16), id="stream"), pytest.param(BATCHES, id="list")]
)
def test_data_without_a_size_is_counted(data: Any) -> None:
    counted = bqnn.fit(make_net(), data, seed=0, epochs=(1, 1, 2))
    known = bqnn.fit(make_net(), data, seed=0, epochs=(1, 1, 2), dataset_size=48)
    last = counted.history[-1]
    assert last["loss"] == pytest.approx(last["nll"] + last["kl"] / 48)
    assert same(state(counted.net), state(known.net))


def test_an_epoch_has_as_many_batches_as_were_counted() -> None:
    result = bqnn.fit(make_net(), Growing(), epochs=(2, 2, 2), dataset_size=100)
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["nll"] + last["kl"] / 100)


def test_a_part_of_a_data_set_has_its_own_size() -> None:
    loader = DataLoader(TensorDataset(X, Y), 8, sampler=SubsetRandomSampler(range(24)))
    last = bqnn.fit(make_net(), loader, epochs=(0, 0, 2)).history[-1]
    assert last["loss"] == pytest.approx(last["nll"] + last["kl"] / 24)


def test_a_trained_network_begins_with_the_second_phase() -> None:
    net = bqnn.fit(make_net(), BATCHES, epochs=(0, 1, 1))
    assert [r["phase"] for r in net.history] == ["deterministic", "bayes"]


def test_phases_with_no_epochs_give_the_quantized_network() -> None:
    result = bqnn.fit(make_net(norm=True), BATCHES, validation=BATCHES, epochs=(1, 0, 0), num_levels=4)
    assert [layer.num_levels for layer in bayes_layers(result.net).values()] == [4, 4]
    torch.testing.assert_close(result.net[1].running_mean, result.net[0](X).mean(0), rtol=1e-5, atol=1e-6)


def test_a_posterior_is_trained_on() -> None:
    net = bqnn.convert(make_net(), 5, estimator="sample", prior="gaussian")
    with torch.no_grad():
        for layer in bayes_layers(net).values():
            layer.log_sigma2.fill_(-3.0)
    result = bqnn.fit(net, BATCHES, epochs=(0, 0, 1), bayes_lr=1e-6)
    for layer in bayes_layers(result.net).values():
        torch.testing.assert_close(layer.log_sigma2, torch.full_like(layer.log_sigma2, -3.0), rtol=0, atol=1e-3)
        assert (layer.num_levels, layer.estimator, layer.prior) == (5, "sample", "gaussian")


def test_a_converted_network_has_its_own_estimators() -> None:
    net = bqnn.convert(make_net(), overrides={"2": {"estimator": "deterministic"}})
    result = bqnn.fit(net, BATCHES, epochs=7)
    assert [r["phase"] for r in result.history] == ["deterministic"] * 5 + ["bayes"] * 2
    assert [layer.estimator for layer in bayes_layers(result.net).values()] == ["moment", "deterministic"]


@pytest.mark.parametrize("prior", ["spike_slab", "mixture"])
def test_frozen_layers_stay_as_they_are(prior: str) -> None:
    net = make_net()
    with torch.no_grad():
        net[0].weight[0, 0] = 9.0  # beyond where means under the mixture are bounded
    net[0].requires_grad_(False)
    result = bqnn.fit(net, BATCHES, epochs=(1, 1, 2), weight_decay=0.1, prior=prior)
    assert torch.equal(result.net[0].mean, net[0].weight) and torch.equal(result.net[0].bias, net[0].bias)
    assert not torch.equal(result.net[2].mean, net[2].weight)


def test_means_under_the_mixture_are_bounded() -> None:
    result = bqnn.fit(make_net(), BATCHES, epochs=(0, 1, 5), prior="mixture", bayes_lr=1.0)
    for layer in bayes_layers(result.net).values():
        levels = layer.levels.detach()
        gap = levels.diff(dim=1).amin()
        assert levels[0, 0] - gap - 1e-5 <= layer.mean.min() and layer.mean.max() <= levels[0, -1] + gap + 1e-5


@pytest.mark.parametrize(
    ("epochs", "name"), [((1, 0, 0), "lr"), ((0, 1, 0), "deterministic_lr"), ((0, 0, 1), "bayes_lr")]
)
def test_a_loss_that_is_not_finite_raises(epochs: tuple[int, int, int], name: str) -> None:
    batches = [(X, Y), (X * math.inf, Y)]
    with pytest.raises(FloatingPointError, match=f"the loss of epoch 1 is nan; a smaller {name} "):
        bqnn.fit(make_net(), batches, epochs=epochs)


def test_gradients_are_shortened_on_request() -> None:
    options: dict[str, Any] = {"epochs": (2, 0, 0), "seed": 0}
    runs = [bqnn.fit(make_net(), BATCHES, max_grad_norm=norm, **options) for norm in (None, 1e6, 1e-9)]
    assert same(state(runs[0].net), state(runs[1].net))
    assert not same(state(runs[0].net), state(runs[2].net))


def test_autocast_holds_for_training_alone() -> None:
    dtypes = []
    net = make_net()
    net[1].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    result = bqnn.fit(net, BATCHES, validation=BATCHES, epochs=(1, 1, 1), autocast=torch.bfloat16)
    assert dtypes == ([torch.bfloat16] * 3 + [torch.float32] * 3) * 3
    assert result.net[0].mean.dtype == torch.float32


def test_data_that_ends_after_an_epoch() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = [*BATCHES]

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop()

    with pytest.raises(ValueError, match="train must yield batches in every epoch, got none in epoch 2"):
        bqnn.fit(make_net(), Once(), epochs=(2, 1, 1), dataset_size=48)
