"""The posterior of packed networks: tables of chances, the codes that are drawn with them, and their files."""

from __future__ import annotations

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bqnn
from bqnn import BayesConv2d, BayesLinear, PackedConv2d, PackedLinear, pack, predict, sample
from bqnn.bayes.layers import bayes_layers
from bqnn.core.chances import chances_of, draw_codes
from bqnn.core.codes import pack_codes, unpack_codes
from bqnn.core.philox import Noise, random_words
from bqnn.core.quantizer import Posterior
from bqnn.packed.base import PackedLayer
from tests.support.odd_nets import Tied, TiedRows

X = torch.randn(9, 2, 6, 6, generator=torch.Generator().manual_seed(1))
BATCHES = [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


def make_bayes(gathered: bool = True, deviation: float = 0.35, **options: Any) -> nn.Sequential:
    """A network whose means lie at their levels, if ``gathered``; posterior deviations are ``deviation`` gaps."""
    torch.manual_seed(0)
    layers = (BayesConv2d(2, 40, 3, **options), nn.BatchNorm2d(40), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*layers, BayesLinear(640, 50, **options), nn.ReLU(), BayesLinear(50, 4, **options))
    for layer in bayes_layers(net).values():
        layer.start_sigma = deviation
        layer.reset_variances_()
        if gathered:
            with torch.no_grad():
                layer.mean.copy_(layer.quantized_weight())
    return net.eval()


def make_packed(**options: Any) -> nn.Module:
    """The same, packed; of the two ways to run, whose sums round differently, the layers keep to one."""
    return pack(make_bayes(**options), execution="packed")


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def packed_layers(net: nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, PackedLayer)}


def codes_of(layer: Any) -> Tensor:
    """Of each weight, as a matrix; of a Bayes layer or a packed one."""
    if isinstance(layer, PackedLayer):
        return unpack_codes(layer.codes, layer.num_levels, layer.decode()[0].numel())
    return layer.codes().flatten(1)


# --- the table --------------------------------------------------------------------------------------------------------


def expected_table(layer: Any) -> Tensor:
    """Weight by weight, with another function of the normal distribution; float64."""
    mean, sigma = layer.mean.detach().double().flatten(1), (0.5 * layer.log_sigma2.detach().double()).exp().flatten(1)
    thresholds = layer.codebook()[1].detach().double().expand(len(mean), -1)
    below = [torch.zeros_like(mean), *(torch.special.ndtr((t[:, None] - mean) / sigma) for t in thresholds.unbind(1))]
    chances = torch.stack([*below, torch.ones_like(mean)], -1).diff(dim=-1)
    codes = (mean[..., None] > thresholds[:, None, :]).sum(-1)
    rows = [chances[codes == m].mean(0) if (codes == m).any() else torch.eye(layer.num_levels)[m].double()
            for m in range(layer.num_levels)]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [2, 3, 5, 16])
def test_the_table_is_the_mean_of_the_chances(num_levels: int, granularity: str, partition: str) -> None:
    options = {"num_levels": num_levels, "granularity": granularity, "partition": partition}
    net = make_bayes(False, **options)
    torch.manual_seed(1)
    for layer in bayes_layers(net).values():
        with torch.no_grad():
            layer.log_sigma2 += torch.randn_like(layer.log_sigma2)
            if partition == "learned":
                layer.raw_thresholds += torch.randn_like(layer.raw_thresholds)
    for name, packed in packed_layers(pack(net)).items():
        table, expected = packed.chances, expected_table(bayes_layers(net)[name])
        assert table.dtype == torch.float32 and table.shape == (num_levels, num_levels)
        assert (table - expected).abs().max() < 1e-7
        assert (table.double().sum(1) - 1.0).abs().max() < 1e-6


def test_blocks_of_channels_make_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_bayes(False)
    whole = pack(net)
    monkeypatch.setattr("bqnn.core.chances._BLOCK", 1500)
    for name, layer in packed_layers(pack(net)).items():
        torch.testing.assert_close(layer.chances, packed_layers(whole)[name].chances, rtol=1e-6, atol=0.0)


