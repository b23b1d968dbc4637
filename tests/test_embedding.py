"""Embedding: rows looked up in a quantized table, Bayesian and packed, and its tie to the layer that ends a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn import BayesEmbedding, PackedEmbedding
from bqnn.files.layer_spec import check_spec
from tests.support.mutations import put_together, taken_apart
from tests.support.odd_nets import TiedRows

INDICES = torch.tensor([[3, 0, 3], [10, 2, 7]])


def bayes_of(dtype: torch.dtype = torch.float32, estimator: str = "moment", **options: Any) -> BayesEmbedding:
    torch.manual_seed(0)
    named = {"granularity": options.pop("granularity", "tensor"), "estimator": estimator}
    return bqnn.convert(nn.Embedding(11, 6, **options, dtype=dtype), 3, **named)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "indices", [INDICES, INDICES.int(), INDICES[0, 0], INDICES[:0]], ids=["2d", "int32", "0d", "none"]
)
def test_rows_are_those_of_the_quantized_weight(indices: Tensor, dtype: torch.dtype, granularity: str) -> None:
    net = bayes_of(dtype, granularity=granularity).eval()
    expected = F.embedding(indices, net.quantized_weight())
    assert type(net) is BayesEmbedding and torch.equal(net(indices), expected)
    packed = bqnn.pack(net, precision="int8")
    expected = expected.float().to(dtype)  # levels are float32
    assert type(packed) is PackedEmbedding and packed(indices).dtype == dtype
    assert torch.equal(packed(indices), expected)
    plain = bqnn.dequantize(packed)
    assert type(plain) is nn.Embedding and torch.equal(plain(indices), expected)


@pytest.mark.parametrize("estimator", ["moment", "sample", "local", "deterministic"])
def test_a_row_is_drawn_once_a_call_and_is_a_level(estimator: str) -> None:
    net = bayes_of(estimator=estimator)
    net.log_sigma2.data.fill_(0.0)
    rows = net(INDICES)
    assert torch.equal(rows[0, 0], rows[0, 2])
    assert torch.equal(rows, net(INDICES)) == (estimator == "deterministic")
    if estimator != "local":  # which sees the weight itself in training, as the linear layer does
        assert torch.isin(rows, net.levels).all()
    assert torch.equal(net.eval()(INDICES), F.embedding(INDICES, net.quantized_weight()))
    with bqnn.sampling(net):
        assert torch.equal(net(INDICES), net(INDICES)) == (estimator == "deterministic")


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_draws_have_the_distribution_of_the_posterior(granularity: str) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(8000, 6)
    plain.weight.data.copy_(plain.weight[:2].repeat(4000, 1))  # rows of two kinds, which are drawn 4000 times each
    net = bqnn.convert(plain, 3, granularity=granularity, estimator="sample")
    net.log_sigma2.data.fill_(-1.0)
    drawn = net(torch.arange(8000))
    for row in range(2):
        levels, thresholds = (each[row if granularity == "channel" else 0] for each in (net.levels, net.thresholds))
        bounds = torch.cat([torch.tensor([-1e9]), thresholds, torch.tensor([1e9])])
        chance = torch.special.ndtr((bounds[:, None] - net.mean[row]) / net.log_sigma2[row].mul(0.5).exp()).diff(dim=0)
        share = torch.stack([(drawn[row::2] - level).abs() < 1e-6 for level in levels]).float().mean(1)
        torch.testing.assert_close(share, chance, rtol=0, atol=0.04)


def gradients(net: nn.Module, indices: Tensor) -> Tensor:
    net.zero_grad()
    F.embedding(
        indices,
        torch.arange(11.0)[:, None],
    ).mul(net(indices)).sum().backward()
    parameter = net.mean if isinstance(net, BayesEmbedding) else net.weight
    return parameter.grad


@pytest.mark.parametrize(
    "options", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 3}, {"padding_idx": -1}], ids=str
)
def test_gradients_of_the_means_are_those_of_torch(options: dict[str, Any]) -> None:
    net, plain = bayes_of(**options), nn.Embedding(11, 6, **options)
    assert torch.equal(gradients(net, INDICES), gradients(plain, INDICES))
    assert net.raw_levels.grad.abs().sum() > 0 and net.log_sigma2.grad.abs().sum() > 0


def test_gradients_of_the_codebook_in_float64() -> None:
    net = bayes_of(torch.float64, "deterministic")

    def rows(raw_levels: Tensor) -> Tensor:
        return torch.func.functional_call(net, {"raw_levels": raw_levels}, (INDICES,))

    assert torch.autograd.gradcheck(rows, net.raw_levels.detach().clone().requires_grad_())


def test_the_divergence_reaches_rows_that_nobody_looked_up() -> None:
    net = bayes_of()
    terms = bqnn.elbo(net(INDICES).flatten(0, 1), INDICES.flatten() % 6, net, 10)
    terms.loss.backward()
    assert net.mean.grad[5].abs().sum() > 0 and net.log_sigma2.grad[5].abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"max_norm": 1.0}, "layer '0': max_norm must be None", id="max_norm"),
        pytest.param({"sparse": True}, "layer '0': sparse must be False", id="sparse"),
    ],
)
def test_what_can_not_hold_is_refused_and_can_be_skipped(options: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message):
        bqnn.convert_(net)
    assert type(net[0]) is nn.Embedding and type(net[1]) is nn.Linear
    assert type(bqnn.convert_(net, skip=["0"])[1]) is bqnn.BayesLinear


def test_wrong_indices_are_named() -> None:
    net = bayes_of()
    for each in (net, bqnn.pack(net)):
        with pytest.raises(TypeError, match="indices must be torch.int32 or torch.int64, got torch.float32"):
            each(torch.zeros(3))
        for index in (11, -1):
            with pytest.raises(IndexError):
                each(torch.tensor([index]))


def test_a_tied_head_shares_one_posterior_from_training_to_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, x = TiedRows(), torch.randint(0, 30, (4, 5))
    net = bqnn.convert(plain, 3)
    assert net.embedding.mean is net.head.mean and net.embedding.weight is net.head.weight
    assert torch.equal(bqnn.kl_divergence(net), net.head.kl_divergence())
    assert [group["name"] for group in bqnn.parameter_groups(net, 0.1)] == ["means", "variances", "codebooks"]
    drawn = bqnn.sample(net, seed=0)
    assert torch.equal(drawn.embedding.quantized_weight(), drawn.head.quantized_weight())
    packed = bqnn.pack(net)
    assert packed.embedding.codes is packed.head.codes
    bqnn.save(packed, tmp_path / "net")
    stored = bqnn.info(tmp_path / "net")["tensors"]
    assert sum(name.endswith("codes") for name in stored) == 1
    for model in (plain, net, packed):
        loaded = bqnn.load(tmp_path / "net", model=model)
        assert torch.equal(loaded(x), packed(x)) and loaded.embedding.codes is loaded.head.codes
    again = bqnn.dequantize(packed)
    assert again.embedding.weight is again.head.weight
    torch.testing.assert_close(again(x), packed(x))
    assert bqnn.predict(packed, x, samples=2).probs.shape == (4, 5, 30)
    torch.testing.assert_close(bqnn.compile(packed, x)(x), packed(x))
    assert [layer.name for layer in bqnn.explain_speed(packed, x)] == ["head"]


def test_training_of_a_tied_head_by_its_divergence_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    net, x = bqnn.convert(TiedRows(), 3), torch.randint(0, 30, (4,))
    bqnn.elbo(net(x), x, net, 10).loss.backward()
    bqnn.pack(net)
    assert "without the divergence" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_a_loaded_network_have_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).to(dtype)
    packed, x = bqnn.pack(bqnn.convert(plain, skip=["2"])), torch.arange(7)
    bqnn.save(packed, tmp_path / "net")
    loaded = bqnn.load(tmp_path / "net", model=plain.float())
    assert loaded[0](x).dtype == loaded[1].weight.dtype == dtype and torch.equal(loaded(x), packed(x))


def test_padding_is_kept_in_the_file(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Embedding(7, 3, padding_idx=2))
    bqnn.save(bqnn.pack(bqnn.convert(plain)), tmp_path / "net")
    loaded = bqnn.load(tmp_path / "net", model=plain)
    assert loaded[0].padding_idx == bqnn.dequantize(loaded)[0].padding_idx == 2
    with pytest.raises(bqnn.FormatError, match="layer '0' is .*'padding_idx': 2.* in the file and .* in the model"):
        bqnn.load(tmp_path / "net", model=nn.Sequential(nn.Embedding(7, 3)))


@pytest.mark.parametrize(
    "change",
    [
        {"padding_idx": 7},
        {"padding_idx": -1},
        {"padding_idx": True},
        {"padding_idx": None},
        {"relu": True},
        {"dtype": "I8"},
        {"dtype": ["F64"]},
        {"scale_grad_by_freq": True},
        {"stride": [1]},
        {"shape": [7]},
        {"shape": [7, 3, 1]},
    ],
    ids=str,
)
def test_hostile_descriptions_are_refused(change: dict[str, Any]) -> None:
    spec = {"kind": "embedding", "shape": [7, 3], "num_levels": 3, "padding_idx": 2}
    check_spec("e", spec)
    with pytest.raises(bqnn.FormatError, match=f"layer 'e': {next(iter(change))} can not be"):
        check_spec("e", {**spec, **change})


def test_a_dtype_that_a_layer_has_anyway_is_not_described(tmp_path: Path) -> None:
    path = tmp_path / "net"
    bqnn.save(bqnn.pack(bqnn.convert(nn.Sequential(nn.Embedding(7, 3)))), path)
    header, metadata, data = taken_apart(path.read_bytes())
    assert "dtype" not in metadata["layers"]["0"]
    metadata["layers"]["0"]["dtype"] = "F32"
    path.write_bytes(put_together(header, metadata, data))
    with pytest.raises(bqnn.FormatError, match="layer '0': dtype can not be 'F32'"):
        bqnn.info(path)
