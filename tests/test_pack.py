"""pack: what is replaced, what stays, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.check import PRECISIONS
from bqnn.engine.pack import pack
from bqnn.models import lenet5
from bqnn.packed.convolutions import PackedConv2d
from bqnn.packed.layers import PackedLinear


class Shared(nn.Module):
    """One layer under two names and in a list that is no module; another layer nested."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.nested = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(6, 4), nn.ReLU())})
        self.again = self.first
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.nested["inner"](self.again(self.first(x)))


def bayes(net: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return bqnn.convert(net, **options)


@pytest.mark.parametrize("execution", ["auto", "packed", "dense"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_network_gives_the_quantized_output(granularity: str, execution: str) -> None:
    net = bqnn.convert(lenet5(), num_levels=4, granularity=granularity)
    packed = pack(net, execution=execution)
    assert net.training
    assert not any(module.training for module in packed.modules())
    kinds = {name: type(module) for name, module in packed.named_children() if name.startswith(("conv", "fc"))}
    assert kinds == {"conv1": PackedConv2d, "conv2": PackedConv2d} | dict.fromkeys(("fc1", "fc2", "fc3"), PackedLinear)
    assert packed.factory == net.factory
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), net.eval()(x), rtol=1e-5, atol=1e-5)


def test_original_is_untouched() -> None:
    net = bayes(Shared())
    before = copy.deepcopy(net.state_dict())
    packed = pack(net)
    with torch.no_grad():
        packed.scale.fill_(7.0)
        packed.nested["inner"][0].bias.fill_(7.0)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(net.first, bqnn.BayesLinear)


def test_shared_and_nested_layers() -> None:
    net = bayes(Shared())
    packed = pack(net)
    assert packed.first is packed.again
    assert isinstance(packed.first, PackedLinear)
    assert isinstance(packed.nested["inner"][0], PackedLinear)
    x = torch.randn(5, 6)
    torch.testing.assert_close(packed(x), net.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_reaches_every_layer(precision: str) -> None:
    packed = pack(bayes(Shared()), precision=precision)
    assert {module.precision for module in packed.modules() if isinstance(module, PackedLinear)} == {precision}


def test_a_single_layer() -> None:
    layer = bqnn.BayesLinear(5, 3)
    packed = pack(layer)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(packed.decode(), layer.quantized_weight())


def test_what_is_no_bayes_layer_stays() -> None:
    net = bqnn.convert(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), skip=["2"])
    packed = pack(net)
    assert isinstance(packed[0], PackedLinear)
    assert type(packed[2]) is nn.Linear
    assert torch.equal(packed[2].weight, net[2].weight)
    assert packed[2].weight is not net[2].weight


def test_refusals() -> None:
    with pytest.raises(ValueError, match="net must have a Bayes layer"):
        pack(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="net must have a Bayes layer"):
        pack(pack(bqnn.BayesLinear(3, 3)))
    with pytest.raises(ValueError, match="precision must be"):
        pack(bqnn.BayesLinear(3, 3), precision="fp16")
    with pytest.raises(ValueError, match="execution must be"):
        pack(bqnn.BayesLinear(3, 3), execution="fastest")


@pytest.mark.parametrize("parameter", ["weight", "bias", "raw_levels"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_parameter_that_is_not_finite_names_the_layer(parameter: str, value: float) -> None:
    net = bayes(Shared())
    with torch.no_grad():
        getattr(net.nested["inner"][0], parameter).view(-1)[1] = value
    with pytest.raises(ValueError, match=f"layer 'nested.inner.0': {parameter} must be finite"):
        pack(net)


def trained(net: nn.Module, likelihood_alone: bool) -> nn.Module:
    output, target = net(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])
    nll = nn.functional.cross_entropy(output, target)
    (nll if likelihood_alone else bqnn.elbo(output, target, net, 5).loss).backward()
    return net


def test_a_training_without_the_divergence_is_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    overrides = {"1": {"estimator": "deterministic"}}
    net = bqnn.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), overrides=overrides)
    bqnn.pack(net)
    bqnn.pack(trained(bqnn.convert(nn.Linear(4, 3)), likelihood_alone=False))
    assert not caplog.records
    bqnn.pack(trained(net, likelihood_alone=True))
    (record,) = caplog.records
    assert record.getMessage().startswith("trained without the divergence from the prior") and "'0';" in record.message
    caplog.clear()
    bqnn.pack(trained(net, likelihood_alone=False))
    assert not caplog.records
