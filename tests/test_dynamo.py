"""torch.compile with the engine as its backend: where it runs, and where the graph runs as it was handed over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn.engine import compiled, dynamo
from tests.support.compiled import Function, packed

X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(11))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An element for each call of the engine."""
    calls: list[int] = []
    executor = compiled.executor

    def counting(graph: Any, precision: str, device: torch.device) -> Any:
        run = executor(graph, precision, device)
        return lambda inputs: calls.append(1) or run(inputs)

    monkeypatch.setattr(compiled, "executor", counting)
    torch._dynamo.reset()
    return calls


def net(**options: Any) -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return packed(nn.Sequential(*layers), **options)


def check(fast: Any, small: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(fast(x), small(x))


def test_the_engine_runs_any_batch(runs: list[int]) -> None:
    small = net()
    fast = torch.compile(small, backend=dynamo.backend)
    with torch.no_grad():
        for count, size in enumerate((3, 1, 7, 2), start=1):
            check(fast, small, X[:1].expand(size, -1, -1, -1))
            assert len(runs) == count
    with torch.inference_mode():
        check(fast, small, X)
        assert len(runs) == 5


def test_sizes_that_the_network_asks_for(runs: list[int]) -> None:
    linear = nn.Linear(72, 3)
    small = Function(lambda x: linear(x.view(x.shape[0], -1)))
    fast = torch.compile(small, backend=dynamo.backend)
    with torch.no_grad():
        check(fast, small, X)
        assert not runs, "where only one size has been seen, it is a number in the graph"
        check(fast, small, X[:2])
        check(fast, small, X[:1].expand(9, -1, -1, -1))
    assert runs


def test_gradients_are_torchs(runs: list[int]) -> None:
    small = net()
    fast = torch.compile(small, backend=dynamo.backend)
    found, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    fast(found).square().sum().backward()
    small(expected).square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    check(fast, small, X)  # the factors of BatchNorm would have gradients
    assert not runs


@pytest.mark.parametrize("change", ["in-place", "another", "loaded"])
def test_changed_states_are_seen(change: str, runs: list[int]) -> None:
    small = net()
    fast = torch.compile(small, backend=dynamo.backend)
    with torch.no_grad():
        check(fast, small, X)
        if change == "in-place":
            small[1].running_mean += 1
        elif change == "another":
            small[1].running_mean = small[1].running_mean + 1
        else:
            small.load_state_dict({**small.state_dict(), "1.bias": torch.arange(4.0)})
        check(fast, small, X)


def unserved(small: nn.Module, x: Tensor, runs: list[int], caplog: pytest.LogCaptureFixture) -> str:
    caplog.set_level(logging.INFO, "bqnn")
    torch.testing.assert_close(torch.compile(small, backend=dynamo.backend)(x.clone()), small(x.clone()))
    assert not runs
    return caplog.text


def changed(x: Tensor) -> Tensor:
    x += 1
    return nn.functional.conv2d(x, torch.ones(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        pytest.param(changed, X, "it changes an input", id="changes-its-input"),
        pytest.param(lambda x: x.sin(), X, "no part for the engine", id="nothing-to-do"),
        pytest.param(lambda x: nn.functional.linear(x.view(8, -1), torch.ones(1, 27)), X, "any size", id="one-batch"),
        pytest.param(lambda x: nn.functional.linear(x, torch.ones(1, 6).double()), X.double(), "float32", id="float64"),
    ],
)
@torch.no_grad()
def test_what_is_not_for_the_engine(
    function: Callable[..., Any], x: Tensor, reason: str, runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert reason in unserved(Function(function), x, runs, caplog)


@torch.no_grad()
def test_autocast_is_not_for_the_engine(runs: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in unserved(net(), X, runs, caplog)


@torch.no_grad()
def test_other_dimensions_that_vary_are_not_for_the_engine(runs: list[int]) -> None:
    small = Function(lambda x: nn.functional.conv2d(x, torch.ones(1, 2, 1, 1)))
    fast = torch.compile(small, backend=dynamo.backend, dynamic=True)
    check(fast, small, X)
    assert not runs


@torch.no_grad()
def test_a_graph_break(runs: list[int]) -> None:
    small, other = net(), net(num_levels=2)

    def both(x: Tensor) -> Tensor:
        y = small(x)
        torch._dynamo.graph_break()
        return y + other(x)

    torch.testing.assert_close(torch.compile(both, backend=dynamo.backend)(X), both(X))
    assert len(runs) == 2


@torch.no_grad()
def test_precision_is_an_option(runs: list[int], caplog: pytest.LogCaptureFixture) -> None:
    small = net()
    check(torch.compile(small, backend=dynamo.backend, options={"precision": "fp32"}), small, X)
    assert len(runs) == 1
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, "bqnn")
    check(torch.compile(small, backend=dynamo.backend, options={"precision": "int8"}), small, X)
    assert "precision must be 'fp32' or 'bf16'" in caplog.text


def test_the_package_names_the_backend_to_torch() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="bqnn")
    assert entry.load() is dynamo.backend
