"""convert and pack on networks of every kind: each gives what a float64 network with the decoded weights gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import swin_transformer

import bqnn
from bqnn.bayes.layers import bayes_layers
from bqnn.core.readers import with_readers
from bqnn.packed.base import PackedLayer
from tests.support.odd_nets import (
    ODD_NETS,
    UNCOPIABLE_NETS,
    Hooked,
    InList,
    Net,
    Taps,
    Tied,
    TiedEmbedding,
    TiedParameter,
)


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.b.weight.detach().clone())


def make(kind: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    net = kind()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net.eval()


def with_decoded_weights(kind: Callable[[], Any], decoded: dict[str, Tensor]) -> Any:
    """The plain network in float64."""
    net = make(kind).double()
    for name, weight in decoded.items():
        net.get_submodule(name).weight.data.copy_(weight)
    return net


def decoded_weights(net: nn.Module) -> dict[str, Tensor]:
    packed = {name: layer.decode() for name, layer in net.named_modules() if isinstance(layer, PackedLayer)}
    return packed or {name: layer.quantized_weight() for name, layer in bayes_layers(net).items()}


def check(net: nn.Module, kind: Callable[[], Any], x: Tensor) -> None:
    expected = with_decoded_weights(kind, decoded_weights(net))(x if x.dtype == torch.int64 else x.double())
    scale = expected.abs().max().item()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(2):
                torch.testing.assert_close(net(x).double(), expected, rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ODD_NETS)
def test_odd_networks(kind: Any, tmp_path: Path) -> None:
    x = kind.example()
    net = make(kind)
    before = net(x)
    converted = bqnn.convert(net, 3, skip=[nn.MultiheadAttention])  # which is read by the fast path, beside the layers
    assert torch.equal(net(x), before)
    assert len(decoded_weights(converted)) == sum(
        type(m) in (nn.Linear, nn.Conv2d, nn.Embedding) for m in net.modules()
    )
    check(converted, kind, x)
    check(copy.deepcopy(converted) if kind.__name__ != "KeepsActivations" else converted, kind, x)
    packed = bqnn.pack(converted)
    check(packed, kind, x)
    check(converted, kind, x)
    check(bqnn.pack(converted, execution="dense"), kind, x)
    bqnn.save(packed, tmp_path / "net")
    loaded = bqnn.load(tmp_path / "net", model=make(kind))
    check(loaded, kind, x)
    bqnn.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    check(bqnn.load(tmp_path / "net", model=converted), kind, x)
    check(bqnn.load(tmp_path / "net", model=packed), kind, x)
    in_place = make(kind)
    assert bqnn.pack_(bqnn.convert_(in_place, 3, skip=[nn.MultiheadAttention])) is in_place
    check(in_place, kind, x)


@pytest.mark.parametrize("kind", ODD_NETS)
def test_every_layer_of_an_odd_network_learns(kind: Any) -> None:
    net = bqnn.convert(make(kind), 3).train()
    net(kind.example()).square().sum().backward()
    for name, layer in bayes_layers(net).items():
        assert layer.mean.grad is not None and layer.mean.grad.abs().sum() > 0, name
        assert layer.raw_levels.grad is not None and layer.raw_levels.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", UNCOPIABLE_NETS)
def test_what_a_copy_would_not_follow_is_refused_and_works_in_place(kind: Any) -> None:
    net, x = make(kind), Net.example()
    with pytest.raises(ValueError, match="net can not be copied: net.* refers to its module '.*'.*in place"):
        bqnn.convert(net)
    assert not bayes_layers(net)
    bqnn.convert_(net, 3)
    check(net, kind, x)
    with pytest.raises(ValueError, match="net can not be copied: net.* refers to its module '.*'.*in place"):
        bqnn.pack(net)
    bqnn.pack_(net)
    check(net, kind, x)
    assert not bayes_layers(net)


def _transformer(name: str) -> nn.Module:
    if name == "vit":
        return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)
    options: dict[str, Any] = {"stochastic_depth_prob": 0.0, "num_classes": 10}
    if name == "swin_v2":
        options |= {"block": swin_transformer.SwinTransformerBlockV2}
        options |= {"downsample_layer": swin_transformer.PatchMergingV2}
    return models.SwinTransformer([4, 4], 12, [2, 1, 2], [2, 2, 4], [3, 3], **options)


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: getattr(models, name)(weights=None, num_classes=10)  # type: ignore[misc]
    for name in (
        "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mobilenet_v2", "mnasnet0_5", "regnet_x_400mf",
        "efficientnet_b0", "resnet18",
    )
} | {
    "densenet": lambda: models.DenseNet(8, (2, 2, 2), 16, num_classes=10),
    "swin": lambda: _transformer("swin"),
    "swin_v2": lambda: _transformer("swin_v2"),
    "vit": lambda: _transformer("vit"),
}  # fmt: skip


def plain_weight(net: nn.Module, name: str) -> Tensor:
    """The weight in torch's own network of the layer ``name`` of a converted one."""
    owner, _, part = name.rpartition(".")
    attention = net.get_submodule(owner)
    if isinstance(attention, nn.MultiheadAttention) and part in ("q_proj", "k_proj", "v_proj"):
        return attention.in_proj_weight.unflatten(0, (3, -1))["qkv".index(part[0])]
    return net.get_submodule(name).weight


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name: str) -> None:
    def build() -> Any:
        net = TORCHVISION[name]().eval()
        for parameter in net.parameters():
            if parameter.dim() > 1 and not parameter.any():  # the head of a transformer starts at zero
                nn.init.normal_(parameter, std=0.1)
        return net

    torch.manual_seed(0)
    net = build()
    converted = bqnn.convert(net, 3)
    packed = bqnn.pack(converted, execution="packed")
    decoded = decoded_weights(packed)
    layers = sum(type(module) in (nn.Linear, nn.Conv2d, nn.Embedding) for module in net.modules())
    attentions = sum(isinstance(module, nn.MultiheadAttention) for module in net.modules())
    assert len(decoded) == layers + 4 * attentions, "queries, keys, values and the way out"
    reference = copy.deepcopy(net).double()
    for layer_name, weight in decoded.items():
        plain_weight(reference, layer_name).data.copy_(weight)
    size = 64 if name == "squeezenet1_1" else 32
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(x.double())
        scale = expected.abs().max().item()
        for quantized in (converted, packed):
            torch.testing.assert_close(quantized(x).double(), expected, rtol=0.0, atol=1e-4 * scale)


