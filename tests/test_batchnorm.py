"""refresh_batchnorm: statistics of the network in evaluation mode, as plain averages, and everything else untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import BayesConv2d, refresh_batchnorm


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        BayesConv2d(3, 5, 3, estimator="sample"),
        nn.BatchNorm2d(5, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.BatchNorm1d(45),
    )


def make_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 3, 5, 5, generator=generator) * (i + 1) for i in range(count)]


def test_statistics_are_averages_over_the_batches_of_the_quantized_network() -> None:
    net, batches = make_net().train(), make_batches(3)
    net(batches[0])  # leaves statistics of a noisy pass behind
    assert refresh_batchnorm(net, batches) is net
    hidden = [net[0].eval()(x).detach() for x in batches]
    for statistic, expected in (
        (net[1].running_mean, torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)),
        (net[1].running_var, torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in hidden]).mean(0)),
    ):
        torch.testing.assert_close(statistic, expected)
    # The second norm sees what the first makes of a batch with that batch's own statistics, and no dropout.
    norm = nn.BatchNorm2d(5)
    flat = [norm(h).relu().flatten(1) for h in hidden]
    torch.testing.assert_close(net[5].running_mean, torch.stack([f.mean(0) for f in flat]).mean(0))


def test_the_rest_of_the_network_is_as_before() -> None:
    net = make_net().train()
    net[3].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    refresh_batchnorm(net, make_batches(2))
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.3 and net[5].momentum == 0.1
    for name, tensor in net.state_dict().items():
        running = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, before[name]) != running, name
    assert all(parameter.grad is None for parameter in net.parameters())


def test_no_more_batches_are_taken_than_the_limit() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for x in make_batches(9):
            taken.append(x)
            yield x

    net = make_net()
    refresh_batchnorm(net, batches(), limit=4)
    assert int(net[1].num_batches_tracked) == 4
    assert len(taken) <= 5
    other = make_net()
    refresh_batchnorm(other, make_batches(4))
    assert torch.equal(net[1].running_var, other[1].running_var)


def test_twenty_batches_are_the_default_limit() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    refresh_batchnorm(net, (torch.randn(3, 2) for _ in range(30)))
    assert int(net[0].num_batches_tracked) == 20


def test_without_a_norm_there_is_nothing_to_do() -> None:
    net = bqnn.convert(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    assert refresh_batchnorm(net, []) is net


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 1)]], ids=["none", "wrong-shape"])
def test_a_failure_leaves_statistics_modes_and_momenta(batches: list[Tensor]) -> None:
    net = make_net().train()
    refresh_batchnorm(net, make_batches(1))
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    with pytest.raises(ValueError, match="batches must hold at least one batch|x must have the shape"):
        refresh_batchnorm(net, batches)
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.3 and net[5].momentum == 0.1
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
