"""refresh_batchnorm: statistics of the network in evaluation mode, of all images together, and nothing else changes."""

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


def pooled(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel of [B, C, ...], in float64."""
    values = hidden.double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


def assert_statistics(norm: nn.Module, hidden: Tensor) -> None:
    for found, expected in zip((norm.running_mean, norm.running_var), pooled(hidden), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_all_images_in_the_quantized_network() -> None:
    net, batches = make_net().train(), make_batches(3)
    net(batches[0])  # leaves statistics of a noisy pass behind
    assert refresh_batchnorm(net, batches) is net
    images = torch.cat(batches)
    with torch.no_grad():
        hidden = net.eval()[0](images)
        assert_statistics(net[1], hidden)
        # The second norm is measured behind the first one's new statistics, and no dropout.
        assert_statistics(net[5], net[1](hidden).relu().flatten(1))


@pytest.mark.parametrize("sizes", [[2, 19], [1, 20], [20, 1], [7, 0, 7, 7], [1] * 20], ids=str)
def test_order_and_cut_of_the_batches_do_not_matter(sizes: list[int]) -> None:
    images = torch.cat(make_batches(3))[: sum(sizes)]
    expected = refresh_batchnorm(make_net(), [images])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    found = refresh_batchnorm(make_net(), images[order].split(sizes))
    for norm in (1, 5):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(found[norm], name), getattr(expected[norm], name))


def test_sequences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4, momentum=None))
    batches = [torch.randn(size, 3, length) * 2 + 1 for size, length in ((4, 9), (1, 5), (2, 30))]
    refresh_batchnorm(net, batches)
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], dim=1)
    assert_statistics(net[0], flat.t())
    hidden = torch.cat([net.eval()[:2](x).detach().transpose(0, 1).flatten(1) for x in batches], dim=1)
    assert_statistics(net[2], hidden.t())


def test_a_far_mean_costs_no_variance() -> None:
    torch.manual_seed(0)
    images = torch.randn(400, 2) * 0.1 + 1000.0
    net = refresh_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), images.split(3), limit=200)
    torch.testing.assert_close(net[0].running_var.double(), pooled(images)[1], rtol=1e-4, atol=0.0)


def test_a_norm_that_is_used_twice_has_the_statistics_of_both_uses() -> None:
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(3, 3), norm, nn.ReLU(), norm)
    images = make_batches(1)[0].mean(3).flatten(0, 1)[:, :3]
    refresh_batchnorm(net, images.split(8))
    with torch.no_grad():
        first = net[0](images)
        alone = nn.BatchNorm1d(3).eval()
        alone.running_mean, alone.running_var = (statistic.float() for statistic in pooled(first))
        assert_statistics(norm, torch.cat([first, alone(first).relu()]))


def test_synchronized_norms_and_norms_that_nothing_reaches() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.SyncBatchNorm(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(input=x)

    net, images = Branches(), torch.cat(make_batches(2))
    net.spare.running_var.fill_(4.0)
    refresh_batchnorm(net, images.split(5))
    assert_statistics(net.used, images)
    assert net.spare.running_var.tolist() == [4.0] * 3 and int(net.spare.num_batches_tracked) == 0


def test_compiled_networks_are_measured() -> None:
    net = make_net()
    expected = refresh_batchnorm(make_net(), make_batches(2))
    refresh_batchnorm(torch.compile(net, backend="eager"), make_batches(2))
    assert torch.equal(net[5].running_var, expected[5].running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Statistics of what the norm gets, of which a sum or a square would be infinite, or of 8 bits."""
    images = (torch.randn(3000, 2, generator=torch.Generator().manual_seed(3)) * 300 + 500).to(dtype)
    norm = refresh_batchnorm(nn.Sequential(nn.BatchNorm1d(2, dtype=torch.float32)), images.split(700))[0]
    torch.testing.assert_close(norm.running_var.double(), pooled(images)[1], rtol=1e-5, atol=0.0)


def test_one_value_has_no_variance() -> None:
    with pytest.raises(ValueError, match="batches must hold at least two values for each channel"):
        refresh_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(1, 2)])


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
