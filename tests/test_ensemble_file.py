"""Ensembles of networks as one module, and packed ones in one file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bqnn
from bqnn import Ensemble, FormatError, models, pack, predict, sample
from bqnn.files import container
from bqnn.packed.base import PackedLayer
from tests.support.compiled import Function

X = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))]


def make_bayes(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return bqnn.convert(models.lenet5(image_size=8), **{"num_levels": 3, "start_sigma": 0.4, **options}).eval()


def make_packed(seed: int, **options: Any) -> nn.Module:
    return pack(make_bayes(seed, **options), execution="packed")


def own(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def own_packed(seed: int, width: int = 6, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return pack(bqnn.convert(own(width), **options), execution="packed")


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble([make_packed(seed) for seed in range(3)])


@pytest.fixture
def file(ensemble: Ensemble, tmp_path: Path) -> Path:
    bqnn.save(ensemble, tmp_path / "ensemble")
    return tmp_path / "ensemble"


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# --- the module -------------------------------------------------------------------------------------------------------


def test_an_ensemble_asks_all_its_networks(ensemble: Ensemble) -> None:
    logits = ensemble(X)
    assert logits.shape == (3, 7, 10) and ensemble.num_networks == len(ensemble) == 3
    for index, network in enumerate(ensemble):
        assert torch.equal(logits[index], network(X)) and ensemble[index] is network
    assert isinstance(ensemble[1:], Ensemble) and torch.equal(ensemble[1:](X), logits[1:])


@pytest.mark.parametrize(
    ("networks", "error", "message"),
    [
        pytest.param([], ValueError, "networks must have one network or more, got none", id="none"),
        pytest.param(own(), TypeError, "networks must be a list of modules, got one module, Sequential", id="module"),
        pytest.param(3, TypeError, "networks must be a list of modules, got int", id="number"),
        pytest.param([own(), 3], TypeError, "networks must be modules, got int at 1", id="a-number"),
    ],
)
def test_wrong_networks(networks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Ensemble(networks)


def test_networks_with_outputs_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"network 1: must return one tensor.*\[7, 2\], got \[7, 3\]"):
        Ensemble([nn.Linear(4, 2), nn.Linear(4, 3)])(torch.zeros(7, 4))
    with pytest.raises(TypeError, match="output must be a tensor, a tuple with one, .*got NoneType"):
        Ensemble([Function(lambda x: None)])(torch.zeros(7, 4))


@pytest.mark.parametrize("kind", [make_bayes, make_packed])
@pytest.mark.parametrize("batches", [None, BATCHES], ids=["own-statistics", "batches"])
def test_predict_averages_networks_and_their_samples(kind: Callable[[int], nn.Module], batches: Any) -> None:
    ensemble = Ensemble([kind(seed) for seed in range(3)]).train()
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    networks = [kind(seed) for seed in range(3)]
    with torch.no_grad():
        own_draws = torch.stack([network(X).softmax(-1) for network in networks])
        numbers = [sample(networks[k // 2], 9 + k, batches)(X).softmax(-1) for k in range(6)]
    for samples in (None, 3):
        found = predict(ensemble, X, samples, batches=batches)
        assert torch.equal(found.probs, own_draws.double().mean(0).float())
        assert (found.mutual_information > 1e-4).all()
    found = predict(ensemble, X, samples=6, seed=9, batches=batches)
    assert torch.equal(found.probs, torch.stack(numbers).double().mean(0).float())
    assert ensemble.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())


def test_samples_that_an_ensemble_has_not() -> None:
    ensemble = Ensemble([make_packed(0), sample(make_packed(1), seed=0)])
    for samples in (1, 5):
        with pytest.raises(ValueError, match=f"samples must be a multiple of the 2 networks of net, got {samples}"):
            predict(ensemble, X, samples=samples)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        predict(ensemble, X, samples=0)
    with pytest.raises(ValueError, match="network 1: net has no Bayes layer with a posterior to draw 2 samples"):
        predict(ensemble, X, samples=4)


def test_an_ensemble_is_sampled_packed_and_compiled_as_its_networks_are(ensemble: Ensemble) -> None:
    drawn = sample(ensemble, seed=4)
    assert isinstance(drawn, Ensemble) and not torch.equal(drawn(X), ensemble(X))
    assert all(layer.chances is None for layer in drawn.modules() if isinstance(layer, PackedLayer))
    bayes = Ensemble([make_bayes(seed) for seed in range(2)])
    assert same_state(pack(bayes), Ensemble([make_packed(seed) for seed in range(2)]))
    compiled = bqnn.compile(ensemble, X)
    assert isinstance(compiled, bqnn.CompiledEnsemble)
    assert torch.equal(compiled(X), bqnn.compile(list(ensemble), X)(X))
    torch.testing.assert_close(predict(compiled, X).probs, predict(ensemble, X).probs)


def test_a_relu_is_packed_with_the_layer_before_it_in_each_network(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))

    torch.manual_seed(0)
    bayes = Ensemble([bqnn.convert(net()) for _ in range(2)])
    packed = pack(bayes, execution="packed")
    assert [network[1].relu for network in packed] == [True, True]
    assert torch.equal(packed(X), Ensemble([pack(each, execution="packed") for each in bayes])(X))
    bqnn.save(packed, tmp_path / "net")
    assert [network[1].relu for network in bqnn.load(tmp_path / "net", model=net())] == [True, True]
    shared = nn.Sequential(*bayes[0])
    assert not pack(Ensemble([bayes[0], shared]))[0][1].relu, "another network may look in between"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_ensemble_back(ensemble: Ensemble, file: Path) -> None:
    loaded = bqnn.load(file, execution="packed")
    assert isinstance(loaded, Ensemble) and same_state(ensemble, loaded)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(X), ensemble(X))
    assert [network.factory for network in loaded] == [network.factory for network in ensemble]
    assert torch.equal(predict(loaded, X, 6, seed=0).probs, predict(ensemble, X, 6, seed=0).probs)
    assert {layer.precision for layer in bqnn.load(file, precision="int8").modules() if hasattr(layer, "codes")} == {
        "int8"
    }
    bqnn.save(loaded, file.with_name("again"))
    assert file.with_name("again").read_bytes() == file.read_bytes()


def test_networks_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own"
    ensemble = Ensemble([own_packed(seed, num_levels=2 + seed) for seed in range(3)])
    bqnn.save(ensemble, path)
    model = own()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = bqnn.load(path, model=model)
    assert same_state(ensemble, loaded) and [network[1].num_levels for network in loaded] == [2, 3, 4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len({id(tensor) for tensor in loaded.buffers()}) == len(list(loaded.buffers())), "networks are apart"
    with pytest.raises(ValueError, match="model must be given"):
        bqnn.load(path)
    with pytest.raises(FormatError, match="network 0: layer '1' is .* in the file and .* in the model"):
        bqnn.load(path, model=own(7))
    with pytest.raises(FormatError, match="network 0: layer"):
        bqnn.load(path, model=Ensemble([own(), own(), own()]))


def test_a_single_layer_and_a_single_network(tmp_path: Path) -> None:
    layers = Ensemble([pack(bqnn.BayesLinear(7, 3)) for _ in range(2)])
    bqnn.save(layers, tmp_path / "layers")
    assert same_state(layers, bqnn.load(tmp_path / "layers", model=nn.Linear(7, 3)))
    one = Ensemble([own_packed(0)])
    bqnn.save(one, tmp_path / "one")
    assert same_state(one, bqnn.load(tmp_path / "one", model=own()))
    assert bqnn.info(tmp_path / "one")["networks"] == 1


def test_what_networks_have_in_common_is_stored_once(tmp_path: Path) -> None:
    packed, path = make_packed(0), tmp_path / "samples"
    ensemble = Ensemble([sample(packed, seed) for seed in range(4)])
    bqnn.save(ensemble, path)
    stored = safetensors.torch.load_file(path)
    different = {name for name in packed.state_dict() if name.endswith(".codes")}
    names = {name.partition(".")[2] for name in stored if not name.startswith("0.")}
    assert names == different and len(different) == 5
    described = bqnn.info(path)
    sizes = [layer["bytes"] + layer["posterior_bytes"] for layer in described["layers"].values()]
    assert sum(sizes) < sum(tensor["bytes"] for tensor in described["tensors"].values())
    assert described["layers"]["3.fc3"]["bytes"] == 10 * 17, "codes; levels and bias are those of the first"
    loaded = bqnn.load(path)
    assert same_state(ensemble, loaded)
    with torch.no_grad():
        loaded[0].bn1.weight.fill_(7.0)
    assert torch.equal(loaded[1].bn1.weight, packed.bn1.weight), "what is one in the file alone is copied"


def test_a_module_that_is_twice_in_an_ensemble(tmp_path: Path) -> None:
    packed = own_packed(0)
    bqnn.save(Ensemble([packed, packed]), tmp_path / "twice")
    loaded = bqnn.load(tmp_path / "twice", model=own())
    assert len(loaded) == 2 and same_state(loaded[0], packed) and same_state(loaded[1], packed)


def test_info_of_an_ensemble(ensemble: Ensemble, file: Path, tmp_path: Path) -> None:
    described = bqnn.info(file)
    assert described["networks"] == 3
    assert described["factory"] == ["lenet5", {"in_channels": 1, "num_classes": 10, "image_size": 8}]
    names = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert list(described["layers"]) == [f"{index}.{name}" for index in range(3) for name in names]
    bqnn.save(ensemble[1], tmp_path / "one")
    alone = bqnn.info(tmp_path / "one")
    assert alone["networks"] == 1
    described["layers"]["1.fc3"]["bytes"] += 40  # the bias, zeros as in network 0
    assert {name: described["layers"][f"1.{name}"] for name in names} == alone["layers"]
    bqnn.save(bqnn.compile(ensemble, X), tmp_path / "compiled")
    assert bqnn.info(tmp_path / "compiled")["networks"] == 3


def test_wrappers_are_left_out(ensemble: Ensemble, file: Path) -> None:
    wrapped = Ensemble([nn.DataParallel(network) for network in ensemble])
    bqnn.save(wrapped, file.with_name("wrapped"))
    assert file.with_name("wrapped").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        pytest.param(
            lambda: [make_packed(0), own_packed(0)], "network 1: must have the architecture of network 0", id="kind"
        ),
        pytest.param(
            lambda: [own_packed(0), own_packed(0, 7)], "network 1: must have the architecture of network 0", id="width"
        ),
        pytest.param(lambda: [own_packed(0), own()], "a packed layer, in an ensemble each network", id="not-packed"),
        pytest.param(lambda: [make_packed(0), changed()], "network 1: net must be what its attribute", id="changed"),
    ],
)
def test_what_can_not_be_saved(networks: Callable[[], list[nn.Module]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        bqnn.save(Ensemble(networks()), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def changed() -> nn.Module:
    net = make_packed(1)
    net.bn1.eps = 0.5
    return net


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Changes metadata and tensors of a file and writes it with right CRCs."""
    contents = container.read(io.BytesIO(path.read_bytes()))
    metadata, tensors = dict(contents.metadata), contents.tensors()
    del metadata["version"]
    change(metadata, tensors)
    path.write_bytes(container.to_bytes(tensors, metadata))