def refused(net: nn.Module, message: str, **options: Any) -> None:
    before = {name: type(module) for name, module in net.named_modules()}
    for function in (bqnn.convert, bqnn.convert_):
        with pytest.raises(ValueError, match=message):
            function(net, **options)
    assert {name: type(module) for name, module in net.named_modules()} == before


@pytest.mark.parametrize(
    ("hold", "reader"),
    [
        pytest.param(lambda net: setattr(net, "held", [net.a.weight]), r"net.held\[0\]", id="list"),
        pytest.param(lambda net: setattr(net, "held", {"w": net.a.weight.data}), r"net.held\['w'\]", id="dict"),
        pytest.param(lambda net: setattr(net, "held", net.a.weight.t()), "net.held", id="view-in-a-graph"),
        pytest.param(lambda net: setattr(net, "held", net.a.weight.detach()[2:3]), "net.held", id="row"),
        pytest.param(lambda net: net.register_buffer("held", net.a.weight.data), "net.held", id="buffer"),
        pytest.param(
            lambda net: setattr(net.b, "weight", nn.Parameter(net.a.weight.data.t())), "'weight' of 'a'", id="parameter"
        ),
    ],
)
def test_a_weight_that_is_held_as_a_tensor_is_refused(hold: Callable[[Any], Any], reader: str) -> None:
    net = make(InList)
    hold(net)
    with pytest.raises(ValueError, match=f"layer '.': (the parameter )?{reader} .*has the memory of its weight"):
        bqnn.convert_(net)
    assert not bayes_layers(net)


