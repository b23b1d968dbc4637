"""What convert leaves at full precision, why, and what subclasses can be asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.transposed import ComposedConv1D


class Scaled(nn.Linear):
    """An nn.Linear by another name, with a way of its own to start and a method more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = 2.0

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def doubled(self) -> Tensor:
        return self.weight * self.scale


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


class Conv1D(nn.Module):
    """What stands for the class of transformers, which has this name in this module and computes this."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.volume, self.norm, self.scaled = nn.Conv3d(2, 3, 2), nn.BatchNorm1d(4), Scaled(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.gpt, self.fc, self.other = Conv1D(6, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 4))


EXPECTED = {
    "": ("Odd", ("token",), 4, "no layer that convert knows"),
    "volume": ("Conv3d", ("weight", "bias"), 51, "no op convolves over three dimensions"),
    "norm": ("BatchNorm1d", ("weight", "bias"), 8, "few numbers"),
    "scaled": (
        "Scaled",
        ("weight", "bias"),
        20,
        r"a subclass of nn.Linear; convert(..., subclasses=[Scaled]) takes it",
    ),
    "attention": ("MultiheadAttention", ("in_proj_weight", "in_proj_bias"), 60, "it was skipped"),
    "attention.out_proj": ("NonDynamicallyQuantizableLinear", ("weight", "bias"), 20, "part of an attention"),
    "gpt": ("Conv1D", ("weight", "bias"), 30, "its weight is [in, out]; convert(..., subclasses=[Conv1D]) takes it"),
    "other": ("Linear", ("weight", "bias"), 10, "convert takes it: it was skipped, or has come later"),
}


def test_what_is_left_is_told_in_the_log_and_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bqnn"):
        net = bqnn.convert(Odd(), 3, skip=["attention", "other"])
    report = bqnn.report(net)
    assert [layer.name for layer in report.layers] == ["fc"]
    assert {left.name for left in report.left} == set(EXPECTED)
    lines = {line.split()[0]: line for line in str(report).splitlines() if line and not line.startswith(" ")}
    for left in report.left:
        kind, parameters, numbers, reason = EXPECTED[left.name]
        assert (left.kind, left.parameters, left.numbers) == (kind, parameters, numbers) and reason in left.reason
        if left.name:
            assert reason in lines[left.name] and lines[left.name] in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["left at full precision, which subclasses=[...] may change: scaled, gpt"]
    assert {left.name for left in bqnn.report(bqnn.pack(net)).left} == set(EXPECTED)


def test_nothing_is_said_where_nothing_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bqnn"):
        net = bqnn.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LSTM(3, 2)), 3)
    assert bqnn.report(net).left == [] and "left at full precision" not in caplog.text + str(bqnn.report(net))


def test_a_subclass_that_computes_what_its_base_does_is_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Scaled(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    net[0].note = "kept"
    bayes: Any = bqnn.convert(net, 3, subclasses=[Scaled])
    assert type(bayes[0]) is bqnn.BayesLinear and bayes[0].scale == 2.0 and bayes[0].note == "kept"
    packed = bqnn.pack(bayes)
    bqnn.save(packed, tmp_path / "net")
    assert torch.equal(bqnn.load(tmp_path / "net", model=net)(x), packed(x))
    assert type(bqnn.convert(Scaled(4, 5), 3, subclasses=[Scaled])) is bqnn.BayesLinear


def test_a_subclass_of_a_composed_layer() -> None:
    class Mine(nn.LSTM):
        pass

    net = bqnn.convert(nn.ModuleList([Mine(3, 4)]), 3, subclasses=(Mine,))
    assert set(bqnn.bayes.layers.bayes_layers(net)) == {"0.ih_l0", "0.hh_l0"}


@pytest.mark.parametrize(
    ("subclasses", "error", "message"),
    [
        pytest.param([Doubling], ValueError, "subclasses holds Doubling, which has forward of its own", id="forward"),
        pytest.param([OwnConvolution], ValueError, "OwnConvolution, which has _conv_forward of its own", id="inner"),
        pytest.param([nn.ReLU], ValueError, "subclasses must hold classes of layers .* got ReLU", id="other"),
        pytest.param([nn.Linear(1, 1)], TypeError, "subclasses must be a list of classes", id="module"),
        pytest.param(Scaled, TypeError, "subclasses must be a list of classes", id="no-list"),
    ],
)
def test_other_subclasses_are_refused(subclasses: Any, error: type[Exception], message: str) -> None:
    net = nn.Sequential(Doubling(3, 3), nn.Linear(3, 3))
    with pytest.raises(error, match=message):
        bqnn.convert_(net, subclasses=subclasses)
    assert type(net[1]) is nn.Linear


def test_the_linear_layer_of_gpt2_by_request(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(4, 6)), torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match="net has no layer to convert"):
        bqnn.convert(net)
    bayes: Any = bqnn.convert(net, 3, subclasses=[Conv1D]).eval()
    assert type(bayes[0]) is ComposedConv1D and bayes[0].nf == 6 and bayes[0].weight.shape == (4, 6)
    packed, plain = bqnn.pack(bayes), bqnn.dequantize(bayes)
    assert type(plain[0]) is Conv1D and list(plain.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(bayes(x), plain(x))
    torch.testing.assert_close(packed(x), plain(x))
    bqnn.save(packed, tmp_path / "net")
    for model in (net, bayes, packed, plain):
        assert torch.equal(bqnn.load(tmp_path / "net", model=model)(x), packed(x))
    square = nn.Sequential(Conv1D(4, 4))
    again = bqnn.convert(square, 3, subclasses=[Conv1D]).eval()
    again.load_state_dict(plain_state := {"0.weight": torch.randn(4, 4), "0.bias": torch.ones(4)}, strict=False)
    assert torch.equal(again[0].linear.mean, plain_state["0.weight"].t()), "a square weight is transposed as well"


def test_fit_takes_the_same_option() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    result = bqnn.fit(nn.Sequential(Scaled(4, 3)), loader, epochs=(0, 1, 1), num_levels=3, subclasses=[Scaled])
    assert type(result.net[0]) is bqnn.BayesLinear
