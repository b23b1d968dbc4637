"""Networks with Bayes layers in files: what is loaded predicts, and trains on, to the same bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import FormatError, models
from bqnn.bayes.layers import bayes_layers
from bqnn.files.network import info, load, save
from tests.support.mutations import put_together, taken_apart
from tests.support.packed_nets import Apart, Odd, Shared

X = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 10
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_levels": 4, "estimator": "sample", "granularity": "channel", "start_sigma": 0.5},
    {"num_levels": 2, "estimator": "local", "partition": "learned", "quantize_mean": True, "coarse_variance": False},
    {"estimator": "deterministic", "prior": "gaussian"},
    {"prior": "mixture", "spike_width": 0.5, "slab_share": 0.3, "granularity": "channel", "partition": "learned"},
]


class Tied(nn.Module):
    """An embedding, and two layers, that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head, self.other = nn.Linear(5, 7, bias=False), nn.Linear(5, 7)
        self.head.weight = self.other.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(self.inner(self.embed(x))))
        return self.head(y) + self.other(y)


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def learning(net: nn.Module) -> dict[str, bool]:
    return {name: each.requires_grad for name, each in net.named_parameters(remove_duplicate=False)}


def train(net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Two steps, from the same seed whatever has been drawn before."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(bqnn.parameter_groups(net.train(), lr=1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        bqnn.elbo(net(x), y, net, dataset_size=100).loss.backward()
        optimizer.step()
    return net


class Words(nn.Module):
    """Every kind of layer over a sequence, and one that is composed of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=2, scale_grad_by_freq=True)
        self.conv = nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular", groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
        self.recurrence = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
        self.up, self.up2 = nn.ConvTranspose1d(6, 2, 3, stride=2), nn.ConvTranspose2d(2, 1, (1, 2), groups=1)
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)
        y = self.recurrence(self.attention(y, y, y)[0])[0]
        return self.head(self.up2(self.up(y.transpose(1, 2)).unsqueeze(2)).flatten(1))


def own() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 10))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_a_network_predicts_and_trains_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = own() if options else models.lenet5(image_size=8)
    net = train(bqnn.convert(made, **options), X, Y).eval()
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net", model=own() if options else None)
    assert not any(module.training for module in loaded.modules())
    assert repr(loaded) == repr(net) and same(net, loaded) and learning(net) == learning(loaded)
    for name, layer in bayes_layers(net).items():
        twin = bayes_layers(loaded)[name]
        assert all(getattr(twin, each) == getattr(layer, each) for each in ("quantize_mean", "coarse_variance"))
    assert torch.equal(net(X), loaded(X))
    if options.get("estimator") != "deterministic":
        draws = [bqnn.predict(each, X, samples=2, seed=5) for each in (net, loaded)]
        assert torch.equal(draws[0].probs, draws[1].probs)
    assert same(train(net, X, Y), train(loaded, X, Y))
    assert same(bqnn.pack(net), bqnn.pack(loaded))


@pytest.mark.parametrize(
    ("model", "options"), [pytest.param(*each, id=each[0]) for each in zip(("plain", "bayes", "packed"), OPTIONS)]
)
def test_layers_of_every_kind(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(7, (5, 5)), torch.arange(5)
    net = train(bqnn.convert(Words(), **options), x, y).eval()
    save(net, tmp_path / "net")
    forms = {"plain": Words, "bayes": lambda: bqnn.convert(Words()), "packed": lambda: bqnn.pack(bqnn.convert(Words()))}
    loaded = load(tmp_path / "net", model=forms[model]())
    assert repr(loaded) == repr(net) and same(net, loaded) and learning(net) == learning(loaded)
    assert torch.equal(net(x), loaded(x)) and len(info(tmp_path / "net")["layers"]) == 13
    assert same(train(net, x, y), train(loaded, x, y)), "with the gradients of its rows scaled as they were"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    net = bqnn.convert(own(), skip=["0"]).to(dtype)
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net", model=own())
    assert same(net, loaded) and loaded[4].weight.dtype == dtype and type(loaded[0]) is nn.Conv2d


def test_layers_of_every_geometry(tmp_path: Path) -> None:
    net = bqnn.convert(Odd(), skip=["plain"]).eval()
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net", model=Odd())
    x = torch.randn(2, 4, 6, 6)
    assert repr(net) == repr(loaded) and same(net, loaded) and torch.equal(net(x), loaded(x))


@pytest.mark.parametrize("skip", [(), ("embed",)], ids=["converted", "reader"])
@pytest.mark.parametrize("kind", ["plain", "bayes", "meta"])
def test_ties_stay(kind: str, skip: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = bqnn.convert(Tied(), skip=skip).eval()
    save(net, tmp_path / "net")
    with torch.device("meta" if kind == "meta" else "cpu"):
        model: nn.Module = Tied()
    loaded = load(tmp_path / "net", model=bqnn.convert(model, num_levels=5, skip=skip) if kind == "bayes" else model)
    x = torch.arange(7)
    assert same(net, loaded) and torch.equal(net(x), loaded(x))
    assert loaded.head.log_sigma2 is loaded.other.log_sigma2 and loaded.head.mean is loaded.embed._parameters["weight"]
    assert loaded.embed.weight is loaded.head.weight, "the embedding reads the quantized weight"
    assert same(train(net, x, x), train(loaded, x, x))


def test_a_shared_layer_and_one_that_is_apart(tmp_path: Path) -> None:
    net = bqnn.convert(Shared())
    save(net, tmp_path / "net")
    shared, apart = load(tmp_path / "net", model=Shared()), load(tmp_path / "net", model=Apart())
    assert shared.first is shared.again and same(shared, net)
    assert apart.first is not apart.again and apart.first.mean is not apart.again.mean and same(apart, net)
    save(bqnn.convert(Apart()), tmp_path / "net")
    with pytest.raises(FormatError, match="layers 'first' and 'again' are one in the model and two in the file"):
        load(tmp_path / "net", model=Shared())


@pytest.mark.parametrize("quantize", [bqnn.convert, lambda net: bqnn.pack(bqnn.convert(net))], ids=["bayes", "packed"])
def test_a_shared_layer_without_a_bias(quantize: Any, tmp_path: Path) -> None:
    def shared() -> nn.Module:
        layer = nn.Linear(3, 3, bias=False)
        return nn.Sequential(layer, nn.ReLU(), layer)

    net = quantize(shared())
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net", model=shared())
    assert loaded[0] is loaded[2] and same(net, loaded)


def test_an_embedding_that_is_tied_in_the_model_alone(tmp_path: Path) -> None:
    untied = Tied()
    untied.embed.weight = nn.Parameter(untied.embed.weight.detach().clone())
    net = bqnn.convert(untied).eval()
    save(net, tmp_path / "net")
    assert same(net, load(tmp_path / "net", model=Tied())), "a layer of its own, as it was saved"
    save(bqnn.convert(untied, skip=["embed"]), tmp_path / "net")
    with pytest.raises(FormatError, match="'embed.weight' and 'other.weight' are one in the model and two in the file"):
        load(tmp_path / "net", model=Tied())


def test_what_is_frozen_stays_so_and_variances_learn_again(tmp_path: Path) -> None:
    net = bqnn.convert(models.lenet5(image_size=8), estimator="deterministic")
    net.conv1.freeze_weight(False)
    net.bn2.weight.requires_grad_(False)
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert learning(loaded) == learning(net) and not loaded.fc1.log_sigma2.requires_grad
    for layer in bayes_layers(loaded).values():
        layer.estimator = "moment"
    assert loaded.fc1.log_sigma2.requires_grad and not loaded.conv1.log_sigma2.requires_grad


def test_networks_with_both_kinds_of_layers_and_ensembles(tmp_path: Path) -> None:
    def both() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        net[0] = bqnn.pack(bqnn.convert(nn.Sequential(nn.Linear(4, 4))))[0]
        return bqnn.convert(net)

    networks = bqnn.Ensemble([both(), both()]).eval()
    save(networks, tmp_path / "net")
    loaded = load(tmp_path / "net", model=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), precision="int8")
    assert same(networks, loaded) and loaded[1][0].precision == "int8"
    described = info(tmp_path / "net")
    assert described["networks"] == 2
    assert described["layers"]["1.2"]["bayes"] == {} and described["layers"]["1.2"]["bits_per_weight"] == 32


def test_info_counts_every_byte(tmp_path: Path) -> None:
    save(bqnn.convert(models.lenet5(image_size=8), num_levels=4, estimator="sample"), tmp_path / "net")
    layer = info(tmp_path / "net")["layers"]["fc3"]
    assert layer == {
        "kind": "linear",
        "shape": [10, 84],
        "num_levels": 4,
        "bayes": {"estimator": "sample"},
        "bytes": 4 * (840 + 4 + 1 + 1 + 10),
        "bits_per_weight": 32.0,
        "posterior_bytes": 4 * 840,
    }


def test_precision_and_execution_are_for_packed_layers(tmp_path: Path) -> None:
    save(bqnn.convert(models.lenet5(image_size=8)), tmp_path / "net")
    for options in ({"precision": "int8"}, {"execution": "dense"}):
        with pytest.raises(ValueError, match="precision and execution are for packed layers"):
            load(tmp_path / "net", **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "log_sigma2", "raw_levels", "level_scale", "prior_sigma2", "bias"])
def test_values_that_no_layer_can_have_are_not_saved(name: str, value: float, tmp_path: Path) -> None:
    net = bqnn.convert(nn.Sequential(nn.Linear(3, 2)))
    with torch.no_grad():
        net.state_dict()[f"0.{name}"].view(-1)[:1] = value
    with pytest.raises(ValueError, match=f"layer '0': {name} must"):
        save(net, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def changed(tmp_path: Path, change: Any) -> Path:
    """The file of a small network with a change in its metadata, its checksums right again."""
    save(bqnn.convert(nn.Sequential(nn.Linear(3, 2)), partition="learned"), tmp_path / "net")
    header, metadata, data = taken_apart((tmp_path / "net").read_bytes())
    change(header, metadata)
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    return tmp_path / "net"


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(7, "bayes must be an object of options, got 7", id="number"),
        pytest.param({"estimator": "exact"}, "estimator must be one of", id="estimator"),
        pytest.param({"estimator": "moment"}, "estimator can not be 'moment'", id="what-is-usual"),
        pytest.param({"start_sigma": 100.0}, "start_sigma must be from 0.001 to 10", id="range"),
        pytest.param({"start_sigma": True}, "start_sigma can not be True", id="type"),
        pytest.param({"device": "cuda"}, "device can not be 'cuda'", id="unknown"),
        pytest.param({}, "tensor '0.raw_thresholds' is unexpected", id="partition"),
        pytest.param({"granularity": "channel", "partition": "learned"}, "must have the shape", id="granularity"),
    ],
)
def test_descriptions_that_are_wrong(options: Any, message: str, tmp_path: Path) -> None:
    path = changed(tmp_path, lambda header, metadata: metadata["layers"]["0"].update(bayes=options))
    for read in (lambda: info(path), lambda: load(path, model=nn.Sequential(nn.Linear(3, 2)))):
        with pytest.raises(FormatError, match=message):
            read()


@pytest.mark.parametrize(
    "frozen",
    [
        pytest.param(None, id="missing"),
        pytest.param(3, id="number"),
        pytest.param(["0.codes"], id="alien"),
        pytest.param([["0.weight"]], id="list"),
        pytest.param(["0.weight", "0.bias", "0.weight"], id="twice"),
        pytest.param(["0.prior_sigma2"], id="buffer"),
    ],
)
def test_a_wrong_list_of_what_is_frozen(frozen: Any, tmp_path: Path) -> None:
    def change(header: Any, metadata: Any) -> None:
        metadata.pop("frozen")
        if frozen is not None:
            metadata["frozen"] = copy.deepcopy(frozen)

    with pytest.raises(FormatError, match="frozen must"):
        info(changed(tmp_path, change))


@pytest.mark.parametrize("name", ["codes", "levels", "bias", "chances"])
def test_nothing_of_a_packed_layer_is_frozen(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(bqnn.pack(bqnn.convert(nn.Linear(3, 2))), bqnn.convert(nn.Linear(2, 2)))
    save(net, tmp_path / "net")
    header, metadata, data = taken_apart((tmp_path / "net").read_bytes())
    assert metadata["frozen"] == [] and f"0.{name}" in header
    metadata["frozen"] = [f"0.{name}"]
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    with pytest.raises(FormatError, match=f"frozen must be of parameters, and '0.{name}' is none"):
        info(tmp_path / "net")


def test_a_dtype_that_no_layer_has(tmp_path: Path) -> None:
    def change(header: Any, metadata: Any) -> None:
        header["0.log_sigma2"]["dtype"] = "I32"

    with pytest.raises(FormatError, match="'0.log_sigma2' must be float32, got torch.int32"):
        info(changed(tmp_path, change))