def test_parts_of_one_flat_tensor_are_no_ties() -> None:
    net = make(InList)
    flat = torch.cat([net.a.weight.detach().flatten(), net.b.weight.detach().flatten()])
    net.a.weight.data, net.b.weight.data = flat[:64].view(8, 8), flat[64:].view(8, 8)
    assert set(bayes_layers(bqnn.convert(net))) == {"a", "b"}


def test_refusals_of_ties() -> None:
    refused(make(Tied), "layer 'b' shares its weight with 'a', a Linear that is not converted; skip both", skip=["a"])
    five = {"num_levels": 5}
    refused(make(Tied), "layer 'b' shares its weight with 'a' and must have the same", overrides={"b": five})
    converted = bqnn.convert(make(Tied), overrides={"a": {"num_levels": 5}, "b": {"num_levels": 5}})
    assert converted.a.num_levels == converted.b.num_levels == 5


def test_a_forward_of_its_own_is_refused() -> None:
    net = make(InList)
    net.a.forward = lambda x: x
    refused(net, "layer 'a' has a forward of its own")
    del net.a.forward
    converted = bqnn.convert(net)
    converted.b.forward = lambda x: x
    for function in (bqnn.pack, bqnn.pack_):
        with pytest.raises(ValueError, match="layer 'b' has a forward of its own"):
            function(converted)
    assert len(bayes_layers(converted)) == 2


def test_a_bound_method_where_it_can_not_be_replaced_is_refused() -> None:
    net = make(InList)
    net.methods = (net.a.forward,)
    refused(net, r"layer 'a': net.methods\[0\] holds its bound method forward")


def test_tied_layers_have_one_posterior(tmp_path: Path) -> None:
    net = bqnn.convert(make(Tied), 3)
    for each in (net, copy.deepcopy(net), bqnn.convert_(make(Tied), 3), copy.deepcopy(net).double()):
        assert each.a.weight is each.b.weight
        for name in ("mean", "log_sigma2", "raw_levels", "level_scale", "prior_sigma2"):
            assert getattr(each.a, name) is getattr(each.b, name)
        assert each.a.bias is not each.b.bias
        torch.testing.assert_close(bqnn.kl_divergence(each), each.a.kl_divergence())
        groups = bqnn.parameter_groups(each, 0.1)
        assert sum(len(group["params"]) for group in groups) == len(list(each.parameters())) == 5
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["b.weight"] = state["a.weight"] = state["a.weight"] + 1.0
    for assign in (False, True):
        net.load_state_dict(state, assign=assign)
        assert net.a.mean is net.b.mean and net.a.level_scale is net.b.level_scale
        torch.testing.assert_close(net.b.mean, state["b.weight"])
    net.a.set_levels_(torch.tensor([[-0.5, 0.0, 0.5]]))
    torch.testing.assert_close(net.b.levels, torch.tensor([[-0.5, 0.0, 0.5]]))
    packed = bqnn.pack(net)
    bqnn.save(packed, tmp_path / "net")
    assert {"a.codes", "b.codes"} - set(bqnn.info(tmp_path / "net")["tensors"]) in ({"a.codes"}, {"b.codes"})
    for each in (packed, bqnn.load(tmp_path / "net", model=Tied()), copy.deepcopy(packed)):
        assert each.a.weight is each.b.weight and each.a.codes is each.b.codes and each.a.levels is each.b.levels


def test_what_is_tied_in_the_file_alone_is_copied(tmp_path: Path) -> None:
    packed, x = bqnn.pack(bqnn.convert(make(Tied), 3)), Tied.example()
    bqnn.save(packed, tmp_path / "net")
    loaded = bqnn.load(tmp_path / "net", model=Untied())
    assert torch.equal(loaded(x), packed(x))
    assert loaded.a.codes is not loaded.b.codes and loaded.a.weight is not loaded.b.weight
    loaded.a.codes.zero_()
    assert torch.equal(loaded.b.codes, packed.b.codes)


