"""Networks as ATen operators: in-place changes, states, structures of outputs, and what can not be captured."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import bqnn
from bqnn.engine.capture import Captured, capture, nested
from tests.support.compiled import Function, compiled, ops, packed, reasons

X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def without_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bqnn.engine.compiled.optimize", lambda graph: graph)


def targets(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.nodes]


def test_calls_that_write_become_plain_ones() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.Dropout(inplace=True))
    assert targets(capture(net, (X,))) == [
        "aten.conv2d.default",
        "aten.relu.default",
        "aten.hardswish.default",
        "aten.dropout.default",
    ]


def changed_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1].add_(5)
    return y


def read_after_a_change(x: Tensor) -> Tensor:
    y = x * 2
    z = y.relu_()
    return y + z


def changed_in_another_place(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(-1, 100)
    y.relu_()
    return z


def changed_input(x: Tensor) -> Tensor:
    x += 1
    return x * x


def assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :2] = x[:, 2:]
    return y


def constant_changed_after_it_was_read(x: Tensor) -> Tensor:
    mask = torch.zeros(5, 5)
    y = x * mask
    mask += 1
    return y + x * mask


def constant_changed(x: Tensor) -> Tensor:
    mask = x.new_zeros(5, 5)
    mask[1:, 1:] = 1
    return x * mask


@pytest.mark.parametrize(
    "function",
    [
        changed_through_a_view,
        read_after_a_change,
        changed_in_another_place,
        changed_input,
        assigned,
        constant_changed,
        constant_changed_after_it_was_read,
    ],
)
def test_what_is_changed_in_place_is_seen_where_torch_sees_it(function: Any) -> None:
    x = X.clone()
    fast = bqnn.compile(Function(function), x)
    expected = function(X.clone())
    torch.testing.assert_close(fast(x), expected)
    assert torch.equal(x, X), "an input is left alone"


def test_changes_that_can_be_told_are_told_without_a_second_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    net = Function(lambda x: constant_changed(x * 2).relu_().add_(x).flatten(1))
    torch.testing.assert_close(bqnn.compile(net, X)(X), net(X))


def test_a_state_that_changes_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(ValueError, match="net must not change its own state, but it writes to 'net.calls'"):
        bqnn.compile(Counting(), X)


def test_constants_are_computed_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
            self.factor = torch.full((6, 1, 1, 1), 3.0)

        def forward(self, x: Tensor) -> Tensor:
            mean = torch.tensor([0.5, 0.25, 0.1, 0.2]).view(-1, 1, 1)
            return F.conv2d(x - mean, self.weight * self.factor.sqrt())

    assert ops(compiled(Scaled(), X)) == ["affine", "conv2d"]


def test_random_numbers_are_not_constants() -> None:
    fast = bqnn.compile(Function(lambda x: x + torch.rand(4, 1, 1)), X)
    assert not torch.equal(fast(X), fast(X))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_structures_of_outputs() -> None:
    def function(x: Tensor) -> Any:
        y = x + 1
        return {"all": [y, (x, None)], "again": y, "rows": y.flatten(1)}

    fast = compiled(Function(function), X)
    assert type(fast(X)["all"][1]) is tuple
    assert nested({"tuple": [1, None, {"dict": {"a": 0}}]}, [X, X + 1])[2]["a"] is X


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda x: Pair(x, x), "net must return tensors, or tuples, .*, got Pair", id="namedtuple"),
        pytest.param(lambda x: (x, 3), "net must return tensors, got int", id="number"),
        pytest.param(lambda x: (x, x.shape[0]), "net must return tensors", id="size"),
        pytest.param(lambda x: {1: x}, "net must return tensors, or tuples, .*, got dict", id="numbered"),
    ],
)
def test_other_outputs_are_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bqnn.compile(Function(function), X)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda x: x.view(8, 100), "specialized it to be a constant", id="size-of-the-batch"),
        pytest.param(lambda x: x if x.sum() > 0 else -x, "data-dependent", id="data"),
        pytest.param(lambda x: x @ torch.ones(3, 3), "must have same reduction dim", id="error"),
    ],
)
def test_what_can_not_be_captured_says_why(function: Any, message: str) -> None:
    with pytest.raises(
        ValueError, match="(?s)torch.export captures it with a batch of any size, but that fails.*" + message
    ):
        bqnn.compile(Function(function), X)


def test_sizes_that_python_asks_for() -> None:
    fast = compiled(Function(lambda x: x.view(len(x), -1) * x.size(0) / x.shape[0]), X)
    assert not [op for op in ops(fast) if op != "reshape"]
    assert reasons(fast)


def test_the_network_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True))
    net.train()
    seen = []
    net[0].register_forward_hook(lambda module, args, y: seen.append(1) or y + 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = bqnn.compile(net, X)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert ops(fast) == ["conv2d", "affine", "affine", "activation"], "a hook is part of the network"
    called = len(seen)
    y = fast(X)
    assert len(seen) == called
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(fast(X), y)


def test_bayes_layers_are_packed_on_the_way() -> None:
    net = bqnn.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)))
    fast = bqnn.compile(net, X)
    assert isinstance(net[0], bqnn.BayesConv2d)
    torch.testing.assert_close(fast(X), bqnn.pack(net)(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes_become_float32(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval().to(dtype)
    fast = bqnn.compile(net, X)
    assert not reasons(fast)
    assert next(net.parameters()).dtype == dtype
    torch.testing.assert_close(fast(X), net.float()(X))


def test_inputs_have_the_networks_names() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, *, unused: int = 0) -> Tensor:
            return image

    assert [node.name for node in capture(Two(), (X,)).inputs] == ["image"]
    assert len({node.name for node in capture(Function(lambda a, b: a + b), (X, X)).inputs}) == 2


def test_packed_layers_of_any_precision() -> None:
    net = packed(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 3)))
    other = bqnn.pack(bqnn.convert(nn.Sequential(nn.Linear(36, 3))), precision="int8")
    assert ops(compiled(net, X)) == ["conv2d", "reshape", "linear"]
    assert ops(bqnn.compile(other, torch.randn(2, 36))) == ["linear"]
