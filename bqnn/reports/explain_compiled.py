"""What runs in a compiled network, step by step, and how long each step takes of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.engine.compiled import CompiledNetwork, executor, run_torch
from bqnn.engine.partition import EnginePart, TorchPart
from bqnn.engine.program import Program

REPEATS = 15


class StepSpeed(NamedTuple):
    """What runs for a node of the engine, for its own ends ("border", "read", "write"), or a part of torch's."""

    name: str
    """Of the node; empty where it is for none."""
    op: str
    shape: tuple[int, ...] | None
    """Of the node's output, without the batch."""
    kernel: str
    seconds: float
    """Of the whole call, over all threads."""
    products: int
    """Of two numbers, for all images."""


class CompiledSpeed(list[StepSpeed]):
    """The steps in the order in which they run; printed as a table, times in milliseconds.

    A node that the program does not run by itself has no step: a concatenation whose parts are written where they
    belong, an input that is quantized as it is read.
    """

    def __init__(self, steps: Sequence[StepSpeed], seconds: float, images: int, with_kernels: bool) -> None:
        super().__init__(steps)
        self.seconds = seconds
        """The median time of the whole call."""
        self.images = images
        self.with_kernels = with_kernels
        """Whether the extension runs the engine's parts; where it is not there, they have no steps."""

    @property
    def unexplained(self) -> float:
        """Seconds of the call beyond its steps: Python, the dispatcher, allocation, threads that wait."""
        return self.seconds - sum(step.seconds for step in self)

    def __str__(self) -> str:
        head = ("node", "operator", "shape", "kernel", "ms", "share", "G products/s")
        rows = [head, *map(self._row, self)]
        rest = "Python, dispatch, allocation, waiting threads"
        if not self.with_kernels:
            rest = "the engine's parts on the reference, as there is no extension"
        shown = [(rest, self.unexplained), (f"the call, {self.images} images", self.seconds)]
        columns = list(zip(*rows))
        widths = [max(map(len, column)) + 2 for column in columns[:4]]
        labels = max(sum(widths), *(len(label) + 2 for label, _ in shown))
        widths[3] += labels - sum(widths)
        lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) + _ends(*row[4:]) for row in rows]
        lines += [f"{label:<{labels}}" + _ends(*self._times(seconds), "") for label, seconds in shown]
        return "\n".join(line.rstrip() for line in lines)

    def _row(self, step: StepSpeed) -> tuple[str, ...]:
        shape = "" if step.shape is None else f"[{', '.join(map(str, step.shape))}]"
        rate = f"{step.products / step.seconds / 1e9:.1f}" if step.products and step.seconds > 0 else ""
        return step.name, step.op, shape, step.kernel, *self._times(step.seconds), rate

    def _times(self, seconds: float) -> tuple[str, str]:
        return f"{1e3 * seconds:.4f}", f"{seconds / self.seconds:.1%}"


def explain_compiled(net: CompiledNetwork, inputs: tuple[Tensor, ...]) -> CompiledSpeed:
    """What :func:`bqnn.explain_speed` says of a compiled network."""
    if net.device.type != "cpu":
        raise ValueError(
            f"net must be on the CPU to be explained, got it on {net.device}: torch.profiler shows kernels there"
        )
    images, with_kernels = len(inputs[0]) if inputs and inputs[0].dim() else 0, True
    parts: list[Callable[[], list[StepSpeed]]] = []
    with torch.inference_mode():
        given = net.values(inputs)
        if not images:
            raise ValueError("x must have at least one image, got none")
        for index, part in enumerate(net.parts):
            values = [given[name] for name in part.inputs]
            if not isinstance(part, EnginePart):
                parts.append(_torch_steps(part, f"part {index}", values))
            elif isinstance(program := executor(part.graph, net.precision), Program):
                parts.append(_engine_steps(part, program, values, images))
            else:
                with_kernels = False
        totals: list[float] = []
        rounds: list[list[StepSpeed]] = []
        for _ in range(REPEATS + 2):  # two go before, for what is done once
            totals.append(_seconds(lambda: net(*inputs)))
            rounds.append([step for part in parts for step in part()])
    steps = [
        of_step[0]._replace(seconds=statistics.median(step.seconds for step in of_step)) for of_step in zip(*rounds[2:])
    ]
    return CompiledSpeed(steps, statistics.median(totals[2:]), images, with_kernels)


def _torch_steps(part: TorchPart, name: str, inputs: Sequence[Any]) -> Callable[[], list[StepSpeed]]:
    what = f"{len(part.calls)} call{'s' * (len(part.calls) != 1)}"
    return lambda: [StepSpeed(name, what, None, "torch", _seconds(lambda: run_torch(part, inputs)), 0)]


def _engine_steps(
    part: EnginePart, program: Program, inputs: Sequence[Any], images: int
) -> Callable[[], list[StepSpeed]]:
    """A function that runs a part once and gives its steps; what is for no node is one step a kernel."""
    graph = part.graph

    def steps() -> list[StepSpeed]:
        found: list[StepSpeed] = []
        others: dict[str, float] = {}
        for each in program.instructions(inputs):
            if each.node < 0:
                others[each.kernel] = others.get(each.kernel, 0.0) + each.seconds
                continue
            node = graph.nodes[each.node]
            shape = graph.values[node.output].shape
            found.append(StepSpeed(node.output, node.op, shape, each.kernel, each.seconds, each.products * images))
        return found + [StepSpeed("", kernel, None, "", seconds, 0) for kernel, seconds in others.items()]

    return steps


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _ends(milliseconds: str, share: str, rate: str) -> str:
    return f"{milliseconds:>10}{share:>9}{rate:>14}"
