"""explain_speed of compiled networks: a line a step, torch's parts, and what is left of the call."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import models
from bqnn.engine import compiled
from bqnn.engine.reference import run
from bqnn.reports import explain_compiled as module
from bqnn.reports.explain_compiled import CompiledSpeed, StepSpeed
from tests.support.compiled import Function, packed

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
kernels = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")


def lenet(precision: str) -> bqnn.CompiledNetwork:
    calibration = [X] if precision == "int8" else None
    return bqnn.compile(packed(models.lenet5(image_size=8)), X, precision=precision, calibration=calibration)


class Summed(nn.Module):
    """A product, a call that stays torch's, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cumsum(self.first(x), 1))


@kernels
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_line_a_step(precision: str) -> None:
    fast = lenet(precision)
    speed = bqnn.explain_speed(fast, X)
    steps = [step for step in speed if step.name]
    names = [node.output for node in fast.parts[0].graph.nodes if node.op in ("conv2d", "linear", "max_pool2d")]
    assert [step.name for step in steps] == names
    assert [step.op for step in steps] == ["conv2d", "max_pool2d", "conv2d", "linear", "linear", "linear"]
    assert [step.shape for step in steps] == [(6, 8, 8), (6, 4, 4), (16, 4, 4), (120,), (84,), (10,)]
    products = [6 * 64 * 25, 0, 16 * 16 * 150, 120 * 256, 84 * 120, 840]
    assert [step.products for step in steps] == [3 * count for count in products], "of all images"
    assert all(f" {precision} " in step.kernel for step in steps if step.op in ("conv2d", "linear"))
    assert {step.op for step in speed if not step.name} <= {"read", "write", "border"}
    assert len({step.op for step in speed if not step.name}) == len(speed) - len(steps), "one line for all borders"
    assert all(step.seconds >= 0 for step in speed) and any(step.seconds > 0 for step in speed)
    assert speed.unexplained == pytest.approx(speed.seconds - sum(step.seconds for step in speed))
    assert (speed.images, speed.with_kernels) == (3, True)
    lines = str(speed).splitlines()
    assert lines[0].split() == ["node", "operator", "shape", "kernel", "ms", "share", "G", "products/s"]
    assert [line.split()[0] for line in lines[1:7]] == names
    assert lines[-2].startswith("Python, dispatch, allocation, waiting threads") and lines[-1].startswith(
        "the call, 3 images"
    )
    assert len(lines) == 1 + len(speed) + 2


@kernels
def test_torch_s_parts_have_a_line_each() -> None:
    fast = bqnn.compile(Summed().eval(), X[:, 0, 0, :4])
    speed = bqnn.explain_speed(fast, X[:, 0, 0, :4])
    torchs = [step for step in speed if step.kernel == "torch"]
    assert [(step.name, step.op, step.shape) for step in torchs] == [("part 1", "1 call", None)]
    assert torchs[0].seconds > 0
    assert [step.op for step in speed if step.products] == ["linear", "linear"]


def test_several_inputs() -> None:
    weight = torch.ones(3, 4)
    fast = bqnn.compile(Function(lambda a, b: torch.nn.functional.linear(a + b, weight)), (X[:, 0, 0, :4],) * 2)
    assert bqnn.explain_speed(fast, (X[:, 0, 1, :4], X[:, 0, 2, :4])).images == 3
    with pytest.raises(TypeError, match="takes 2 inputs"):
        bqnn.explain_speed(fast, X[:, 0, 1, :4])


def test_without_the_extension_there_is_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_reference(graph: compiled.Graph, precision: str, device: Any = None) -> compiled.Run:
        return partial(run, graph, dtype=torch.float32)

    monkeypatch.setattr(compiled, "executor", on_the_reference)
    monkeypatch.setattr(module, "executor", on_the_reference)
    speed = bqnn.explain_speed(bqnn.compile(Summed().eval(), X[:, 0, 0, :4]), X[:, 0, 0, :4])
    assert [step.kernel for step in speed] == ["torch"]
    assert not speed.with_kernels and speed.unexplained > 0
    assert "on the reference, as there is no extension" in str(speed)


def test_inputs_that_do_not_fit() -> None:
    fast = lenet("fp32")
    with pytest.raises(ValueError, match="x must have the shape"):
        bqnn.explain_speed(fast, X[:, :, :4])
    with pytest.raises(ValueError, match="at least one image"):
        bqnn.explain_speed(fast, X[:0])
    with pytest.raises(TypeError, match="x must be a tensor where net is not compiled"):
        bqnn.explain_speed(packed(models.lenet5(image_size=8)), (X,))


def test_the_table() -> None:
    steps = [
        StepSpeed("conv", "conv2d", (6, 8, 8), "AVX2 fp32 panel", 0.002, 30_000_000),
        StepSpeed("", "read", None, "", 0.0005, 0),
        StepSpeed("part 1", "2 calls", None, "torch", 0.001, 0),
    ]
    speed = CompiledSpeed(steps, 0.004, 7, True)
    cells = [line.split() for line in str(speed).splitlines()[1:]]
    assert cells[0] == ["conv", "conv2d", "[6,", "8,", "8]", "AVX2", "fp32", "panel", "2.0000", "50.0%", "15.0"]
    assert cells[1] == ["read", "0.5000", "12.5%"]
    assert cells[2] == ["part", "1", "2", "calls", "torch", "1.0000", "25.0%"]
    assert cells[3] == ["Python,", "dispatch,", "allocation,", "waiting", "threads", "0.5000", "12.5%"]
    assert cells[4] == ["the", "call,", "7", "images", "4.0000", "100.0%"]
    ends = [line.index("%") for line in str(speed).splitlines()[1:]]
    assert len(set(ends)) == 1, "columns stand below each other"
