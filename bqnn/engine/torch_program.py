"""A graph as torch runs it on a device of its own, a GPU above all: its products by packed layers, all else by torch.

What the passes have folded stays folded: BatchNorm is in the codebooks, a ReLU in the layer. Images are channels-last
from the first node on, as tensor cores want them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.codes import pack_codes, unpack_codes
from bqnn.engine.graph import NO_ACTIVATION, RELU, Activation, Graph, Node, Shape
from bqnn.engine.operators import columns_of
from bqnn.engine.partition import WORK
from bqnn.engine.reference import decoded_weight, of_floats
from bqnn.packed.convolutions import PackedConv2d
from bqnn.packed.layers import PackedLinear

Function = Callable[[Tensor], Tensor]

_IN_FLOAT32 = ("softmax", "log_softmax")


class _Step(NamedTuple):
    """What runs a node."""

    run: Callable[[list[Tensor]], Tensor]
    inputs: tuple[str, ...]
    output: str
    last_read: tuple[str, ...]
    """Values that no later step reads."""


class TorchProgram:
    """A graph of float32 values, by torch. It reads nothing back from the device, so that a CUDA graph can record it.

    Args:
        graph: a sound one (:meth:`Graph.check`).
        device: where it runs, and where it keeps its weights: codes, or what "auto" decodes of them.
        precision: "fp32"; or "bf16": values are bfloat16, and sums and outputs are float32.

    Raises:
        ValueError: the graph is quantized.
    """

    def __init__(self, graph: Graph, device: torch.device, precision: str = "fp32") -> None:
        if any(value.dtype != "float32" for value in graph.values.values()):
            raise ValueError("graph must be float32 to run by torch, got one with uint8 values")
        self.device = device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._inputs, self._outputs = graph.inputs, graph.outputs
        last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
        last |= dict.fromkeys(graph.outputs, len(graph.nodes))
        self._steps = [
            _Step(
                self._step(graph, node, precision),
                node.inputs,
                node.output,
                tuple(name for name in dict.fromkeys(node.inputs) if last[name] == index),
            )
            for index, node in enumerate(graph.nodes)
        ]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The graph's outputs, float32, for inputs [B, *shape] on the device, of any floating dtype and strides."""
        found = {name: self.taken(x) for name, x in zip(self._inputs, inputs)}
        for step in self._steps:
            found[step.output] = step.run([found[name] for name in step.inputs])
            for name in step.last_read:
                del found[name]
        return [found[name].float() for name in self._outputs]

    def taken(self, x: Tensor) -> Tensor:
        """An input as the first node takes it; itself where it is that already."""
        order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        return x.to(self.dtype).contiguous(memory_format=order)

    def _step(self, graph: Graph, node: Node, precision: str) -> Callable[[list[Tensor]], Tensor]:
        read, written = graph.values[node.inputs[0]], graph.values[node.output]
        if node.op in WORK:
            alone = len(node.inputs) == 1 and node.activation == RELU
            layer = self._layer(node, read.shape, precision, alone)
            after = NO_ACTIVATION if alone else node.activation
            return lambda inputs: activated(after, _sum(layer(inputs[0]), inputs[1:]))
        inner = torch.float32 if node.op in _IN_FLOAT32 else self.dtype
        node = replace(node, tensors={name: self._moved(x.to(inner)) for name, x in node.tensors.items()})

        def run(inputs: list[Tensor]) -> Tensor:
            return activated(node.activation, of_floats(node, [x.to(inner) for x in inputs], written).to(self.dtype))

        return run

    def _layer(self, node: Node, x: Shape, precision: str, relu: bool) -> Function:
        """The product of a conv2d or linear node with its scale and bias, and its ReLU."""
        bias, columns = node.tensors.get("bias"), columns_of(node, x)
        coded = _scaled_codes(node, columns)
        before, sizes = _window(node)
        if coded is None:
            layer = self._dense_layer(node, x, sizes, relu)
        elif node.op == "linear":
            layer = PackedLinear(columns, *coded, bias, precision, relu=relu).to(self.device)
        else:
            kernel = node.attributes["kernel"]
            layer = PackedConv2d(x[0], kernel, *coded, bias, **sizes, precision=precision, relu=relu).to(self.device)
        return layer if before is None else lambda x: layer(before(x))

    def _dense_layer(self, node: Node, x: Shape, sizes: dict[str, Any], relu: bool) -> Function:
        bias, weight = node.tensors.get("bias"), _scaled_weight(node, columns_of(node, x)).to(self.dtype)
        product: Callable[..., Tensor] = F.linear
        if node.op == "conv2d":
            product = partial(F.conv2d, **sizes)
            weight = weight.view(-1, x[0] // sizes["groups"], *node.attributes["kernel"])
            weight = weight.contiguous(memory_format=torch.channels_last)
        weight, added = self._moved(weight), None if bias is None else self._moved(bias.to(self.dtype))
        activation = RELU if relu else NO_ACTIVATION
        return lambda x: activated(activation, product(x, weight, added))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def _window(node: Node) -> tuple[Function | None, dict[str, Any]]:
    """What comes before a product, if anything does, and the sizes that the product of a convolution takes."""
    if node.op == "linear":
        return partial(torch.flatten, start_dim=1), {}
    sizes = {name: node.attributes[name] for name in ("stride", "dilation", "groups")}
    top, bottom, left, right = node.attributes["padding"]
    if top == bottom and left == right:
        return None, sizes | {"padding": (top, left)}
    return partial(F.pad, pad=(left, right, top, bottom)), sizes | {"padding": (0, 0)}


def _sum(y: Tensor, residual: Sequence[Tensor]) -> Tensor:
    return y + residual[0] if residual else y


def _scaled_codes(node: Node, columns: int) -> tuple[Tensor, Tensor] | None:
    """Codes and levels of the weight with its scale; None where it has no codes, or no increasing levels then."""
    if "codes" not in node.tensors:
        return None
    codes, levels, scale = node.tensors["codes"], node.tensors["levels"], node.tensors.get("scale")
    if scale is None:
        return codes, levels
    levels = levels * scale[:, None]
    falling = scale < 0
    if bool(falling.any()):  # a channel's levels then go down: its codes are counted from the other end
        num_levels = levels.shape[1]
        digits = unpack_codes(codes, num_levels, columns)
        codes = pack_codes(torch.where(falling[:, None], num_levels - 1 - digits, digits), num_levels)
        levels = torch.where(falling[:, None], levels.flip(1), levels)
    increasing = bool(levels.isfinite().all()) and bool((levels.diff(dim=1) > 0).all())
    return (codes, levels) if increasing else None


def _scaled_weight(node: Node, columns: int) -> Tensor:
    weight = decoded_weight(node, columns, torch.float32)
    scale = node.tensors.get("scale")
    return weight if scale is None else weight * scale[:, None]


def activated(activation: Activation, y: Tensor) -> Tensor:
    """``activation`` of every element, by torch's own kernels."""
    match activation.name:
        case "none":
            return y
        case "clamp":
            return y.relu() if activation == RELU else y.clamp(activation.low, activation.high)
        case "leaky_relu":
            return F.leaky_relu(y, activation.low)
    return _ACTIVATIONS[activation.name](y)


_ACTIVATIONS: dict[str, Function] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
}
