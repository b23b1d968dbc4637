"""convert and convert_: which layers become Bayes layers, with which options, and what stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import bqnn
from bqnn import BayesConv2d, BayesLinear, convert, convert_
from bqnn.bayes.layers import bayes_layers
from bqnn.packed.base import PackedLayer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(x).mean((2, 3))
        return self.head["a"](pooled) + self.head["b"](pooled)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), Block())


ALL = {"0", "3.conv", "3.head.a", "3.head.b"}


def converted(net: nn.Module) -> set[str]:
    return set(bayes_layers(net))


def shared_net() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 4))


def test_nested_layers_are_converted_and_the_original_is_untouched() -> None:
    net = make_net()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = convert(net, num_levels=4)
    assert converted(result) == ALL
    assert not converted(net)
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(layer.num_levels == 4 for layer in bayes_layers(result).values())


def test_in_place() -> None:
    net = make_net()
    block = net[3]
    assert convert_(net) is net
    assert converted(net) == ALL
    assert net[3] is block
    assert all(layer.num_levels == 3 for layer in bayes_layers(net).values())


def test_weights_biases_and_codebooks_come_from_the_layers() -> None:
    net = make_net()
    result = convert(net, granularity="channel")
    for name in ALL:
        before, after = net.get_submodule(name), result.get_submodule(name)
        assert torch.equal(after.mean, before.weight)
        assert (after.bias is None) == (before.bias is None)
        assert before.bias is None or torch.equal(after.bias, before.bias)
        rows = before.weight.detach().flatten(1)
        torch.testing.assert_close(after.levels, bqnn.core.codebook.lloyd_max(rows, 3))


def test_a_bare_layer() -> None:
    linear, conv = nn.Linear(3, 2), nn.Conv2d(3, 2, 1)
    for layer, kind in ((linear, BayesLinear), (conv, BayesConv2d)):
        result = convert(layer, 5)
        assert type(result) is kind and result.num_levels == 5
        assert torch.equal(result.mean, layer.weight)
        in_place = convert_(layer)
        assert type(in_place) is kind and in_place is not layer


@pytest.mark.parametrize(
    ("make", "attributes"),
    [
        pytest.param(lambda: nn.Linear(5, 3, bias=False), {"in_features": 5, "out_features": 3}, id="linear"),
        pytest.param(
            lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2, False, "reflect"),
            {
                "kernel_size": (3, 2),
                "stride": (2, 1),
                "padding": (1, 2),
                "dilation": (1, 2),
                "groups": 2,
                "padding_mode": "reflect",
            },
            id="conv2d",
        ),
        pytest.param(lambda: nn.Conv2d(4, 6, 3, padding="same"), {"padding": "same"}, id="conv2d-same"),
        pytest.param(lambda: nn.Linear(5, 3, dtype=torch.float64), {}, id="float64"),
    ],
)
def test_geometry_dtype_and_mode_are_kept(make: Any, attributes: dict[str, Any]) -> None:
    layer = make().eval()
    result = convert(layer)
    assert {name: getattr(result, name) for name in attributes} == attributes
    assert result.weight.dtype == layer.weight.dtype
    assert (result.bias is None) == (layer.bias is None)
    assert not result.training
    assert result.extra_repr().startswith(layer.extra_repr())


def test_modes_of_single_layers_are_kept() -> None:
    net = make_net().train()
    net[0].eval()
    result = convert(net)
    assert not result[0].training
    assert result[3].conv.training


def test_frozen_weights_stay_frozen() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    result = convert(net)
    assert not result[0].weight.requires_grad and not result[0].bias.requires_grad
    assert result[3].conv.weight.requires_grad


def test_a_shared_layer_stays_shared() -> None:
    net = shared_net()
    result = convert(net)
    assert isinstance(result[0], BayesLinear)
    assert result[0] is result[2]
    assert result[3] is not result[0]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        pytest.param(["3.conv"], {"3.conv"}, id="name"),
        pytest.param(["3"], {"3.conv", "3.head.a", "3.head.b"}, id="name-of-a-block"),
        pytest.param(["3.head"], {"3.head.a", "3.head.b"}, id="name-of-a-dict"),
        pytest.param(["0", "3.head.b"], {"0", "3.head.b"}, id="two-names"),
        pytest.param([nn.Linear], {"3.head.a", "3.head.b"}, id="type"),
        pytest.param((nn.Conv2d, "3.head.a"), {"0", "3.conv", "3.head.a"}, id="type-and-name"),
        pytest.param(iter(["0"]), {"0"}, id="iterator"),
    ],
)
def test_skip(skip: Any, left: set[str]) -> None:
    net = convert(make_net(), skip=skip)
    assert converted(net) == ALL - left
    for name in left:
        assert type(net.get_submodule(name)) in (nn.Linear, nn.Conv2d)


@pytest.mark.parametrize("function", [convert, convert_], ids=["convert", "convert_"])
@pytest.mark.parametrize("name", ["0", "3", "3.head.a"])
def test_skip_a_module(function: Any, name: str) -> None:
    net = make_net()
    result = function(net, skip=[net.get_submodule(name)])
    assert converted(result) == {other for other in ALL if other != name and not other.startswith(name + ".")}


@pytest.mark.parametrize("function", [convert, convert_], ids=["convert", "convert_"])
@pytest.mark.parametrize("by", ["name", "other-name", "module"])
def test_skip_a_shared_layer(function: Any, by: str) -> None:
    net = shared_net()
    skip = {"name": "0", "other-name": "2", "module": net[0]}[by]
    result = function(net, skip=[skip])
    assert converted(result) == {"3"}
    assert result[0] is result[2]


@pytest.mark.parametrize("function", [convert, convert_], ids=["convert", "convert_"])
def test_skip_the_whole_network(function: Any) -> None:
    net = make_net()
    with pytest.raises(ValueError, match="net has no layer to convert"):
        function(net, skip=[net])


def test_options_and_overrides() -> None:
    net = convert(
        make_net(),
        num_levels=4,
        estimator="sample",
        prior="gaussian",
        overrides={"3.conv": {"num_levels": 16, "granularity": "channel"}, "0": {"estimator": "local"}},
    )
    layers = bayes_layers(net)
    assert {name: layer.num_levels for name, layer in layers.items()} == dict.fromkeys(ALL, 4) | {"3.conv": 16}
    assert layers["3.conv"].granularity == "channel" and layers["0"].granularity == "tensor"
    assert layers["0"].estimator == "local" and layers["3.conv"].estimator == "sample"
    assert all(layer.prior == "gaussian" for layer in layers.values())


def test_overrides_are_not_changed() -> None:
    overrides = {"0": {"num_levels": 5}}
    convert(make_net(), overrides=overrides)
    assert overrides == {"0": {"num_levels": 5}}


@pytest.mark.parametrize("name", ["0", "2"])
def test_override_of_a_shared_layer_by_either_name(name: str) -> None:
    result = convert(shared_net(), overrides={name: {"num_levels": 7}})
    assert result[0] is result[2]
    assert result[0].num_levels == 7
    assert result[3].num_levels == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            {"skip": ["nope", "3.con"]}, ValueError, "skip names .*does not have: 3.con, nope", id="skip-name"
        ),
        pytest.param(
            {"skip": [nn.Linear(2, 2)]}, ValueError, "skip holds a module.*not in the network: Linear", id="skip"
        ),
        pytest.param({"skip": [nn.Conv2d, nn.Linear]}, ValueError, "net has no layer to convert", id="all-skipped"),
        pytest.param({"skip": "3.conv"}, (TypeError, ValueError), "skip", id="skip-is-a-string"),
        pytest.param({"overrides": {"nope": {}}}, ValueError, "overrides names .*does not have: nope", id="override"),
        pytest.param({"overrides": {"3": {}}}, ValueError, "overrides names .*not converted: 3", id="override-block"),
        pytest.param({"overrides": {"0": {"levels": 3}}}, TypeError, "layer '0': .*levels", id="override-option"),
        pytest.param({"num_levels": 1}, ValueError, "layer '0': num_levels must be from 2 to 16, got 1", id="M1"),
        pytest.param({"num_levels": 17}, ValueError, "num_levels must be from 2 to 16, got 17", id="M17"),
        pytest.param({"num_levels": 3.0}, TypeError, "num_levels must be an int, got float", id="M-float"),
        pytest.param(
            {"estimator": "none"}, ValueError, "layer '0': estimator must be one of moment.*'none'", id="option"
        ),
        pytest.param({"precision": "fp32"}, TypeError, "layer '0': .*precision", id="unknown-option"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    for function in (convert, convert_):
        with pytest.raises(error, match=message):
            function(net, **arguments)
        assert not converted(net), "a failed call has changed the network"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_weight_that_is_not_finite() -> None:
    net = make_net()
    with torch.no_grad():
        net[3].conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '3.conv': weight must be finite"):
        convert(net)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(nn.utils.parametrizations.weight_norm, id="weight_norm"),
        pytest.param(nn.utils.parametrizations.spectral_norm, id="spectral_norm"),
        pytest.param(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), id="prune"),
    ],
)
def test_a_parametrized_weight_is_refused_by_name(change: Any) -> None:
    net = make_net()
    change(net[3].conv)
    with pytest.raises(ValueError, match="layer '3.conv' has a parametrized weight"):
        convert_(net)
    skipped = convert_(net, skip=["3.conv"])
    assert converted(skipped) == ALL - {"3.conv"}


def test_a_network_without_layers() -> None:
    for net in (nn.Sequential(nn.ReLU()), nn.BatchNorm1d(3), convert(nn.Linear(3, 3))):
        with pytest.raises(ValueError, match="net has no layer to convert"):
            convert(net)


def test_converted_layers_are_left_alone_the_second_time() -> None:
    once = convert(make_net(), skip=["0"])
    layer = once[3].conv
    twice = convert_(once, num_levels=5)
    assert twice[0].num_levels == 5
    assert twice[3].conv is layer and layer.num_levels == 3


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    net = nn.ModuleDict({"scaled": Scaled(3, 3), "plain": nn.Linear(3, 3)})
    result = convert(net)
    assert converted(result) == {"plain"}
    x = torch.randn(4, 3)
    assert torch.equal(result["scaled"](x), net["scaled"](x))


def test_a_pretrained_network_starts_from_its_quantized_self() -> None:
    net = make_net().eval()
    x = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(1))
    exact = net(x)
    errors = [float((convert(net, m)(x) - exact).norm() / exact.norm()) for m in (2, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.15


def test_resnet18_trains_packs_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = convert(torchvision.models.resnet18(weights=None, num_classes=5))
    assert len(bayes_layers(net)) == 21
    optimizer = torch.optim.SGD(bqnn.parameter_groups(net, 0.01))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    terms = bqnn.elbo(net(torch.randn(2, 3, 64, 64)), torch.tensor([1, 4]), net, dataset_size=50_000)
    terms.loss.backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), name

    path, x = tmp_path / "resnet18.safetensors", torch.randn(2, 3, 64, 64)
    bqnn.save(bqnn.pack(net), path)
    dense = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    loaded = bqnn.load(path, model=dense, execution="packed")
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name in dense.state_dict()}
    decoded = {f"{name}.weight": m.decode() for name, m in loaded.named_modules() if isinstance(m, PackedLayer)}
    assert len(decoded) == 21
    dense.load_state_dict({**state, **decoded})
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), dense(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    assert path.stat().st_size < 11_200_000 * 4 / 13
