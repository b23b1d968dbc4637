"""A ReLU that is left to the packed layer before it: where, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.check import PRECISIONS
from bqnn.core.files import FormatError
from bqnn.engine.pack import pack, pack_layer
from bqnn.files.network import load, save
from bqnn.packed.base import PackedLayer
from bqnn.packed.layers import PackedLinear

EXECUTIONS = ["auto", "packed", "dense"]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 7), nn.ReLU()
    )


def bayes(net: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return bqnn.convert(net, **options).eval()


def images() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def fused(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, PackedLayer) and module.relu]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_network_gives_what_it_gave_with_relus_of_its_own(granularity: str, execution: str, precision: str) -> None:
    net = bayes(small(), granularity=granularity)
    packed, apart = pack(net, precision, execution), pack(net, precision, execution, fuse_relu=False)
    assert (fused(packed), fused(apart)) == (["0", "4"], [])
    assert [type(packed[i]) for i in (1, 5)] == [nn.Identity, nn.Identity]
    assert [type(apart[i]) for i in (1, 5)] == [nn.ReLU, nn.ReLU]
    assert list(packed.state_dict()) == list(apart.state_dict())
    x = images()
    x[1, 0, 2, 2] = torch.nan
    for _ in range(3):  # the first call of a shape, and direct ones
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
            y = apart(x.to(dtype))
            assert y.isnan().any()
            assert (y == 0).any()
            torch.testing.assert_close(packed(x.to(dtype)), y, rtol=0, atol=0, equal_nan=True)
    expected = net(images())
    torch.testing.assert_close(pack(net)(images()), expected, rtol=1e-5, atol=1e-5)
    assert type(net[1]) is nn.ReLU


class Tapped(nn.Module):
    """Layers and ReLUs that are used twice, in ways that modules() shows and does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_relu = nn.ReLU()
        self.first = nn.Sequential(nn.Linear(4, 4), self.shared_relu)
        self.second = nn.Sequential(nn.Linear(4, 4), self.shared_relu)
        self.shared_layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.taps: dict[str, list[nn.Module]] = {}
        self.layer_between = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.ReLU6())
        self.own = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.twice = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        x = self.shared_layer(x) + self.taps["pre"][0](x)
        x = self.own[0](self.layer_between(x))
        return self.twice(self.twice(x))


def test_only_what_is_used_once_is_fused() -> None:
    net = bayes(Tapped())
    net.taps["pre"] = [net.shared_layer[0]]
    packed = pack(net)
    assert fused(packed) == ["twice.0"]  # the whole of it is used twice
    assert type(packed.shared_layer[1]) is nn.ReLU
    assert packed.taps["pre"][0] is packed.shared_layer[0]
    x = torch.randn(5, 4)
    torch.testing.assert_close(packed(x), net(x), rtol=1e-4, atol=1e-5)


class Counting(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        before = self[0](x)
        return before + self[1](before)


class Named(nn.Sequential):
    """A Sequential by another name."""


def test_what_runs_in_another_way_is_left_alone() -> None:
    counting, named = (bayes(kind(nn.Linear(4, 4), nn.ReLU())) for kind in (Counting, Named))
    assert (fused(pack(counting)), fused(pack(named))) == ([], ["0"])
    assert fused(pack(bayes(nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU())))) == []
    assert fused(pack(bayes(nn.Sequential(nn.ReLU(), nn.Linear(4, 4))))) == []
    watched = bayes(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    watched[1].register_forward_hook(lambda module, arguments, y: None)
    assert fused(pack(watched)) == []
    patched = bayes(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    patched.forward = patched[0].forward
    assert fused(pack(patched)) == []
    frozen = bqnn.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), skip=["0"])
    assert fused(pack(frozen)) == ["2"]


def test_a_list_that_holds_itself_is_walked_once() -> None:
    net = bayes(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    net.note = []
    net.note.append(net.note)
    assert fused(pack(net)) == ["0"]


def test_files(tmp_path: Path) -> None:
    net = bayes(small())
    packed, apart = pack(net), pack(net, fuse_relu=False)
    save(packed, tmp_path / "fused")
    save(apart, tmp_path / "apart")
    described = {name: bqnn.info(tmp_path / name)["layers"] for name in ("fused", "apart")}
    assert [layer.get("relu") for layer in described["fused"].values()] == [True, True]
    assert not any("relu" in layer for layer in described["apart"].values())
    expected = apart(images())
    for name, model in (
        ("fused", small()),
        ("fused", apart),
        ("fused", packed),
        ("fused", bqnn.convert(small())),
        ("apart", small()),
        ("apart", apart),
    ):
        loaded = load(tmp_path / name, model=model)
        assert torch.equal(loaded(images()), expected)
        assert fused(loaded) == (["0", "4"] if name == "fused" else [])
        assert (type(loaded[1]) is nn.ReLU) == (name == "apart")
        save(loaded, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(FormatError, match="layer '0' ends with a ReLU in the model and not in the file"):
        load(tmp_path / "apart", model=packed)


class Functional(nn.Module):
    """The same layers with a ReLU that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = small()[:5]
        self.block[1].register_forward_hook(lambda module, arguments, y: None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.block(x))


def test_a_fused_file_and_a_model_that_keeps_its_relus(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    packed = pack(bayes(Block()))
    save(packed, tmp_path / "net")
    loaded = load(tmp_path / "net", model=Functional())
    assert type(loaded.block[1]) is nn.ReLU
    assert torch.equal(loaded(images()), packed(images()))


def test_the_layers_show_and_check_it() -> None:
    linear, conv2d = bqnn.BayesLinear(5, 3), bqnn.BayesConv2d(2, 3, 3)
    for layer in (pack_layer(linear, relu=True), pack_layer(conv2d, relu=True)):
        assert repr(layer).endswith("execution='auto', relu=True)")
        assert copy.deepcopy(layer).relu
    codes = pack_layer(linear).codes
    with pytest.raises(TypeError, match="relu must be a bool, got int"):
        PackedLinear(5, codes, linear.levels.detach(), relu=1)  # type: ignore[arg-type]


def test_explain_speed_shows_it() -> None:
    report = bqnn.explain_speed(pack(bayes(small())), images())
    assert [row.layout.endswith(", ReLU") for row in report] == [True, True]
    apart = bqnn.explain_speed(pack(bayes(small()), fuse_relu=False), images())
    assert not any("ReLU" in row.layout for row in apart)


@pytest.mark.parametrize("execution", ["packed", "dense"])
def test_compile_and_export(execution: str) -> None:
    net = pack(bayes(small()), execution=execution)
    expected = copy.deepcopy(net)(images())
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected)
    program = torch.export.export(net, (images(),))
    torch.testing.assert_close(program.module()(images()), expected)
