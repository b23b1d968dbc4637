"""From a graph to a program of the compiled extension: its description as integers, numbers and tensors.

The extension plans the program itself (layouts, borders, lifetimes, the arena) and checks every number it is given;
nothing of the plan comes from outside. The order of the numbers here is that of csrc/bindings/engine.cpp.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.native import cpu_isa
from bqnn.engine.check_graph import DTYPES
from bqnn.engine.graph import ACTIVATIONS, Graph, Node
from bqnn.engine.operators import OPERATORS

TENSORS = ("codes", "levels", "integers", "weight", "scale", "bias")


class Instruction(NamedTuple):
    """What a program runs for a node, or for its own ends."""

    node: int
    """Which of the graph's nodes; -1 for inputs, outputs and borders."""
    kernel: str
    seconds: float
    """Over all threads, as a part of the whole call's time."""
    products: int
    """Of two numbers, for one image."""


class Program:
    """A graph as the extension runs it, on the CPU. Any number of threads may call it at the same time.

    Args:
        graph: a sound one (:meth:`Graph.check`).
        limits: what the plan is made by, for who measures or tests it: ``cache``, bytes of images that a thread takes
            through all steps together; ``kept_panels``, bytes of decoded weights that are kept between calls;
            ``wide_layer``, weights from which on threads share a fully connected layer; ``team``, how many times
            over a call has to be worth another thread before others are woken.

    Raises:
        ValueError: the extension refuses the graph.
        RuntimeError: there are no CPU kernels.
    """

    def __init__(self, graph: Graph, **limits: int) -> None:
        if cpu_isa() == "none":
            raise RuntimeError("the engine's kernels are in the compiled extension, which is not there")
        words, numbers, tensors = describe(graph)
        self._handle = torch.ops.bqnn_cpu.engine_program(
            torch.tensor(words, dtype=torch.int64, device="cpu"),
            torch.tensor(numbers, dtype=torch.float32, device="cpu"),
            tensors,
            **limits,
        )
        self.run: Callable[[list[Tensor]], list[Tensor]] = partial(torch.ops.bqnn_cpu.engine_run.default, self._handle)
        """The graph's outputs, float32, for inputs float32 or uint8 [N, *shape], of any strides, in a list.

        Raises:
            ValueError: an input has another dtype, shape or device, or another batch than the first.
        """
        weakref.finalize(self, torch.ops.bqnn_cpu.engine_free, self._handle)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As :attr:`run`."""
        return self.run(list(inputs))

    def instructions(self, inputs: Sequence[Tensor]) -> list[Instruction]:
        """What runs, and how long it takes on these inputs."""
        times = torch.ops.bqnn_cpu.engine_times(self._handle, list(inputs)).tolist()
        lines = torch.ops.bqnn_cpu.engine_describe(self._handle, inputs[0].shape[0]).splitlines()[1:]
        parts = [line.split(" ", 1) for line in lines]
        return [
            Instruction(int(node), kernel, seconds, int(products))
            for (node, kernel), (seconds, products) in zip(parts, times)
        ]

    @property
    def image_bytes(self) -> tuple[int, int]:
        """Bytes of an image: in the arena of the thread that computes it, and in what all threads share."""
        local, shared = torch.ops.bqnn_cpu.engine_describe(self._handle).splitlines()[0].split()
        return int(local), int(shared)


def describe(graph: Graph) -> tuple[list[int], list[float], list[Tensor]]:
    """The description of a graph: integers, numbers and tensors."""
    index = {name: i for i, name in enumerate(graph.values)}
    operators = {name: i for i, name in enumerate(OPERATORS)}
    words: list[int] = [len(index)]
    numbers: list[float] = []
    tensors: list[Tensor] = []
    for value in graph.values.values():
        words += [len(value.shape), *_image(value.shape), DTYPES.index(value.dtype), value.zero]
        numbers.append(value.scale)
    words.append(len(graph.nodes))
    for node in graph.nodes:
        words += [operators[node.op], len(node.inputs), *(index[name] for name in node.inputs)]
        words += [index[node.output], ACTIVATIONS.index(node.activation.name)]
        words += _window(node) + _sizes(node)
        numbers += [node.activation.low, node.activation.high, float(node.attributes.get("value", 0.0))]
        for name in TENSORS:
            # An affine node's shift is where a layer's bias is.
            tensor = node.tensors.get("shift" if node.op == "affine" and name == "bias" else name)
            words.append(-1 if tensor is None else len(tensors))
            if tensor is not None:
                tensors.append(tensor.contiguous())
    for names in (graph.inputs, graph.outputs):
        words += [len(names), *(index[name] for name in names)]
    return words, numbers, tensors


def _image(sizes: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """A shape, or sizes by axis, of three axes."""
    return (*sizes, *(fill,) * (3 - len(sizes)))


def _window(node: Node) -> list[int]:
    """kernel, stride, padding (top, bottom, left, right), dilation, ceil, count_padding, divisor, groups."""
    of: dict[str, Any] = node.attributes
    padding = tuple(of.get("padding", (0, 0)))
    if len(padding) == 2:
        padding = (padding[0], padding[0], padding[1], padding[1])
    return [
        *of.get("kernel", (1, 1)),
        *of.get("stride", (1, 1)),
        *padding,
        *of.get("dilation", (1, 1)),
        int(of.get("ceil_mode", 0)),
        int(of.get("count_include_pad", 0)),
        int(of.get("divisor", 0)),
        int(of.get("groups", 1)),
    ]


def _sizes(node: Node) -> list[int]:
    """low, high and step, by axis: of a pad what is before and after, of a slice start, stop and step."""
    of: dict[str, Any] = node.attributes
    if node.op == "pad":
        return [*_image(of["low"], 0), *_image(of["high"], 0), 1, 1, 1]
    if node.op == "slice":
        return [*_image(of["start"], 0), *_image(of["stop"], 1), *_image(of["step"], 1)]
    return [0, 0, 0, 0, 0, 0, 1, 1, 1]