def test_a_copy_with_readers_has_the_tensors_of_its_network() -> None:
    net = make(TiedEmbedding)
    assert with_readers(net, ["other"]) is net
    copied = with_readers(net, ["head", "other"])
    assert type(net.embedding) is nn.Embedding and net.embedding.weight is net.head.weight
    assert copied.head is not net.head and copied.head.weight is net.head.weight is copied.embedding.weight
    assert list(copied.state_dict()) == ["head.weight"]


def test_the_divergence_of_tied_layers_is_that_of_the_one_with_a_posterior() -> None:
    net = bqnn.convert(make(Tied), 3)
    expected = bqnn.kl_divergence(net)
    assert expected > 0.0
    for deterministic, other in ((net.a, net.b), (net.b, net.a)):
        deterministic.estimator, other.estimator = "deterministic", "moment"
        assert torch.equal(bqnn.kl_divergence(net), expected)
    net.a.estimator = net.b.estimator = "deterministic"
    assert bqnn.kl_divergence(net) == 0.0


@pytest.mark.parametrize("learns", [True, False])
def test_variances_learn_while_a_tied_layer_has_a_use_for_them(learns: bool) -> None:
    plain = make(Tied)
    plain.a.weight.requires_grad_(learns)
    net = bqnn.convert(plain, 3, estimator="deterministic")
    assert not net.a.log_sigma2.requires_grad and net.a.mean.requires_grad == learns
    for layer in (net.a, net.b):
        layer.estimator = "moment"
        assert net.a.log_sigma2.requires_grad == learns
    for layer, estimator in ((net.b, "deterministic"), (net.a, "sample")):
        layer.estimator = estimator
        assert net.a.log_sigma2.requires_grad == learns
    for thawed in (learns, not learns):
        net.a.estimator = "deterministic"
        assert not net.a.log_sigma2.requires_grad
        net.b.weight.requires_grad_(thawed)
        assert not net.b.log_sigma2.requires_grad and net.b.raw_levels.requires_grad == thawed
        net.a.estimator = "local"
        assert net.a.log_sigma2.requires_grad == thawed


@pytest.mark.parametrize("kind", [TiedEmbedding, TiedParameter])
def test_a_module_with_the_weight_of_a_layer_reads_it(kind: Any, tmp_path: Path) -> None:
    net = bqnn.convert(make(kind), 3, skip=[nn.Embedding])
    module, name, layer = (net.embedding, "weight", net.head) if kind is TiedEmbedding else (net, "shared", net.a)
    assert isinstance(module, nn.Embedding if kind is TiedEmbedding else kind)
    assert getattr(module, name) is layer.weight
    with pytest.raises(TypeError, match=f"{name} is the weight of a quantized layer and can not be assigned"):
        setattr(module, name, nn.Parameter(torch.zeros(1)))
    with pytest.raises(TypeError, match=f"{name} is the weight of a quantized layer and can not be deleted"):
        delattr(module, name)
    assert list(net.state_dict()) == list(bqnn.convert(make(kind), 3, skip=[nn.Embedding]).state_dict())
    parameters = dict(net.named_parameters())
    assert sum(parameter is layer.mean for parameter in parameters.values()) == 1
    packed = bqnn.pack(net)
    assert not any(name.endswith(("embedding.weight", "shared")) for name in packed.state_dict())
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(again(kind.example()), net(kind.example()))
    torch.save(packed, tmp_path / "packed.pt")
    again = torch.load(tmp_path / "packed.pt", weights_only=False)
    assert torch.equal(again(kind.example()), packed(kind.example()))