def test_a_code_that_no_weight_has_stays() -> None:
    layer = BayesLinear(6, 5, num_levels=4)
    with torch.no_grad():
        layer.mean.fill_(layer.levels[0, 2])
    table = pack(nn.Sequential(layer))[0].chances
    assert torch.equal(table[[0, 1, 3]], torch.eye(4)[[0, 1, 3]]) and table[2, 2] < 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_table_is_float32_whatever_the_network_is(dtype: torch.dtype) -> None:
    net = make_bayes().to(dtype)
    packed = pack(net)
    for name, layer in packed_layers(packed).items():
        assert layer.chances.dtype == torch.float32
        assert (layer.chances - expected_table(bayes_layers(net)[name])).abs().max() < 1e-7
    tables = {name: layer.chances for name, layer in packed_layers(packed).items()}
    for name, layer in packed_layers(packed.half().double()).items():
        assert layer.chances is tables[name] or torch.equal(layer.chances, tables[name])
        assert layer.chances.dtype == torch.float32


def test_only_a_posterior_has_a_table() -> None:
    net = make_bayes()
    net[4].estimator = "deterministic"
    packed = pack(net)
    assert [layer.chances is None for layer in packed_layers(packed).values()] == [False, True, False]
    found = sample(packed, seed=0)
    assert torch.equal(found[4].codes, packed[4].codes) and not torch.equal(found[0].codes, packed[0].codes)


