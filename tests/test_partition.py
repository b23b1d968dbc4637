"""Parts of a network: in an order in which each finds what it takes, and as few as the changes of side."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.partition import SMALL, EnginePart, TorchPart
from tests.support.compiled import Function, compiled, ops, reasons

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(5))


class Layers(nn.Module):
    """A function of a network of convolutions and a tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.row = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.fixture(autouse=True)
def without_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bqnn.engine.compiled.optimize", lambda graph: graph)


def rolled(x: Tensor) -> Tensor:
    """What the engine has not."""
    return torch.roll(x, 1, 2)


def with_indices(net: nn.Module, x: Tensor) -> Any:
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    return net.a(y), indices


def kinds(fast: CompiledNetwork) -> str:
    """The parts, E for the engine's and T for torch's."""
    return "".join("E" if isinstance(part, EnginePart) else "T" for part in fast.parts)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda n, x: n.b(n.a(x).relu()), "E", id="engine"),
        pytest.param(lambda n, x: rolled(n.a(x)), "ET", id="torch-last"),
        pytest.param(lambda n, x: n.a(rolled(x)), "TE", id="torch-first"),
        pytest.param(lambda n, x: n.b(rolled(n.a(x))) + n.c(x), "ETE", id="a-way-around"),
        pytest.param(lambda n, x: n.b(rolled(n.a(x))) + n.c(rolled(x)), "ETE", id="two-ways"),
        pytest.param(lambda n, x: rolled(n.a(x)) + rolled(n.b(x)), "ET", id="two-of-torchs"),
        pytest.param(lambda n, x: (n.a(x), rolled(n.a(x)), rolled(x)), "ET", id="three-outputs"),
        pytest.param(lambda n, x: n.b(rolled(rolled(n.a(x)).relu() * 2)), "ETE", id="small-between"),
        pytest.param(lambda n, x: rolled(x.relu()), "T", id="small-first"),
        pytest.param(lambda n, x: rolled(x).relu().flatten(1), "T", id="small-last"),
        pytest.param(lambda n, x: x.relu(), "E", id="small-alone"),
        pytest.param(lambda n, x: n.a(x.permute(0, 2, 3, 1).contiguous().view(-1, 4, 6, 6)), "TE", id="a-view"),
        pytest.param(lambda n, x: n.norm(n.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "ET", id="layer-norm"),
        pytest.param(lambda n, x: rolled(F.dropout(n.a(x), training=False).contiguous()), "ET", id="nothing-between"),
        pytest.param(lambda n, x: F.dropout(rolled(n.a(x)), training=False), "ET", id="nothing-last"),
        pytest.param(lambda n, x: n.b(F.pad(rolled(x), (1, 1, 1, 1))), "TE", id="padding-of-torchs"),
        pytest.param(lambda n, x: torch.roll(n.a(x).chunk(2, 1)[1], 1, 2), "ET", id="a-slice"),
        pytest.param(lambda n, x: [rolled(y) for y in x.chunk(2, 1)], "T", id="slices-small"),
        pytest.param(lambda n, x: n.a(F.max_pool2d(x, 2, return_indices=True)[0]), "E", id="without-indices"),
        pytest.param(lambda n, x: with_indices(n, x), "TE", id="with-indices"),
        pytest.param(lambda n, x: rolled(n.a(x)) + x.view(-1, 6).sum(), "ET", id="over-the-batch"),
        pytest.param(lambda n, x: rolled(x).reshape(x.shape[0] * 2, -1).view(x.shape[0], -1), "T", id="sizes"),
        pytest.param(lambda n, x: n.row(rolled(x).flatten(2).sum(2)), "TE", id="rows-from-torch"),
    ],
)
def test_parts(function: Any, expected: str) -> None:
    fast = compiled(Layers(function), X)
    assert kinds(fast) == expected
    known = {each.name for each in fast.inputs}
    for part in fast.parts:
        assert set(part.inputs) <= known
        assert part.outputs
        known |= set(part.outputs)
    assert set(fast.outputs) <= known


def test_small_parts_say_so() -> None:
    fast = compiled(Layers(lambda n, x: n.b(rolled(rolled(n.a(x)).relu()))), X)
    assert reasons(fast) == {"aten.roll": "the engine has no such operator", "aten.relu": SMALL}


def test_outputs_that_are_inputs_or_constants() -> None:
    bias = torch.arange(4.0)
    fast = bqnn.compile(Function(lambda x: (x, x.clone(), bias)), X)
    assert fast.parts == ()
    assert all(torch.equal(y, expected) for y, expected in zip(fast(X), (X, X, bias)))


def test_what_nobody_takes_is_left_out() -> None:
    fast = compiled(Layers(lambda n, x: (n.a(x), n.b(x), rolled(x))[0]), X)
    assert ops(fast) == ["conv2d"]


def test_torch_parts_can_be_copied_and_pickled() -> None:
    fast = compiled(Layers(lambda n, x: n.norm(rolled(n.a(x)).permute(0, 2, 3, 1)) * x.shape[0]), X)
    assert any(isinstance(part, TorchPart) for part in fast.parts)
    expected = fast(X)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(X), expected)