def test_a_tied_module_follows_what_moves_and_loads_the_layer() -> None:
    net = bqnn.convert(make(TiedEmbedding), 3, skip=[nn.Embedding])
    state = {name: value + 0.5 for name, value in net.state_dict().items()}
    for assign in (False, True):
        net.load_state_dict(state, assign=assign)
        torch.testing.assert_close(net.head.mean, state["head.weight"])
        assert net.embedding._parameters["weight"] is net.head.mean
    for moved in (net.double(), copy.deepcopy(net).to("meta"), net.float()):
        assert moved.embedding._parameters["weight"] is moved.head.mean
        assert moved.embedding.weight is moved.head.weight
    plain = make(TiedEmbedding)
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net.head.mean, plain.head.weight)


def test_packed_weights_have_the_dtype_of_the_network() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net = bqnn.convert(make(Net).to(dtype), 3)
        for packed in (bqnn.pack(net), bqnn.pack(net.float()).to(dtype)):
            weight = packed.a.weight
            assert weight.dtype == dtype and weight.clone().dtype == dtype
            assert torch.equal(weight.clone(), packed.a.decode().to(dtype))
            assert packed.a.levels.dtype == torch.float32


def test_a_replica_of_data_parallel_has_tensors_for_parameters() -> None:
    layer = bqnn.BayesLinear(8, 3).eval()
    replica = layer._replicate_for_data_parallel()
    replica._parameters["raw_thresholds"] = None
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.clone())
    for name, buffer in layer.named_buffers():
        setattr(replica, name, buffer)
    x = Net.example()
    assert torch.equal(replica(x), layer(x))
    assert torch.equal(replica.weight.clone(), layer.quantized_weight())


def test_a_frozen_layer_keeps_its_output() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    net[0].requires_grad_(False)
    net = bqnn.convert(net, 3, partition="learned")
    assert not [name for name, parameter in net[0].named_parameters() if parameter.requires_grad]
    x = Net.example()
    before = net.eval()[0](x)
    optimizer = torch.optim.Adam(bqnn.parameter_groups(net.train(), 0.1))
    for _ in range(3):
        optimizer.zero_grad()
        bqnn.elbo(net(x), torch.zeros(4, dtype=torch.long), net, 4).loss.backward()
        optimizer.step()
    assert torch.equal(net.eval()[0](x), before)


def test_hooks_and_what_a_user_gave_a_layer_stay() -> None:
    net = make(Hooked)
    net.a.note, net.a.extra = "mine", nn.Linear(2, 2)
    net.a.register_buffer("mask", torch.ones(3))
    bqnn.convert_(net, 3, skip=["a.extra"])
    assert net.a.note == "mine" and len(net.a._forward_hooks) == 1
    assert type(net.a.extra) is nn.Linear and torch.equal(net.a.mask, torch.ones(3))
    packed = bqnn.pack(net)
    assert packed.a.note == "mine" and len(packed.a._forward_hooks) == 1
    assert not hasattr(packed.a, "estimator") and not hasattr(packed.a, "log_sigma2")
    assert type(packed.a.extra) is nn.Linear and "a.mask" in packed.state_dict()


def test_failures_leave_the_network_as_it_was() -> None:
    net = bqnn.convert(make(InList))
    with torch.no_grad():
        net.b.bias[0] = torch.nan
    kinds = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(ValueError, match="layer 'b': bias must be finite"):
        bqnn.pack_(net)
    assert {name: type(module) for name, module in net.named_modules()} == kinds
    assert net.order[1] is net.a


def test_a_relu_comes_back_where_a_hook_would_see_what_is_before_it() -> None:
    net = bqnn.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())).eval()
    x = Net.example()
    packed = copy.deepcopy(bqnn.pack(net))
    expected = packed(x)
    assert [packed[0].relu, packed[2].relu] == [True, True]
    seen = []
    packed[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    assert [packed[0].relu, packed[2].relu] == [False, True]
    assert [type(packed[1]), type(packed[3])] == [nn.ReLU, nn.Identity]
    assert torch.equal(packed(x), expected)
    assert (seen[0] < 0).any()


def test_a_walked_sequential_keeps_its_relus() -> None:
    packed = bqnn.pack(bqnn.convert(make(Taps)))
    assert [type(module) for module in packed.features][1::2] == [nn.ReLU, nn.ReLU]
