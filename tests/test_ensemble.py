"""Ensembles: compiled networks that run as one, the predictions made of them, and their files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import CompiledEnsemble
from bqnn.engine import compiled as module
from tests.support.compiled import Function, check_outputs, ops, randomized, reasons


def make(seed: int, classes: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 7, 3))
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(28, classes))
    return bqnn.pack(bqnn.convert(randomized(net, seed), **options))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


X = images(9)
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8", "calibration": [X, images(4, 1)]},
}


@pytest.fixture(scope="module")
def nets() -> list[nn.Module]:
    return [make(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def ensemble(nets: list[nn.Module]) -> CompiledEnsemble:
    return ensemble_of(nets)


def ensemble_of(nets: Any, *example: Tensor, **options: Any) -> CompiledEnsemble:
    found = bqnn.compile(nets, example or X, **options)
    assert isinstance(found, CompiledEnsemble)
    return found


def alone(nets: list[nn.Module], *inputs: Tensor, **options: Any) -> Tensor:
    return torch.stack([bqnn.compile(net, inputs or X, **options)(*inputs) for net in nets])


@pytest.mark.parametrize("precision", OPTIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_the_bits_are_those_of_the_networks_alone(nets: list[nn.Module], precision: str, count: int) -> None:
    options = OPTIONS[precision]
    ensemble = ensemble_of(tuple(nets[:count]), **options)
    single = [bqnn.compile(net, X, **options) for net in nets[:count]]
    assert len(ensemble.parts) == 1 and ensemble.num_networks == count
    for size in (9, 0, 1, 2, 130):
        found = ensemble(images(size, 2))
        assert found.shape == (count, size, 5)
        assert torch.equal(found, torch.stack([net(images(size, 2)) for net in single]))


def test_logits_are_those_of_the_networks(nets: list[nn.Module], ensemble: CompiledEnsemble) -> None:
    for net, logits in zip(nets, ensemble(X)):
        check_outputs(lambda _, logits=logits: logits, net, X)


def test_networks_of_different_kinds(nets: list[nn.Module]) -> None:
    others = [nets[0], make(5, num_levels=7), nn.Sequential(nn.Flatten(), nn.Linear(128, 5))]
    assert torch.equal(ensemble_of(others)(X), alone(others, X))


def test_a_calibration_that_can_be_read_once_serves_all(nets: list[nn.Module]) -> None:
    options = OPTIONS["int8"]
    found = ensemble_of(nets, precision="int8", calibration=iter(options["calibration"]))
    assert torch.equal(found(X), alone(nets, X, **options))


def test_what_is_alike_is_computed_once(nets: list[nn.Module]) -> None:
    quantized = ensemble_of(nets, **OPTIONS["int8"])
    assert ops(quantized).count("activation") == 1, "one copy of the input in 8 bits"
    assert ops(quantized).count("conv2d") == 6
    trunk, heads = nets[0][:-1], [nn.Linear(28, 5) for _ in range(3)]
    members = [nn.Sequential(copy.deepcopy(trunk), head) for head in heads]
    for options in OPTIONS.values():
        shared = ensemble_of(members, **options)
        assert (ops(shared).count("conv2d"), ops(shared).count("linear")) == (2, 3)
        assert torch.equal(shared(X), alone(members, X, **options))


def test_a_network_may_be_there_twice(nets: list[nn.Module], tmp_path: Path) -> None:
    twice = ensemble_of([nets[0], nets[1], nets[0]])
    assert ops(twice).count("linear") == 2
    assert torch.equal(twice(X), alone([nets[0], nets[1], nets[0]], X))
    bqnn.save(twice, tmp_path / "net")
    assert torch.equal(bqnn.load(tmp_path / "net")(X), twice(X))


def test_layers_that_differ_in_one_number_are_not_alike() -> None:
    first = nn.Conv2d(2, 3, 1)
    changed = {name: copy.deepcopy(first) for name in ("weight", "bias", "stride")}
    for name in ("weight", "bias"):
        tensor = getattr(changed[name], name)
        tensor.data.view(-1)[-1] = torch.nextafter(tensor.data.view(-1)[-1], torch.tensor(9.0))
    changed["stride"].stride = (2, 2)
    members = [nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()) for conv in (first, *changed.values())]
    members.append(nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    found = ensemble_of(members)
    assert ops(found).count("conv2d") == 5
    assert torch.equal(found(X), alone(members, X))
    pools = [nn.AvgPool2d(3, padding=1, count_include_pad=counted) for counted in (True, False)]
    assert torch.equal(ensemble_of(pools)(X), alone(pools, X))


def test_layers_whose_outputs_have_other_scales_are_not_alike() -> None:
    first, wide, narrow = nn.Conv2d(2, 3, 1), nn.Conv2d(6, 2, 8), nn.Conv2d(3, 2, 8)

    class Wide(nn.Module):
        """Puts what the first layer gives beside larger numbers, in whose scale it is then."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = first, wide

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(torch.cat([y, y * 9], 1))

    members = [nn.Sequential(first, narrow), Wide()]
    for precision, layers in (("fp32", 3), ("int8", 4)):
        found = ensemble_of(members, **OPTIONS[precision])
        assert ops(found).count("conv2d") == layers
        assert torch.equal(found(X), alone(members, X, **OPTIONS[precision]))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_networks_that_torch_runs_in_part(nets: list[nn.Module], precision: str, tmp_path: Path) -> None:
    def rolled(net: nn.Module) -> nn.Module:
        return Function(lambda x: net(nn.functional.relu(net[0](x))[:, :2].roll(1, 2)))

    members = [rolled(nets[0]), nets[1], rolled(nets[2])]
    found = ensemble_of(members, **OPTIONS[precision])
    assert len(found.parts) == 7
    assert "aten.roll" in reasons(found)
    assert "2.roll" in str(found)
    expected = alone(members, X, **OPTIONS[precision])
    for size in (9, 1, 0):
        assert torch.equal(found(X[:size]), expected[:, :size])
    with pytest.raises(ValueError, match="torch runs 0.roll"):
        bqnn.save(found, tmp_path / "net")


