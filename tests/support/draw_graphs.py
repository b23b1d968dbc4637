"""Sound graphs drawn at random: every operator, odd sizes, residuals, branches that join, several outputs.

They are small, up to about a million products, so that the float64 reference runs one in milliseconds. Quantized ones
have uint8 values wherever a coin says so, in more mixtures than the quantize pass makes.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.core.codes import pack_codes
from bqnn.engine.graph import NO_ACTIVATION, RELU, Activation, Graph, Node, Shape, Value
from bqnn.engine.operators import OPERATORS, output_shape
from bqnn.engine.reference import run

MOST_PRODUCTS = 300_000  # of a node
BATCH = 3
ACTIVATIONS = (
    NO_ACTIVATION,
    RELU,
    Activation("clamp", 0.0, 6.0),
    Activation("clamp", -1.0, 0.5),
    Activation("leaky_relu", 0.25),
    *(Activation(name) for name in ("hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh")),
)


def draw_graph(seed: int, quantized: bool = False) -> tuple[Graph, tuple[Tensor, ...]]:
    """A sound graph and its inputs, float32 [3, ...]; the same for the same seed.

    Outputs, and the graph's inputs, are float32 in a quantized graph too.
    """
    drawing = _Drawing(seed)
    graph = drawing.graph()
    graph.check()
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(BATCH, *graph.values[name].shape, generator=generator) for name in graph.inputs)
    if quantized:
        graph = _quantized(graph, inputs, drawing.random)
        graph.check()
    return graph, inputs


class _Drawing:
    """A graph as it grows: a step appends a node or a few, and leaves what it made to later ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []

    def graph(self) -> Graph:
        pick = self.random
        size = (pick.choice((1, 2, 3, 5, 8, 16)), pick.randint(1, 13), pick.randint(1, 13))
        inputs = [self.value(size if pick.random() < 0.9 else (pick.randint(1, 70),))]
        if pick.random() < 0.2:
            inputs.append(self.value(size))
        for name in tuple(inputs):
            self.add("activation", (name,))
        for _ in range(pick.randint(2, 14)):
            self.step()
        if pick.random() < 0.6:
            self.tail()
        used = {name for node in self.nodes for name in node.inputs}
        outputs = [name for name in self.values if name not in used]
        outputs += [name for name in self.values if name in used and name not in inputs and pick.random() < 0.05]
        return Graph(tuple(inputs), tuple(outputs), self.values, tuple(self.nodes))

    def value(self, shape: Shape) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = Value(name, shape)
        return name

    def shape(self, name: str) -> Shape:
        return self.values[name].shape

    def add(self, op: str, inputs: tuple[str, ...], activation: Activation = NO_ACTIVATION, **rest: Any) -> str:
        """Appends a node and gives its output's name; ``rest`` are tensors and attributes."""
        tensors = {name: each for name, each in rest.items() if isinstance(each, Tensor)}
        attributes = {name: each for name, each in rest.items() if name not in tensors}
        node = Node(op, inputs, "", attributes, tensors, activation)
        output = self.value(output_shape(node, [self.shape(name) for name in inputs]))
        self.nodes.append(dataclasses.replace(node, output=output))
        return output

    def step(self) -> None:
        """One operator on one of the last values, the last one mostly; one that does not fit it is left out."""
        x = self.random.choice(list(self.values)[-3:]) if self.random.random() < 0.3 else list(self.values)[-1]
        images = (
            *(self.conv2d,) * 6,
            *(self.max_pool2d, self.avg_pool2d, self.adaptive, self.gate),
        )
        both = (
            self.block,
            self.linear,
            self.affine,
            self.activation,
            self.binary,
            self.binary,
            self.cat,
            self.pad,
            self.slice,
        )
        kinds = (*images, *both, self.reshape) if len(self.shape(x)) == 3 else (*both, self.linear, self.reshape)
        self.random.choice(kinds)(x)

    def tail(self) -> None:
        """A classifier: mean, linear layers, softmax."""
        x = list(self.values)[-1]
        if len(self.shape(x)) == 3 and self.random.random() < 0.7:
            x = self.add("adaptive_avg_pool2d", (x,), size=(1, 1))
        for _ in range(self.random.randint(1, 2)):
            x = self.linear(x)
        if self.random.random() < 0.5:
            self.add(self.random.choice(("softmax", "log_softmax")), (x,))

    # ---- what a step may append ----

    def conv2d(self, x: str, kernel: int | None = None) -> str:
        pick, (channels, height, width) = self.random, self.shape(x)
        kernels = (kernel or pick.choice((1, 1, 2, 3, 3, 5)), kernel or pick.choice((1, 2, 3, 3, 5, 7)))
        dilation = (1, 1) if pick.random() < 0.8 else (pick.randint(1, 2), pick.randint(1, 3))
        stride = (1, 1) if pick.random() < 0.6 else (pick.randint(1, 3), pick.randint(1, 2))
        reach = [(k - 1) * d for k, d in zip(kernels, dilation)]
        if pick.random() < 0.6:  # "same"
            padding = (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
        else:
            padding = tuple(pick.randint(0, 2) for _ in range(4))
            if height + padding[0] + padding[1] <= reach[0] or width + padding[2] + padding[3] <= reach[1]:
                return x
        groups = pick.choice([g for g in range(1, channels + 1) if channels % g == 0])
        groups = pick.choice((1, 1, groups, channels))
        outputs = groups * pick.randint(1, max(1, 24 // groups))
        outputs = channels if pick.random() < 0.4 else outputs
        columns = channels // groups * math.prod(kernels)
        if outputs * columns * height * width > MOST_PRODUCTS:
            return x
        attributes = {"kernel": kernels, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self.product("conv2d", x, outputs, columns, attributes)

    def linear(self, x: str) -> str:
        columns = math.prod(self.shape(x))
        return self.product("linear", x, self.random.choice((1, 7, 10, 16, 33, columns % 64 + 1)), columns, {})

    def product(self, op: str, x: str, outputs: int, columns: int, attributes: dict[str, Any]) -> str:
        tensors = self.weight(outputs, columns)
        for name in ("scale", "bias"):
            if self.random.random() < 0.6:
                tensors[name] = self.numbers(outputs) + (1 if name == "scale" else 0)
        activation = NO_ACTIVATION if self.random.random() < 0.5 else self.random.choice(ACTIVATIONS)
        y = self.add(op, (x,), activation, **attributes, **tensors)
        same = [name for name in self.values if self.shape(name) == self.shape(y) and name != y]
        if same and self.random.random() < 0.3:
            # The node again, at the same place, with something to add.
            node = self.nodes[-1]
            self.nodes[-1] = dataclasses.replace(node, inputs=(x, self.random.choice(same)))
        return self.affine(y) if self.random.random() < 0.25 else y

    def weight(self, outputs: int, columns: int) -> dict[str, Tensor]:
        size = columns**-0.5
        if self.random.random() < 0.2:
            return {"weight": self.numbers(outputs, columns) * size}
        num_levels = self.random.randint(2, 16)
        codes = torch.randint(0, num_levels, (outputs, columns), generator=self.torch, dtype=torch.uint8)
        books = self.random.choice((1, outputs))
        levels = self.numbers(books, num_levels).sort(1).values * size
        return {"codes": pack_codes(codes, num_levels), "levels": levels.contiguous()}

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def affine(self, x: str) -> str:
        channels = self.shape(x)[0]
        activation = self.random.choice(ACTIVATIONS)
        return self.add("affine", (x,), activation, scale=self.numbers(channels), shift=self.numbers(channels))

    def activation(self, x: str) -> str:
        return self.add("activation", (x,), self.random.choice(ACTIVATIONS))

    def binary(self, x: str) -> str:
        shape = self.shape(x)
        fits = [
            name
            for name in self.values
            if len(self.shape(name)) == len(shape) and all(b in (a, 1) for a, b in zip(shape, self.shape(name)))
        ]
        activation = self.random.choice((NO_ACTIVATION, RELU, self.random.choice(ACTIVATIONS)))
        return self.add(self.random.choice(("add", "sub", "mul")), (x, self.random.choice(fits)), activation)

    def gate(self, x: str) -> str:
        """Squeeze and excitation."""
        y = self.add("adaptive_avg_pool2d", (x,), size=(1, 1))
        channels, few = self.shape(x)[0], self.random.randint(1, 6)
        y = self.add("activation", (self.dense(y, few, channels),), RELU)
        gate = Activation(self.random.choice(("sigmoid", "hardsigmoid")))
        y = self.add("activation", (self.dense(y, channels, few),), gate)
        return self.add("mul", (x, y))

    def block(self, x: str) -> str:
        """Two layers, and what they read added to it: by a node of its own."""
        channels = self.shape(x)[0]
        y = self.activation(self.dense(x, channels, channels))
        y = self.dense(y, channels, channels)
        inputs = (x, y) if self.random.random() < 0.5 else (y, x)
        return self.add("add", inputs, self.random.choice((NO_ACTIVATION, RELU)))

    def dense(self, x: str, outputs: int, columns: int) -> str:
        """A convolution of 1 x 1 or a linear layer, without an activation."""
        size = {"kernel": (1, 1), "stride": (1, 1), "padding": (0,) * 4, "dilation": (1, 1), "groups": 1}
        op, attributes = ("conv2d", size) if len(self.shape(x)) == 3 else ("linear", {})
        return self.add(op, (x,), **attributes, **self.weight(outputs, columns), bias=self.numbers(outputs))

    def windows(self, x: str) -> dict[str, Any] | None:
        pick, size = self.random, self.shape(x)[1:]
        kernel = (pick.randint(1, 3), pick.randint(1, 3))
        if kernel[0] > size[0] or kernel[1] > size[1]:
            return None
        padding = tuple(pick.randint(0, each // 2) for each in kernel)
        stride = (pick.randint(1, 3), pick.randint(1, 3))
        return {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": pick.randint(0, 1)}

    def max_pool2d(self, x: str) -> str:
        windows = self.windows(x)
        if windows is None:
            return x
        reach = [2 * each - 1 for each in windows["kernel"]]
        fits = reach[0] <= self.shape(x)[1] and reach[1] <= self.shape(x)[2]
        dilation = (2, 2) if fits and self.random.random() < 0.3 else (1, 1)
        return self.add("max_pool2d", (x,), **windows, dilation=dilation)

    def avg_pool2d(self, x: str) -> str:
        windows = self.windows(x)
        flags = {"count_include_pad": self.random.randint(0, 1), "divisor": self.random.choice((0, 0, 5))}
        return self.add("avg_pool2d", (x,), **windows, **flags) if windows else x

    def adaptive(self, x: str) -> str:
        size = tuple(self.random.choice((1, 2, 3, each)) for each in self.shape(x)[1:])
        return self.add("adaptive_avg_pool2d", (x,), size=size)

    def cat(self, x: str) -> str:
        fits = [name for name in self.values if self.shape(name)[1:] == self.shape(x)[1:]]
        inputs = tuple(self.random.choice(fits) for _ in range(self.random.randint(1, 3)))
        return self.add("cat", (x, *inputs)) if sum(self.shape(name)[0] for name in inputs) < 100 else x

    def pad(self, x: str) -> str:
        low, high = (tuple(self.random.randint(0, 2) for _ in self.shape(x)) for _ in range(2))
        return self.add("pad", (x,), low=low, high=high, value=self.random.choice((0.0, 0.0, 0.5)))

    def slice(self, x: str) -> str:
        pick, shape = self.random, self.shape(x)
        start = tuple(pick.randint(0, size - 1) if pick.random() < 0.3 else 0 for size in shape)
        stop = tuple(pick.randint(a + 1, size) if pick.random() < 0.3 else size for a, size in zip(start, shape))
        return self.add("slice", (x,), start=start, stop=stop, step=tuple(pick.choice((1, 1, 1, 2)) for _ in shape))

    def reshape(self, x: str) -> str:
        shape = self.shape(x)
        total = math.prod(shape)
        first = self.random.choice([each for each in range(1, total + 1) if total % each == 0])
        shapes: list[Shape] = [(total,), (first, total // first, 1), (1, total // first, first), shape[::-1]]
        return self.add("reshape", (x,), shape=self.random.choice(shapes))


# ---- quantized graphs ----


def _quantized(graph: Graph, inputs: tuple[Tensor, ...], pick: random.Random) -> Graph:
    """``graph`` with uint8 values: all that one scale ties together are, or none of them."""
    found = run(graph, inputs, keep=True)
    group = {name: name for name in graph.values}
    for node in graph.nodes:
        if OPERATORS[node.op].moves:
            first = group[node.output]
            joined = {group[name] for name in node.inputs} | {first}
            group = {name: first if each in joined else each for name, each in group.items()}
    floats = {group[name] for name in (*graph.inputs, *graph.outputs)}
    floats |= {group[node.output] for node in graph.nodes if "softmax" in node.op}
    floats |= {each for each in sorted(set(group.values())) if pick.random() < 0.15}
    values = {}
    for name, value in graph.values.items():
        members = [found[each] for each in graph.values if group[each] == group[name]]
        low, high = min(float(x.min()) for x in members), max(float(x.max()) for x in members)
        low, high = min(low, 0.0), max(high, 0.0)
        # Ranges that are a little too small show whether numbers beyond them are clamped.
        scale = float(np.float32(0.9 * max(high - low, 1e-3) / 255))
        zero = min(255, round(-0.9 * low / scale))
        quantized = dataclasses.replace(value, dtype="uint8", scale=scale, zero=zero)
        values[name] = value if group[name] in floats else quantized
    nodes = tuple(_with_integers(node, values) for node in graph.nodes)
    return graph.replaced(values=values, nodes=nodes)


def _with_integers(node: Node, values: dict[str, Value]) -> Node:
    x = values[node.inputs[0]]
    if node.op not in ("conv2d", "linear") or x.dtype != "uint8":
        return node
    name = "levels" if "levels" in node.tensors else "weight"
    step, integers = _rounded(node.tensors[name])
    kept = {each: tensor for each, tensor in node.tensors.items() if each != name}
    channels = len(node.tensors["codes" if name == "levels" else "weight"])
    scale = node.tensors.get("scale", torch.ones(channels)) * step * x.scale
    kept |= {
        "integers" if name == "levels" else "weight": integers,
        "scale": scale.float().expand(channels).contiguous(),
    }
    return dataclasses.replace(node, tensors=kept)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A step a row and integers up to 16, 32 or 64, by chance of the weight's size."""
    most = (16, 32, 64)[weight.numel() % 3]
    step = weight.abs().amax(1).clamp(min=1e-6) / most
    return step, (weight / step[:, None]).round().to(torch.int8)