def renamed(names: dict[str, Any], old: str, new: str) -> None:
    names[new] = names.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m, t: m.update(ensemble=2), "layers must be of the 2 networks of ensemble", id="fewer"),
        pytest.param(lambda m, t: m.update(ensemble=2**62), "ensemble must be .* 1 to 1000, got", id="huge"),
        pytest.param(lambda m, t: m.update(ensemble=4), "layers must be of the 4 networks of ensemble", id="more"),
        pytest.param(lambda m, t: m.update(ensemble=0), "ensemble must be .* got 0", id="none"),
        pytest.param(lambda m, t: m.update(ensemble=True), "ensemble must be a number of networks", id="bool"),
        pytest.param(lambda m, t: m.update(ensemble=None), "ensemble must be a number of networks", id="null"),
        pytest.param(lambda m, t: m.pop("ensemble"), "layer '0.conv1' is in the file and not in the model", id="lost"),
        pytest.param(lambda m, t: m.update(factory=["vgg7", {}]), "network 0: layer 'conv1' is", id="factory"),
        pytest.param(
            lambda m, t: t.pop("2.fc1.codes"), "tensor '2.fc1.codes' is missing", id="codes"
        ),
        pytest.param(lambda m, t: m["alias"].pop("1.bn1.bias"), "network 1: tensor 'bn1.bias' is missing", id="alias"),
        pytest.param(
            lambda m, t: t.update({"1.more": torch.zeros(1)}), "network 1: tensor 'more' is unexpected", id="alien"
        ),
        pytest.param(
            lambda m, t: t.update({"3.more": torch.zeros(1)}), "tensor '3.more' is of none of the 3", id="outside"
        ),
        pytest.param(lambda m, t: renamed(m["layers"], "1.fc1", "01.fc1"), "tensor '01.fc1.codes'", id="number"),
        pytest.param(
            lambda m, t: t.update({"2.fc3.levels": torch.zeros(1, 3)}),
            "network 2: fc3.levels must be finite and strictly increasing",
            id="levels",
        ),
    ],
)  # fmt: skip
def test_wrong_contents(change: Callable[[Any, Any], object], message: str, file: Path) -> None:
    rewrite(file, lambda metadata, tensors: None)
    bqnn.load(file)
    rewrite(file, change)
    with pytest.raises(FormatError, match=f"{file}: .*{message}"):
        bqnn.load(file)
