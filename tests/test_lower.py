"""Which of the engine's operators each ATen operator becomes, held to torch in float64; and why some stay torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.engine.graph import RELU, Activation
from bqnn.engine.partition import EnginePart
from tests.support.compiled import Function, compiled, ops, packed, randomized, reasons


@pytest.fixture(autouse=True)
def without_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bqnn.engine.compiled.optimize", lambda graph: graph)


def images(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))


X = images(4, 6, 5)
ROW = images(7)
WIDE = torch.linspace(-1, 1, 14).view(7, 2)
OF_CHANNELS = torch.linspace(-2, 3, 4).view(4, 1, 1)


def of(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return compiled(Function(function), *inputs)


def case(function: Callable[..., Any], *expected: str, id: str, x: Tensor = X) -> Any:
    return pytest.param(function, x, list(expected), id=id)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        case(lambda x: x + 2, "affine", id="add-number"),
        case(lambda x: 2 - x, "affine", id="number-minus"),
        case(lambda x: x.sub(3, alpha=2), "affine", id="sub-alpha"),
        case(lambda x: torch.rsub(x, 3, alpha=2), "affine", id="rsub-alpha"),
        case(lambda x: -x / 3, "affine", "affine", id="neg-div"),
        case(lambda x: x * OF_CHANNELS, "affine", id="mul-channels"),
        case(lambda x: OF_CHANNELS - x, "affine", id="channels-minus"),
        case(lambda x: (x - OF_CHANNELS[None]) / 0.3, "affine", "affine", id="normalize"),
        case(lambda x: x + torch.arange(7.0), "affine", id="add-features", x=ROW),
        case(lambda x: x * torch.tensor(2.5, dtype=torch.float64), "affine", id="mul-scalar-tensor"),
        case(lambda x: x + x.mean((2, 3), keepdim=True), "adaptive_avg_pool2d", "add", id="add-spread"),
        case(lambda x: x.mean((2, 3), True) + x, "adaptive_avg_pool2d", "add", id="add-spread-first"),
        case(lambda x: x.mean((2, 3), True) - x, "adaptive_avg_pool2d", "affine", "add", id="sub-spread-first"),
        case(lambda x: x - x.mean((2, 3), True), "adaptive_avg_pool2d", "sub", id="sub-spread"),
        case(lambda x: x.add(x.relu(), alpha=3), "activation", "affine", "add", id="add-alpha"),
        case(lambda x: x.mean((2, 3), True) * x, "adaptive_avg_pool2d", "mul", id="mul-spread-first"),
        case(lambda x: x * x.mean(1, keepdim=True), id="mean-over-channels"),
        case(lambda x: F.max_pool2d(x, 3, 2, 1), "max_pool2d", id="max-pool"),
        case(lambda x: F.max_pool2d(x, (2, 3), ceil_mode=True), "max_pool2d", id="max-pool-ceil"),
        case(lambda x: F.max_pool2d(x, 2, 1, dilation=2), "max_pool2d", id="max-pool-dilated"),
        case(lambda x: F.adaptive_max_pool2d(x, (2, 1)), "max_pool2d", id="adaptive-max"),
        case(lambda x: x.amax((3, 2)), "max_pool2d", "reshape", id="amax"),
        case(lambda x: x.amax((2, 3), True), "max_pool2d", id="amax-keepdim"),
        case(lambda x: F.avg_pool2d(x, 3, 2, 1), "avg_pool2d", id="avg-pool"),
        case(lambda x: F.avg_pool2d(x, (3, 2), count_include_pad=False, padding=1), "avg_pool2d", id="avg-pool-counts"),
        case(lambda x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d", id="avg-pool-divisor"),
        case(lambda x: F.adaptive_avg_pool2d(x, (4, None)), "adaptive_avg_pool2d", id="adaptive"),
        case(lambda x: x.mean((-1, -2)), "adaptive_avg_pool2d", "reshape", id="mean"),
        case(lambda x: torch.cat([x, x * 2, x], 1), "affine", "cat", id="cat"),
        case(lambda x: torch.cat([x, x + 1], -1), "affine", "cat", id="cat-features", x=ROW),
        case(lambda x: F.pad(x, (1, 2, 0, 1, 2, 0), value=-1.5), "pad", id="pad"),
        case(lambda x: F.pad(x, (0, 0)), id="pad-nothing"),
        case(lambda x: F.pad(x, (2, 1)), "pad", id="pad-features", x=ROW),
        case(lambda x: x[:, :, ::2, 1::2], "slice", "slice", id="slice-twice"),
        case(lambda x: x[:, 1:-1][:, :1, 1:5:2], "slice", "slice", "slice", id="slice-of-slice"),
        case(lambda x: x[:, 2:5], "slice", id="slice-features", x=ROW),
        case(lambda x: x.narrow(2, -4, 3), "slice", id="narrow"),
        case(lambda x: torch.add(*x.chunk(2, 1)), "slice", "slice", "add", id="chunk"),
        case(lambda x: x.split([1, 3], 1)[1], "slice", id="split"),
        case(lambda x: x.split(4, 1)[0], id="split-whole"),
        case(lambda x: x.flatten(1), "reshape", id="flatten"),
        case(lambda x: x.view(x.shape[0], -1), "reshape", id="view"),
        case(lambda x: x.reshape(len(x), 2, 12, -1), "reshape", id="reshape"),
        case(lambda x: x.unsqueeze(-1).unsqueeze(-1), id="unsqueeze-one-at-a-time", x=ROW),
        case(lambda x: x.softmax(1), "softmax", id="softmax"),
        case(lambda x: F.log_softmax(x, -1), "log_softmax", id="log-softmax", x=ROW),
        case(lambda x: F.dropout(x, training=False).contiguous().clone().detach().float(), id="nothing"),
        case(lambda x: x * x.mean((2, 3), True).expand_as(x), "adaptive_avg_pool2d", "mul", id="expand-as"),
        case(lambda x: x @ WIDE.to(x.dtype), "linear", id="matmul", x=ROW),
        case(lambda x: torch.addmm(torch.arange(2.0).to(x), x, WIDE.to(x)), "linear", id="addmm", x=ROW),
        case(lambda x: x.mean((2, 3), True).expand(-1, 4, 1, 1), "adaptive_avg_pool2d", id="expand-nothing"),
    ],
)
def test_function(function: Callable[..., Any], x: Tensor, expected: list[str]) -> None:
    fast = of(function, x)
    if expected:
        assert not reasons(fast)
    assert ops(fast) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(F.relu, RELU, id="relu"),
        pytest.param(F.relu6, Activation("clamp", 0.0, 6.0), id="relu6"),
        pytest.param(lambda x: F.hardtanh(x, -0.5, 0.25), Activation("clamp", -0.5, 0.25), id="hardtanh"),
        pytest.param(lambda x: x.clamp(min=0.5), Activation("clamp", 0.5, float("inf")), id="clamp-min"),
        pytest.param(lambda x: x.clamp(max=1), Activation("clamp", float("-inf"), 1.0), id="clamp-max"),
        pytest.param(lambda x: x.clamp(2, 1), Activation("clamp", 1.0, 1.0), id="clamp-crossed"),
        pytest.param(lambda x: F.leaky_relu(x, 0.2), Activation("leaky_relu", 0.2), id="leaky-relu"),
        pytest.param(F.hardswish, Activation("hardswish"), id="hardswish"),
        pytest.param(F.hardsigmoid, Activation("hardsigmoid"), id="hardsigmoid"),
        pytest.param(torch.sigmoid, Activation("sigmoid"), id="sigmoid"),
        pytest.param(F.silu, Activation("silu"), id="silu"),
        pytest.param(F.gelu, Activation("gelu"), id="gelu"),
        pytest.param(lambda x: F.gelu(x, approximate="tanh"), Activation("gelu_tanh"), id="gelu-tanh"),
        pytest.param(torch.tanh, Activation("tanh"), id="tanh"),
        pytest.param(lambda x: F.relu_(x + 0), RELU, id="relu_"),
        pytest.param(lambda x: F.hardswish(x + 0, inplace=True), Activation("hardswish"), id="hardswish_"),
    ],
)
def test_activation(function: Callable[[Tensor], Tensor], expected: Activation) -> None:
    fast = of(function, 3 * X)
    (part,) = fast.parts
    assert isinstance(part, EnginePart)
    assert part.graph.nodes[-1].op == "activation"
    assert part.graph.nodes[-1].activation == expected


@pytest.mark.parametrize(
    "conv",
    [
        pytest.param(nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2), id="geometry"),
        pytest.param(nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2), bias=False), id="same"),
        pytest.param(nn.Conv2d(4, 6, 3, padding="valid"), id="valid"),
        pytest.param((nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(4, 6, 3, padding=1)), id="padded-before"),
    ],
)
@pytest.mark.parametrize("form", ["dense", "packed", "packed-channel"])
def test_convolution(conv: Any, form: str) -> None:
    net = nn.Sequential(*(conv if isinstance(conv, tuple) else (conv,)), nn.ReLU())
    granularity = "channel" if form == "packed-channel" else "tensor"
    fast = compiled(randomized(net) if form == "dense" else packed(net, granularity=granularity), X)
    assert not reasons(fast)
    # A packed layer has taken over the ReLU.
    assert ops(fast)[-2 if form == "dense" else -1 :] == (["conv2d", "activation"] if form == "dense" else ["conv2d"])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_modes_of_padding_stay_torchs(mode: str) -> None:
    fast = compiled(packed(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), nn.ReLU())), X)
    assert ops(fast) == ["conv2d"]
    assert reasons(fast) == {"aten.pad": f"the engine has no padding of mode {mode}"}


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False, eps=0.1)], ids=["affine", "not-affine"]
)
def test_batch_norm(norm: nn.Module) -> None:
    assert ops(compiled(randomized(nn.Sequential(norm)), X)) == ["affine"]


def test_batch_norm_of_rows_and_linear() -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False))
    assert ops(compiled(randomized(net), ROW)) == ["linear", "affine", "linear"]
    assert ops(compiled(packed(net), ROW)) == ["linear", "affine", "linear"]


WEIGHT = torch.randn(4, 4, 3, 3)


@pytest.mark.parametrize(
    ("function", "x", "op", "reason"),
    [
        pytest.param(lambda x: x.permute(0, 2, 3, 1), X, "aten.permute", "no such operator", id="unknown"),
        pytest.param(lambda x: F.pad(x, (-1, 0)), X, "aten.pad", "no negative padding", id="pad-negative"),
        pytest.param(lambda x: F.pad(x, (0, 0) * 3 + (1, 0)), X, "aten.pad", "pads the batch", id="pad-batch"),
        pytest.param(lambda x: x.flip(0) + x, X, "aten.flip", "no such operator", id="flip"),
        pytest.param(lambda x: x.view(-1, 5), X, "aten.view", "first dimension alone must be the batch", id="mixes"),
        pytest.param(lambda x: x.mean((2, 3), True).expand_as(x).relu(), X, "aten.expand_as", "spreads", id="expand"),
        pytest.param(
            lambda x: x.mean((2, 3), True).expand_as(x) + x.mean((2, 3), True).expand_as(x),
            X,
            "aten.expand_as",
            "spreads out what is added",
            id="expand-both",
        ),
        pytest.param(
            lambda x: F.leaky_relu(x, float("inf")), X, "aten.leaky_relu", "low must be finite", id="infinite"
        ),
        pytest.param(lambda x: torch.addmm(x, x, torch.eye(7)), ROW, "aten.addmm", "depends on an input", id="addmm"),
        pytest.param(lambda x: F.adaptive_max_pool2d(x, 4), X, "aten.adaptive_max_pool2d", "not alike", id="unlike"),
        pytest.param(lambda x: x.amax(1), X, "aten.amax", "maxima over height and width", id="amax-channels"),
        pytest.param(lambda x: x[:2], X, "aten.slice.Tensor", "must be the batch", id="slice-batch"),
        pytest.param(lambda x: x[1:], X, "aten.slice.Tensor", "a part of the batch", id="slice-batch-from"),
        pytest.param(lambda x: x + torch.ones(6, 5), X, "aten.add.Tensor", "not one number a channel", id="a-pixel"),
        pytest.param(lambda x: x / x.exp(), X, "aten.div.Tensor", "divides by constants", id="div"),
        pytest.param(lambda x: x / 0, X, "aten.div.Tensor", "not finite", id="div-0"),
        pytest.param(lambda x: x.softmax(0), X, "aten.softmax.int", "over channels alone", id="softmax-batch"),
        pytest.param(lambda x: torch.cat([x, x], 2), X, "aten.cat", "along channels alone", id="cat-rows"),
        pytest.param(lambda x: torch.cat([x, x], 0), X, "aten.cat", "along channels alone", id="cat-batch"),
        pytest.param(lambda x: x.mean(), X, "aten.mean", "height and width alone", id="mean-all"),
        pytest.param(lambda x: x.double() * 2, X, "aten.to.dtype", "gives float64", id="float64"),
        pytest.param(lambda x: x[:, 6:], images(4, 2, 2), "aten.slice.Tensor", "without elements", id="empty"),
        pytest.param(lambda x: x * len(x), X, "aten.mul.Tensor", "", id="size-of-the-batch"),
        pytest.param(
            lambda x: F.max_pool2d(x, 2, return_indices=True),
            X,
            "aten.max_pool2d_with_indices",
            "indices",
            id="indices",
        ),
        pytest.param(
            lambda x: F.batch_norm(x, None, None, training=True), X, "aten.batch_norm", "statistics", id="statistics"
        ),
        pytest.param(
            lambda x: F.conv2d(x, WEIGHT * x.mean()), X, "aten.conv2d", "weight depends on an input", id="weight"
        ),
        pytest.param(
            lambda x: F.linear(x, torch.ones(3, 5)), X, "aten.linear", "more than one row an image", id="rows"
        ),
        pytest.param(
            lambda x: x.mean(2, keepdim=True) * x.mean(3, keepdim=True), X, "aten.mul.Tensor", "spread", id="outer"
        ),
    ],
)
def test_what_stays_torchs(function: Callable[..., Any], x: Tensor, op: str, reason: str) -> None:
    # Without an engine's part in it a network is torch's as a whole: a convolution behind it is a part.
    fast = bqnn.compile(Function(function), x)
    found = reasons(fast)
    assert reason in found[op]
    expected = function(x)
    torch.testing.assert_close(fast(x), expected)


def test_dropout_and_parametrized_weights() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)), nn.Dropout(), nn.AlphaDropout(0.5))
    assert ops(compiled(net.eval(), ROW)) == ["linear"]
