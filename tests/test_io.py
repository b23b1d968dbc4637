"""Files of packed networks: round trips, size, and how they are written."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import bqnn
from bqnn import models
from bqnn.core.check import PRECISIONS
from bqnn.core.files import FormatError
from bqnn.engine.pack import pack
from bqnn.files.network import info, load, save
from bqnn.packed.convolutions import PackedConv2d
from bqnn.packed.layers import PackedLinear
from tests.support.packed_nets import Apart, Odd, Shared, packed_odd

EVERY_M = [pytest.param(m, id=f"M{m}") for m in range(2, 17)]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether both have the same tensors, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(second[name].contiguous().view(-1).view(torch.uint8))
        for name in first
    )


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return pack(bqnn.convert(models.lenet5()))


@pytest.fixture
def lenet_file(lenet: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save(lenet, path)
    return path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("lenet5", {"image_size": 8}, id="lenet5"),
        pytest.param("lenet5_caffe", {}, id="lenet5_caffe"),
        pytest.param("densenet", {"depth": 10}, id="densenet"),
        pytest.param("resnet20", {"in_channels": 1}, id="resnet20"),
    ],
)
def test_a_built_in_network_needs_nothing_else(name: str, arguments: dict[str, int], tmp_path: Path) -> None:
    net = pack(bqnn.convert(models.build(name, arguments, num_classes=7)))
    path = tmp_path / "net.safetensors"
    save(net, path)
    before = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(before, torch.get_rng_state())
    assert same_state(net, loaded)
    assert loaded.factory == net.factory
    assert not any(module.training for module in loaded.modules())
    gradients = [[p.requires_grad for p in each.parameters()] for each in (net, loaded)]
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_round_trip_with_a_model(num_levels: int, granularity: str, tmp_path: Path) -> None:
    net = packed_odd(num_levels=num_levels, granularity=granularity)
    path = tmp_path / "net.safetensors"
    save(net, path)
    model = Odd()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load(path, model=model)
    assert same_state(net, loaded)
    assert repr(net) == repr(loaded)
    assert isinstance(loaded.head, PackedLinear)
    assert loaded.head.granularity == "tensor"  # one channel: one codebook is all of them
    assert loaded.same.granularity == granularity
    assert (loaded.unsaved, loaded.none_yet) == (model.unsaved, None)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(loaded(x), net(x))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("kind", ["plain", "bayes", "packed", "meta"])
def test_models_of_every_kind_serve(kind: str, tmp_path: Path) -> None:
    net, path = packed_odd(), tmp_path / "net.safetensors"
    del net.unsaved
    save(net, path)
    with torch.device("meta" if kind == "meta" else "cpu"):
        model: nn.Module = Odd()
    del model.unsaved
    if kind in ("bayes", "packed"):
        model = bqnn.convert(model, skip=["plain"], num_levels=5)
    if kind == "packed":
        model = pack(model)
    assert same_state(net, load(path, model=model))


def test_meta_buffer_that_is_not_saved(tmp_path: Path) -> None:
    save(packed_odd(), tmp_path / "net.safetensors")
    with torch.device("meta"):
        model = Odd()
    with pytest.raises(ValueError, match="model must hold data in the buffer 'unsaved'"):
        load(tmp_path / "net.safetensors", model=model)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_and_execution_are_chosen_at_load(precision: str, lenet_file: Path) -> None:
    loaded = load(lenet_file, precision=precision, execution="packed")
    layers = [module for module in loaded.modules() if isinstance(module, (PackedLinear, PackedConv2d))]
    assert {(layer.precision, layer.execution) for layer in layers} == {(precision, "packed")}
    assert len(layers) == 5


def test_shared_layers_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    net = pack(bqnn.convert(Shared()))
    path = tmp_path / "net.safetensors"
    save(net, path)
    assert set(info(path)["tensors"]) == {
        *(f"first.{part}" for part in ("codes", "levels", "bias", "chances")),
        *(f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    loaded = load(path, model=Shared())
    assert loaded.first is loaded.again
    assert same_state(net, loaded)
    apart = load(path, model=Apart())
    assert apart.first is not apart.again
    assert same_state(net, apart)
    with torch.no_grad():
        apart.norm.weight.fill_(7.0)
        apart.first.bias.fill_(7.0)
    assert torch.equal(apart.norm_again.weight, net.norm.weight)
    assert torch.equal(apart.again.bias, net.first.bias)


def test_two_layers_do_not_fit_a_shared_one(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(pack(bqnn.convert(Apart())), path)
    with pytest.raises(FormatError, match="layers 'first' and 'again' are one in the model and two in the file"):
        load(path, model=Shared())


def test_a_single_layer(tmp_path: Path) -> None:
    layer = pack(bqnn.BayesLinear(7, 3))
    save(layer, tmp_path / "layer")
    assert same_state(layer, load(tmp_path / "layer", model=nn.Linear(7, 3)))


def test_the_file_keeps_its_dtype(tmp_path: Path) -> None:
    net = pack(bqnn.convert(models.lenet5())).bfloat16()
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert same_state(net, loaded)
    assert loaded.bn1.weight.dtype == torch.bfloat16
    assert loaded.conv1.levels.dtype == torch.float32


def test_nothing_is_unpickled(lenet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load(lenet_file)
    info(lenet_file)


def test_lenet_stays_within_its_budget(lenet_file: Path) -> None:
    described = info(lenet_file)
    assert len(described["tensors"]) == 31 + 5
    assert sum(tensor["bytes"] for tensor in described["tensors"].values()) == 16_044 + 5 * 36
    assert lenet_file.stat().st_size <= 19_800


def test_info(lenet_file: Path) -> None:
    described = info(lenet_file)
    assert described["version"] == 1
    assert described["bytes"] == os.path.getsize(lenet_file)
    tensors = described["tensors"]
    assert described["bytes"] == described["header_bytes"] + sum(tensor["bytes"] for tensor in tensors.values())
    assert tensors["fc1.codes"] == {"dtype": "U8", "shape": [120, 80], "bytes": 9600}
    assert described["factory"] == ["lenet5", {"in_channels": 1, "num_classes": 10, "image_size": 28}]
    assert list(described["layers"]) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert described["layers"]["conv1"] == {
        "kind": "conv2d",
        "shape": [6, 1, 5, 5],
        "padding": [2, 2],
        "num_levels": 3,
        "bytes": 6 * 5 + 12,
        "bits_per_weight": 1.6,
        "posterior_bytes": 36,
    }
    assert described["layers"]["fc3"]["bytes"] == 10 * 17 + 12 + 40


def test_it_is_a_safetensors_file(lenet: nn.Module, lenet_file: Path) -> None:
    stored = safetensors.torch.load_file(lenet_file)
    state = lenet.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)


def test_the_same_network_gives_the_same_bytes(lenet: nn.Module, lenet_file: Path, tmp_path: Path) -> None:
    save(load(lenet_file), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == lenet_file.read_bytes()


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "net"
    with pytest.raises(ValueError, match="net must have a Bayes or a packed layer"):
        save(models.lenet5(), path)
    net = packed_odd()
    net.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="tensor 'wide' must have a dtype"):
        save(net, path)
    net.wide = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match="tensor 'wide' must be dense and hold data"):
        save(net, path)
    net.wide = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match="tensor 'wide' must be dense and hold data"):
        save(net, path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(lenet: nn.Module, lenet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lenet_file.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                save(lenet, lenet_file)
        assert lenet_file.read_bytes() == before
        assert list(lenet_file.parent.iterdir()) == [lenet_file]


def test_a_link_is_followed(lenet: nn.Module, lenet_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(lenet_file)
    save(pack(bqnn.convert(models.lenet5(num_classes=3))), link)
    assert link.is_symlink()
    assert load(lenet_file).fc3.out_features == 3


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(FormatError, match=message):
        yield


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(packed_odd(), path)
    model = Odd()
    with pytest.raises(ValueError, match="model must be given"):
        load(path)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        load(path, model=Odd)  # type: ignore[arg-type]
    with refused("layer 'conv' is in the file and not in the model"):
        load(path, model=models.lenet5())
    model.conv = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=2, bias=False)
    with refused("layer 'conv' is .*'stride': \\[2, 1\\].* in the file and .*'stride': \\[1, 2\\].* in the model"):
        load(path, model=model)
    model = Odd()
    model.head = nn.Linear(7, 1, bias=False)
    with refused("tensor 'head.bias' is in the file and not in the model"):
        load(path, model=model)
    model.head = nn.ConvTranspose2d(4, 6, 3)
    with refused("layer 'head': model must have a layer of the kinds linear, .* there, got ConvTranspose2d"):
        load(path, model=model)
    model = Odd()
    model.extra = nn.Linear(2, 2)
    with refused("tensor 'extra.bias' is missing \\(2 of "):
        load(path, model=model)


def test_wrong_options(lenet_file: Path) -> None:
    with pytest.raises(ValueError, match="precision must be"):
        load(lenet_file, precision="fp16")
    with pytest.raises(ValueError, match="execution must be"):
        load(lenet_file, execution="fast")
