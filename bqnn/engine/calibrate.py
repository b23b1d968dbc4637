"""What a graph's values are over a few batches of inputs: what the scales of "int8" are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bqnn.core.native import cpu_isa
from bqnn.core.text import shown
from bqnn.engine import reference
from bqnn.engine.graph import Graph, Node
from bqnn.engine.integers import CodeSums, CodeSumsObserver
from bqnn.engine.operators import OPERATORS, columns_of
from bqnn.engine.program import Program

BINS = 2048  # of a histogram; even
SAMPLED = 1 << 18  # numbers of a value that a batch adds to its histogram
SMALLEST = torch.finfo(torch.float32).tiny
CUTS, SMALLEST_CUT = 91, 0.1  # shares of the largest number that a range may be cut to


class Calibration(NamedTuple):
    """Of each value of a graph, by its name."""

    ranges: dict[str, tuple[float, float]]
    """The least and the largest number that 8 bits should hold."""
    means: dict[str, Tensor]
    """Of what conv2d and linear nodes multiply: of each element over all images, float64, in the value's shape."""
    sums: dict[str, CodeSums]
    """Of the inputs of layers with codes, by the names of what they give."""


class Observer:
    """What is known of one value: its least and largest number, a histogram of their sizes, and if wanted its mean."""

    def __init__(self, mean: bool) -> None:
        self._mean = mean
        self.low, self.high = math.inf, -math.inf
        self.span = 0.0
        """Of the histogram, from 0 on; it doubles when a number is beyond it."""
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        """Of |x|, without zeros, whose rounding costs nothing."""
        self.images, self.sum = 0, torch.zeros((), dtype=torch.float64)

    def add(self, name: str, x: Tensor) -> None:
        """Raises ValueError where a number is not finite, with the value's name."""
        if not x.numel():
            return
        low, high = (float(each) for each in x.aminmax())
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"value {shown(name)} is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self._mean:
            self.images, self.sum = self.images + len(x), self.sum + x.sum(0).double()
        largest = max(-low, high)
        self.span = self.span or largest
        while largest > self.span:
            self.span *= 2
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
        if largest > 0:
            # An odd step meets all channels and columns, whose numbers are powers of two mostly.
            some = x.flatten()[:: x.numel() // SAMPLED | 1].float()
            self.counts += torch.histc(some.abs(), BINS, SMALLEST, self.span)  # what is less is left out

    def range(self) -> tuple[float, float]:
        """The least and largest number, both cut to where 8 bits have the smallest mean squared error.

        Logits of LeNet-5 on MNIST and of three small networks on CIFAR-10 (ReLU, hard-swish, residuals) were as near to
        float32's as with whole ranges, 0.7 to 2% off, but one number that is far out can not spoil these. With ranges
        cut at 99.9% of the numbers they were two to three times as far off, at 99.99% up to a quarter more.
        """
        largest = max(-self.low, self.high)
        sizes = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.span / BINS)
        cuts = torch.linspace(SMALLEST_CUT, 1, CUTS, dtype=torch.float64)[:, None] * largest  # [CUTS, 1]
        steps = (cuts.clamp(max=max(self.high, 0.0)) + cuts.clamp(max=max(-self.low, 0.0))) / 255
        rounding = steps**2 / 12
        errors = torch.where(sizes <= cuts, rounding, (sizes - cuts) ** 2) @ self.counts
        cut = float(cuts[errors.argmin(), 0])
        return max(self.low, -cut), min(self.high, cut)


def calibrate(graph: Graph, batches: Iterable[Tensor | Sequence[Tensor]]) -> Calibration:
    """The range of each value of ``graph``, and the means, for :func:`bqnn.engine.quantize.quantize`.

    The extension computes the values where it is there, else the reference.

    Args:
        graph: sound, of float32 values, after the passes.
        batches: each the graph's inputs, a tensor [B, *shape] for each; of a graph with one input, that tensor.

    Raises:
        ValueError: there are no batches, or none with an image; an input has another shape; a value is not finite.
    """
    multiplied = {node.inputs[0] for node in graph.nodes if node.op in ("conv2d", "linear")}
    moved = {node.output for node in graph.nodes if OPERATORS[node.op].moves}
    seen = {name: Observer(name in multiplied) for name in graph.values if name not in moved or name in multiplied}
    layers = {node.output: _observer_of(graph, node) for node in graph.nodes if "codes" in node.tensors}
    run = _values_of(graph, tuple(seen))
    for index, batch in enumerate(batches):
        inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        try:
            reference.check_inputs(graph, inputs)
            found = run([x.float() for x in inputs])
            for name, x in found.items():
                seen[name].add(name, x)
            for layer in layers.values():
                layer.add(found[layer.node.inputs[0]])
        except ValueError as error:
            raise ValueError(f"calibration batch {index}: {error}") from None
    if any(observer.low > observer.high for observer in seen.values()):
        raise ValueError("calibration must have a batch of one image or more, got none")
    exact = {name: (seen[name].low, seen[name].high) for name in graph.inputs}
    ranges = {name: observer.range() for name, observer in seen.items()} | exact
    for node in graph.nodes:
        if node.output not in ranges:
            ranges[node.output] = _range_of_moved(node, ranges)
    means = {name: seen[name].sum / seen[name].images for name in multiplied}
    return Calibration(ranges, means, {name: layer.found() for name, layer in layers.items()})


def _observer_of(graph: Graph, node: Node) -> CodeSumsObserver:
    columns = columns_of(node, graph.values[node.inputs[0]].shape)
    return CodeSumsObserver(node, columns, math.prod(graph.values[node.output].shape[1:]))


def _range_of_moved(node: Node, ranges: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Of what a node makes that moves its inputs: it holds their numbers, and those of a border."""
    numbers = [number for name in node.inputs for number in ranges[name]]
    numbers += [node.attributes["value"]] if node.op == "pad" else []
    return min(numbers), max(numbers)


def _values_of(graph: Graph, wanted: tuple[str, ...]) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    """What computes the values ``wanted`` of ``graph``, inputs among them, by their names, in float32."""
    if cpu_isa() == "none":

        def run(inputs: list[Tensor]) -> dict[str, Tensor]:
            found = reference.run(graph, inputs, torch.float32, keep=True)
            return {name: found[name] for name in wanted}

        return run
    names = tuple(name for name in wanted if name not in graph.inputs)
    program: Callable[[list[Tensor]], list[Tensor]] = Program(graph.replaced(outputs=names)) if names else lambda _: []
    return lambda inputs: dict(zip((*graph.inputs, *names), (*inputs, *program(inputs))))