def test_layers_that_share_a_posterior_share_table_and_draw(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = pack(bqnn.convert(Tied(), 3, start_sigma=0.4))
    bqnn.save(packed, tmp_path / "net")
    loaded = bqnn.load(tmp_path / "net", model=Tied())
    assert "b.chances" not in bqnn.info(tmp_path / "net")["tensors"]
    for net in (packed, loaded, copy.deepcopy(packed)):
        assert net.a.chances is net.b.chances is not None
        found = sample(net, seed=3)
        assert found.a.codes is found.b.codes and not torch.equal(found.a.codes, packed.a.codes)


def test_who_reads_the_weight_sees_the_draw() -> None:
    torch.manual_seed(0)
    packed, x = pack(bqnn.convert(TiedRows(), 3, start_sigma=0.4), execution="packed"), torch.arange(30)
    found = sample(packed, seed=0)
    weight = found.head.decode()
    assert not torch.equal(weight, packed.head.decode())
    torch.testing.assert_close(found(x), weight @ weight.T)
    draws = torch.stack([sample(packed, seed=k)(x).softmax(-1) for k in range(2)])
    torch.testing.assert_close(predict(packed, x, samples=2, seed=0).probs, draws.mean(0))


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 3, 16])
@pytest.mark.parametrize("count", [1, 6, 4 * (1 << 14) + 3], ids=["one", "six", "blocks"])
def test_a_code_is_the_cell_of_its_word(count: int, num_levels: int) -> None:
    draw = torch.Generator().manual_seed(count)
    chances = torch.rand(num_levels, num_levels, generator=draw).softmax(1)
    codes = torch.randint(num_levels, (count,), generator=draw, dtype=torch.uint8)
    found = draw_codes(codes, chances, Noise(torch.tensor(2**62 + 5), 7))
    words = random_words(2**62 + 5, 7, 0, -(-count // 4), torch.device("cpu")).t().flatten()[:count]
    sums = chances.double().cumsum(1)
    shares = sums / sums[:, -1:]
    expected = (((words.double() + 0.5) / 2**32)[:, None] >= shares[codes.long()]).sum(1)
    assert torch.equal(found.long(), expected)
    assert found.dtype == torch.uint8 and found.shape == (count,)
    if count > 100:
        assert torch.equal(draw_codes(codes[None, :100], chances, Noise(torch.tensor(2**62 + 5), 7))[0], found[:100])


def test_a_word_at_a_bound_is_of_the_higher_code(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([0, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1])
    monkeypatch.setattr(Noise, "words", lambda self, count, device: iter([(slice(0, count), words)]))
    for code, chances in enumerate(([0.25, 0.25, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0])):
        table = torch.tensor([chances] * 3)
        found = draw_codes(torch.full((6,), code, dtype=torch.uint8), table, Noise(torch.tensor(0), 0))
        assert found.tolist() == [[0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1]][code]


def test_what_has_no_chance_is_never_drawn() -> None:
    chances = torch.tensor([[0.0, 0.25, 0.75, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0]])
    codes = torch.arange(4, dtype=torch.uint8).repeat_interleave(50_000)
    found = draw_codes(codes, chances * 0.999999, Noise(torch.tensor(3), 0)).view(4, -1)
    counts = torch.stack([row.bincount(minlength=4) for row in found])
    assert torch.equal(counts > 0, chances > 0.0)
    deviation = (50_000 * chances * (1.0 - chances)).sqrt()
    assert ((counts - 50_000 * chances).abs() <= 5.0 * deviation).all()


class Memory(TorchDispatchMode):
    """Inside, the most bytes that the results of operations have taken at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        storage = found.untyped_storage() if isinstance(found, Tensor) else None
        if storage is not None and storage.data_ptr() not in self.live:
            self.live[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, storage.data_ptr())
        self.peak = max(self.peak, sum(self.live.values()))
        return found


def test_few_bytes_a_weight_are_taken() -> None:
    layer = pack(BayesLinear(2000, 2000))
    size = layer.posterior_size()
    with Memory() as memory:
        layer.draw(Noise(torch.tensor(0), 0))
    assert size < memory.peak < 6 * size, "a block has 65,536 weights, whose words alone take 8 bytes each"


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_sample_is_a_plain_packed_network(granularity: str) -> None:
    packed = make_packed(granularity=granularity)
    before = state(packed)
    found = sample(packed, seed=3)
    assert not any(module.training for module in found.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.state_dict().items())
    for name, layer in packed_layers(found).items():
        original = packed_layers(packed)[name]
        assert layer.chances is None and type(layer) is type(original)
        assert torch.equal(layer.levels, original.levels)
        changed = (codes_of(layer) != codes_of(original)).float().mean().item()
        assert 0.05 < changed < 0.3
    assert same_state(sample(packed, seed=3), found) and not same_state(sample(packed, seed=4), found)
    torch.manual_seed(5)
    first = sample(packed)
    torch.manual_seed(5)
    assert same_state(sample(packed), first)
    with pytest.raises(ValueError, match="nor a packed one with chances"):
        sample(found)


def test_draws_are_those_of_the_posterior_that_was_packed() -> None:
    net = make_bayes(num_levels=4)
    packed = pack(net)
    for name, layer in packed_layers(packed).items():
        codes, draws = codes_of(layer).flatten().long(), 40
        tables = torch.zeros(2, 4, 4)
        for seed in range(draws):
            for table, source in zip(tables, (net, packed), strict=True):
                found = codes_of(sample(source, seed).get_submodule(name)).flatten().long()
                table += (4 * codes + found).bincount(minlength=16).view(4, 4)
        counts = tables.sum(2, keepdim=True)
        assert torch.equal(counts[0], counts[1]) and counts.min() > 100
        deviation = (counts * layer.chances * (1.0 - layer.chances)).sqrt()
        assert ((tables - counts * layer.chances).abs() < 5.0 * deviation + 1.0).all(), name


def test_predictions_are_those_of_the_posterior_that_was_packed() -> None:
    net = make_bayes()
    packed = pack(net)
    one, other = (predict(source, 20.0 * X, samples=200, seed=0) for source in (net, packed))
    assert (one.probs - other.probs).abs().max() < 0.1
    assert one.mutual_information.mean() > 0.1
    assert abs(one.mutual_information.mean() / other.mutual_information.mean() - 1.0) < 0.2


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["own-statistics", "batches"])
def test_predict_averages_samples(batches: Any) -> None:
    packed = make_packed().train()
    before = state(packed)
    found = predict(packed, 20.0 * X, samples=3, seed=11, batches=batches)
    with torch.no_grad():
        draws = torch.stack([sample(packed, 11 + k, batches)(20.0 * X).softmax(-1) for k in range(3)])
    assert torch.equal(found.probs, draws.double().mean(0).float())
    assert (found.mutual_information > 1e-3).all()
    assert packed.training and all(torch.equal(tensor, before[name]) for name, tensor in packed.state_dict().items())
    assert torch.equal(predict(packed, X).probs, packed.eval()(X).softmax(-1))


def test_statistics_are_those_of_the_sample() -> None:
    packed = make_packed()
    found = sample(packed, seed=2, batches=iter(BATCHES))
    activations = torch.cat([found[0](x) for x in BATCHES])
    torch.testing.assert_close(found[1].running_mean, activations.mean((0, 2, 3)))
    assert not torch.equal(found[1].running_mean, packed[1].running_mean)


def test_threads_predict_at_once() -> None:
    packed = make_packed()
    alone = [predict(packed, X, samples=2, seed=seed).probs for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: predict(packed, X, samples=2, seed=seed).probs, range(4)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_network_may_be_packed_in_part() -> None:
    net = make_bayes()
    net[4] = pack(net[4], execution="packed")
    found = sample(net, seed=1)
    assert isinstance(found[4], PackedLinear) and found[4].chances is None
    assert found[0].estimator == "deterministic"
    assert not torch.equal(found[0].codes(), net[0].codes()) and not torch.equal(found[4].codes, net[4].codes)
    with torch.no_grad():
        draws = torch.stack([sample(net, k)(X).softmax(-1) for k in range(2)])
    assert torch.equal(predict(net, X, samples=2, seed=0).probs, draws.double().mean(0).float())


# --- layers, files, compiled networks ---------------------------------------------------------------------------------


def test_a_state_dict_brings_its_table_or_none() -> None:
    packed, plain = make_packed(), sample(make_packed(), seed=0)
    into_plain, into_packed = copy.deepcopy(plain), copy.deepcopy(packed)
    into_plain.load_state_dict(packed.state_dict())
    into_packed.load_state_dict(plain.state_dict())
    assert same_state(into_plain, packed) and same_state(into_packed, plain)
    assert into_packed[0].chances is None
    bad = {**packed.state_dict(), "0.chances": torch.ones(3, 3)}
    with pytest.raises(RuntimeError, match="0.chances must be from 0 to 1"):
        copy.deepcopy(plain).load_state_dict(bad)


@pytest.mark.parametrize(
    ("chances", "error", "message"),
    [
        pytest.param(torch.eye(2), ValueError, r"chances must have the shape \[3, 3\], got \[2, 2\]", id="shape"),
        pytest.param(torch.eye(3).double(), TypeError, "chances must be torch.float32, got torch.float64", id="dtype"),
        pytest.param(torch.eye(3) - 0.1, ValueError, "chances must be from 0 to 1", id="negative"),
        pytest.param(torch.eye(3) * torch.nan, ValueError, "chances must be from 0 to 1", id="nan"),
        pytest.param(torch.eye(3) * 0.9999, ValueError, "with rows that sum to 1", id="sums"),
        pytest.param(torch.eye(3).to("meta"), ValueError, "chances is on meta", id="device"),
        pytest.param([[1.0]], TypeError, "chances must be a tensor", id="list"),
    ],
)
def test_wrong_tables(chances: Any, error: type[Exception], message: str) -> None:
    codes, levels = pack_codes(torch.zeros(5, 8, dtype=torch.uint8), 3), torch.tensor([[0.0, 1.0, 2.0]])
    PackedLinear(8, codes, levels, chances=torch.eye(3))
    with pytest.raises(error, match=message):
        PackedLinear(8, codes, levels, chances=chances)
    with pytest.raises(error, match=message):
        PackedConv2d(2, 2, codes, levels, chances=chances)
    layer = PackedLinear(8, codes, levels, chances=torch.eye(3))
    if isinstance(chances, Tensor):
        layer.chances = chances
        with pytest.raises(error, match=message):
            sample(layer, seed=0)


def test_a_file_keeps_the_posterior(tmp_path: Path) -> None:
    packed, path = make_packed(num_levels=5), tmp_path / "net"
    bqnn.save(packed, path)
    loaded = bqnn.load(path, model=make_bayes(), execution="packed")
    assert same_state(packed, loaded) and loaded[0].chances is not None
    assert torch.equal(predict(packed, X, 3, seed=0).probs, predict(loaded, X, 3, seed=0).probs)
    described = bqnn.info(path)
    assert [layer["posterior_bytes"] for layer in described["layers"].values()] == [100, 100, 100]
    assert described["layers"]["4"]["bytes"] == 50 * 214 + 20 + 200
    bqnn.save(sample(packed, seed=1), tmp_path / "plain")
    assert {layer["posterior_bytes"] for layer in bqnn.info(tmp_path / "plain")["layers"].values()} == {0}
    assert same_state(bqnn.load(tmp_path / "plain", model=make_bayes()), sample(packed, seed=1))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_compiled_networks_are_of_the_means_or_of_samples(precision: str) -> None:
    packed = make_packed()
    plain = copy.deepcopy(packed)
    for layer in packed_layers(plain).values():
        layer.chances = None
    options: dict[str, Any] = {"precision": precision, "calibration": BATCHES if precision == "int8" else None}
    compiled = bqnn.compile(packed, X, **options)
    assert torch.equal(compiled(X), bqnn.compile(plain, X, **options)(X))
    nets = [sample(packed, seed) for seed in range(3)]
    ensemble = bqnn.compile(nets, X, **options)
    if precision == "fp32":
        torch.testing.assert_close(predict(ensemble, X).probs, predict(packed, X, samples=3, seed=0).probs)
    for logits, net in zip(ensemble(X), nets, strict=True):
        assert torch.equal(logits, bqnn.compile(net, X, **options)(X))


def test_chances_of_codes_on_their_thresholds_are_halves() -> None:
    weight, thresholds = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])
    posterior = Posterior(weight, torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]]), thresholds)
    table = chances_of(posterior, torch.zeros(1, 2, dtype=torch.uint8))
    assert torch.equal(table, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