def test_several_inputs_whatever_their_names() -> None:
    class Named(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.head = nn.Linear(128, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.head((left - right).flatten(1))

    class Swapped(Named):
        def forward(self, right: Tensor, left: Tensor) -> Tensor:
            return self.head((right + left * 2).flatten(1))

    class First(Named):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.head(one.flatten(1))

    y = images(9, 3)
    members = [First(0), Named(0), Swapped(0), Named(1)]
    found = ensemble_of(members, X, y)
    assert [each.name for each in found.inputs] == ["one", "other"]
    assert torch.equal(found(X, y), torch.stack([bqnn.compile(net, (X, y))(X, y) for net in members]))
    with pytest.raises(TypeError, match="the network takes 2 inputs"):
        found(X)


def test_a_network_that_gives_its_input() -> None:
    members = [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.ReLU())]
    assert torch.equal(ensemble_of(members)(X), torch.stack([net(X) for net in members]))
    rows = torch.randn(3, 4)
    assert torch.equal(ensemble_of([nn.Identity(), nn.Identity()], rows)(rows), torch.stack([rows, rows]))


def test_without_the_extension(nets: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_isa", lambda: "none")
    assert torch.equal(ensemble_of(nets)(X), alone(nets, X))


def test_threads_share_one(nets: list[nn.Module]) -> None:
    ensemble = ensemble_of(nets)
    inputs = [images(size, size) for size in range(1, 17)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ensemble, inputs))
        probs = list(pool.map(lambda x: bqnn.predict(ensemble, x).probs, inputs))
    for x, y, p in zip(inputs, found, probs):
        assert torch.equal(y, ensemble(x))
        assert torch.equal(p, bqnn.predict(ensemble, x).probs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_logits_have_the_dtype_of_floating_inputs(dtype: torch.dtype, ensemble: CompiledEnsemble) -> None:
    x = (X.abs() * 50).to(dtype)
    found = ensemble(x)
    assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert torch.equal(found, ensemble(x.float()).to(found.dtype))


def test_copies(ensemble: CompiledEnsemble) -> None:
    for again in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert isinstance(again, CompiledEnsemble)
        assert torch.equal(again(X), ensemble(X))


def test_print(ensemble: CompiledEnsemble) -> None:
    lines = str(ensemble).splitlines()
    assert lines[:3] == ["CompiledEnsemble of 3 networks, fp32", "  input input [batch, 2, 8, 8]", "part 0, the engine"]
    assert [line.split()[0] for line in lines[3:] if " linear " in line] == [f"{i}.packed_linear" for i in range(3)]


# --- predictions ------------------------------------------------------------------------------------------------------


def formula(nets: list[nn.Module], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean probabilities, their entropy, and what is left of it without the mean of the networks' entropies."""
    with torch.no_grad():
        draws = torch.stack([copy.deepcopy(net).double()(x.double()).softmax(-1) for net in nets])
    mean = draws.sum(0) / len(nets)
    total = -(mean * mean.log()).sum(-1)
    return mean, total, total + (draws * draws.log()).sum(-1).sum(0) / len(nets)


def test_predictions_are_those_of_the_formula(nets: list[nn.Module], ensemble: CompiledEnsemble) -> None:
    expected = formula(nets, X)
    assert (expected[2] > 1e-3).all(), "the networks differ"
    for samples in (None, 3):
        found = bqnn.predict(ensemble, X, samples=samples)
        for want, have in zip(expected, found):
            assert have.dtype == torch.float32
            torch.testing.assert_close(have, want.float())


def test_predictions_of_several_inputs_by_place_and_by_name() -> None:
    weights = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    class Two(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return nn.functional.linear(a + b, self.weight)

    a, b = torch.randn(5, 4), torch.randn(5, 4)
    both = bqnn.compile([Two(weight) for weight in weights], (a, b))
    expected = bqnn.predict(bqnn.Ensemble([Two(weight) for weight in weights]), (a, b)).probs
    torch.testing.assert_close(bqnn.predict(both, (a, b)).probs, expected)
    torch.testing.assert_close(bqnn.predict(both, {"b": b, "a": a}).probs, expected)


def test_half_precision_inputs_are_float32_inside(ensemble: CompiledEnsemble) -> None:
    x = X.bfloat16()
    for found, expected in zip(bqnn.predict(ensemble, x), bqnn.predict(ensemble, x.float())):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_predictions_of_one_network_and_of_no_images(nets: list[nn.Module], ensemble: CompiledEnsemble) -> None:
    single = bqnn.predict(ensemble_of(nets[:1]), X)
    assert torch.equal(single.mutual_information, torch.zeros(9))
    assert torch.equal(single.probs, bqnn.predict(bqnn.compile(nets[0], X), X).probs)
    none = bqnn.predict(ensemble, X[:0])
    assert [each.shape for each in none] == [(0, 5), (0,), (0,)]


@pytest.mark.parametrize("samples", [0, 1, 4])
def test_other_samples_than_networks(samples: int, ensemble: CompiledEnsemble) -> None:
    with pytest.raises(ValueError, match=f"samples must be None, or the 3 networks of the ensemble, got {samples}"):
        bqnn.predict(ensemble, X, samples=samples)


# --- what is refused --------------------------------------------------------------------------------------------------


def heads(*functions: Callable[[Tensor], Any]) -> list[nn.Module]:
    return [nn.Flatten(), *map(Function, functions)]


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        pytest.param([], ValueError, "net must be a network, or one or more in a list, got none", id="none"),
        pytest.param([nn.Flatten(), 3], TypeError, "network 1: net must be a torch.nn.Module, got int", id="a-number"),
        pytest.param(
            [nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(7, 3)],
            ValueError,
            "network 2: net must be such that torch.export captures it",
            id="inputs",
        ),
        pytest.param(
            heads(lambda x: x.flatten(1), lambda x: x.flatten(1)[:, :3]),
            ValueError,
            r"network 2: must return \[batch, 128\] of float32, as network 0 does, got \[batch, 3\] of float32",
            id="outputs",
        ),
        pytest.param(
            heads(lambda x: x.flatten(1) > 0), ValueError, r"network 1: must return .* of bool", id="output-dtype"
        ),
        pytest.param(heads(lambda x: (x, x)), ValueError, "network 1: must return one tensor", id="two-outputs"),
        pytest.param(heads(lambda x: [x]), ValueError, "network 1: must return one tensor", id="a-list"),
        pytest.param(heads(lambda x: torch.ones(3)), ValueError, "network 1: must return one tensor", id="constant"),
        pytest.param(heads(lambda x: x.sum()), ValueError, "network 1: must return one tensor", id="a-sum"),
        pytest.param(heads(lambda x: x.flatten(0, 1)), ValueError, "network 1: must return one tensor", id="no-batch"),
        pytest.param(
            [nn.Linear(8, 3), nn.Linear(8, 3, device="meta")], ValueError, "network 1: net and example", id="meta"
        ),
    ],
)
def test_networks_that_do_not_fit_are_named(members: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bqnn.compile(members, X)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", OPTIONS)
def test_what_is_loaded_gives_the_same_bits(nets: list[nn.Module], precision: str, tmp_path: Path) -> None:
    ensemble = ensemble_of(nets, **OPTIONS[precision])
    bqnn.save(ensemble, tmp_path / "net")
    again = bqnn.load(tmp_path / "net")
    assert isinstance(again, CompiledEnsemble)
    assert str(again) == str(ensemble)
    assert torch.equal(again(X), ensemble(X))
    assert torch.equal(bqnn.predict(again, X).mutual_information, bqnn.predict(ensemble, X).mutual_information)
    assert len(bqnn.info(tmp_path / "net")["layers"]) == 9
