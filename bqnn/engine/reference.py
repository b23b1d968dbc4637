"""What a graph computes, node after node by torch: the reference of every backend, and what runs without one.

Values of float32 are computed in the dtype that is asked for. Where an input or the output of a node is uint8, it is
computed as :mod:`bqnn.engine.operators` states, bit for bit: sums of integers exactly, everything else in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.codes import unpack_codes
from bqnn.core.text import shown
from bqnn.engine.graph import Activation, Graph, Node, Shape, Value
from bqnn.engine.operators import columns_of
from bqnn.engine.windows import window_sums


@overload
def run(graph: Graph, inputs: Sequence[Tensor], dtype: torch.dtype = ...) -> tuple[Tensor, ...]: ...
@overload
def run(
    graph: Graph, inputs: Sequence[Tensor], dtype: torch.dtype = ..., *, keep: Literal[True]
) -> dict[str, Tensor]: ...


@torch.no_grad()
def run(
    graph: Graph, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float64, *, keep: bool = False
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """The outputs of ``graph``, which is sound (:meth:`Graph.check`).

    Args:
        graph: what to run.
        inputs: a tensor [B, *shape] for each input of the graph: floating point, or uint8 where its value is; B may
            be 0.
        dtype: float64 or float32, of what is not quantized.
        keep: returns every value by its name.

    Returns:
        The outputs [B, *shape] in ``dtype``, or uint8 where their values are.

    Raises:
        ValueError: there is another number of inputs, or one has another shape or dtype.
    """
    check_inputs(graph, inputs)
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    found: dict[str, Tensor] = {}
    for name, x in zip(graph.inputs, inputs):
        found[name] = x if x.dtype == torch.uint8 else x.to(dtype)
    for index, node in enumerate(graph.nodes):
        read = [graph.values[name] for name in node.inputs]
        found[node.output] = _run_node(
            node, [found[name] for name in node.inputs], read, graph.values[node.output], dtype
        )
        for name in set(node.inputs):
            if not keep and last[name] == index and name not in graph.outputs:
                del found[name]
    return found if keep else tuple(found[name] for name in graph.outputs)


def check_inputs(graph: Graph, inputs: Sequence[Tensor]) -> None:
    """Raises ValueError where ``inputs`` are not what ``graph`` takes, as :func:`run` says."""
    if len(inputs) != len(graph.inputs):
        raise ValueError(f"the graph has {len(graph.inputs)} inputs, got {len(inputs)}")
    for name, x in zip(graph.inputs, inputs):
        value = graph.values[name]
        if x.dim() == 0 or tuple(x.shape[1:]) != value.shape or len(x) != len(inputs[0]):
            raise ValueError(
                f"input {shown(name)} must have the shape [batch, {', '.join(map(str, value.shape))}], with one batch "
                f"for all inputs, got {list(x.shape)}"
            )
        if (x.dtype == torch.uint8) != (value.dtype == "uint8") or not (
            x.is_floating_point() or x.dtype == torch.uint8
        ):
            raise ValueError(f"input {shown(name)} must be {value.dtype}, got {x.dtype}")


def _run_node(node: Node, inputs: list[Tensor], read: list[Value], written: Value, dtype: torch.dtype) -> Tensor:
    """What ``node`` writes, from what it reads."""
    if node.op in _MOVES:
        return _MOVES[node.op](node, inputs, written)
    folded = fold_bytes(node, read, written)
    if folded is not None:
        return _folded(node, inputs, read, written, folded)
    quantized = "uint8" in {value.dtype for value in (*read, written)}
    if node.op in ("conv2d", "linear"):
        inner = torch.float32 if read[0].dtype == "uint8" else dtype
        y = _product(node, inputs, read, inner)
    else:
        inner = torch.float32 if quantized else dtype
        if "avg_pool2d" in node.op and read[0].dtype == "uint8":
            y = _mean_of_integers(node, inputs[0], read[0], written.shape)
        else:
            y = _ELEMENTS[node.op](node, [real(x, value, inner) for x, value in zip(inputs, read)])
    y = activate(node.activation, y)
    return y.to(dtype) if written.dtype == "float32" else store(y.float(), written)


class Bytes(NamedTuple):
    """What makes bytes of integers: y = q * scale + bias + r * ratio, to the nearest, from low to high.

    q is a sum of products of stored numbers with weights, or a stored number, or of mul the product of two less their
    zeros; r is what is added, as it is stored.
    """

    scale: Tensor
    """Float32, of each channel of a node that has channels, else of all."""
    bias: Tensor
    ratio: Tensor
    low: float
    high: float
    weight: Tensor | None
    """Of a layer, decoded: [N, columns] of float64."""


def of_floats(node: Node, inputs: list[Tensor], written: Value) -> Tensor:
    """What a node that is no product computes of floating point numbers before its activation, in their dtype."""
    return _MOVES[node.op](node, inputs, written) if node.op in _MOVES else _ELEMENTS[node.op](node, inputs)


def fold_bytes(node: Node, read: Sequence[Value], written: Value) -> Bytes | None:
    """The numbers of a node that reads and writes uint8 and does no more than clamp; None of any other.

    They are computed in float64 and in this order, as csrc/cpu/engine/bytes.cpp has it. None, too, where one of them
    is no finite float32.
    """
    layer = node.op in ("conv2d", "linear")
    if not layer and node.op not in ("affine", "activation", "add", "sub", "mul"):
        return None
    if read[0].dtype != "uint8" or written.dtype != "uint8" or node.activation.name not in ("none", "clamp"):
        return None
    if node.op in ("add", "sub", "mul") and read[1].dtype != "uint8":
        return None
    unit, unit_of_x = (float(np.float32(value.scale)) for value in (written, read[0]))
    ratio, zero = 0.0, 0
    zero_of_x: Tensor | int = read[0].zero
    if node.op == "mul":
        unit_of_x, zero_of_x = unit_of_x * float(np.float32(read[1].scale)), 0  # zeros are taken off before
    elif len(read) == 2:
        ratio = (float(np.float32(read[1].scale)) if read[1].dtype == "uint8" else 1.0) / unit
        ratio, zero = -ratio if node.op == "sub" else ratio, read[1].zero if read[1].dtype == "uint8" else 0
    none = torch.ones(1, dtype=torch.float64)
    of_node = node.tensors.get("scale", none).double()
    scale = (of_node if layer else of_node * unit_of_x) / unit
    shift = node.tensors.get("shift" if node.op == "affine" else "bias", 0 * none).double()
    weight = decoded_weight(node, columns_of(node, read[0].shape), torch.float64) if layer else None
    if weight is not None:
        zero_of_x = weight.sum(1).cpu() * read[0].zero
    bias = ((shift / unit + written.zero) - scale * zero_of_x) - ratio * zero
    of_channels = scale.float(), bias.float(), torch.tensor(ratio, dtype=torch.float64).float()
    if not all(bool(x.isfinite().all()) for x in of_channels):
        return None
    low, high = 0.0, 255.0
    if node.activation.name == "clamp":
        ends = np.array((node.activation.low, node.activation.high), np.float32).astype(np.float64) / unit
        low, high = (np.rint(ends) + written.zero).clip(0.0, 255.0).tolist()
    return Bytes(*of_channels, low, high, weight)


def _folded(node: Node, inputs: list[Tensor], read: list[Value], written: Value, by: Bytes) -> Tensor:
    x = inputs[0].double()
    if by.weight is not None:
        x = sums_of_products(node, x, by.weight, float(read[0].zero))
    if node.op == "mul":
        x = (x - read[0].zero) * (inputs[1].double() - read[1].zero)
    channels = (-1, *[1] * (x.dim() - 2))
    y = x.float() * by.scale.to(x.device).view(channels) + by.bias.to(x.device).view(channels)
    if len(inputs) == 2 and node.op != "mul":
        y = y + inputs[1].float() * by.ratio.to(x.device)
    return y.round().clamp(by.low, by.high).to(torch.uint8)


def real(x: Tensor, value: Value, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that ``x`` stands for: computed in float32 where it is uint8."""
    if value.dtype == "float32":
        return x.to(dtype)
    return ((x.to(torch.float32) - value.zero) * torch.tensor(value.scale, dtype=torch.float32)).to(dtype)


def store(y: Tensor, value: Value) -> Tensor:
    """float32 ``y`` as the nearest uint8 of ``value``."""
    inverse = torch.tensor(1.0 / value.scale, dtype=torch.float32)
    return ((y * inverse).round() + value.zero).clamp(0, 255).to(torch.uint8)


def activate(activation: Activation, y: Tensor) -> Tensor:
    """``activation`` of every element, in the dtype of y."""
    low, high = activation.low, activation.high
    match activation.name:
        case "clamp":
            return y.clamp(low, high)
        case "leaky_relu":
            return torch.where(y >= 0, y, y * low)
        case "hardsigmoid":
            return (y + 3).clamp(0, 6) * _sixth(y)
        case "hardswish":
            return y * (y + 3).clamp(0, 6) * _sixth(y)
        case "none":
            return y
    # In float32 torch's own gelu is wrong by a thousandth where it is small, on processors with AVX-512.
    return _SMOOTH[activation.name](y.double()).to(y.dtype)


def _sixth(like: Tensor) -> Tensor:
    """1 / 6 in the dtype of ``like``, as kernels multiply by it."""
    return torch.tensor(1 / 6, dtype=like.dtype, device=like.device)


_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
}


def decoded_weight(node: Node, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, columns] of a conv2d or linear node, without its scale; ``columns`` weights an output channel."""
    tensors = node.tensors
    if "weight" in tensors:
        return tensors["weight"].to(dtype)
    levels = tensors["integers" if "integers" in tensors else "levels"]
    codes = unpack_codes(tensors["codes"], levels.shape[1], columns)
    return levels.to(dtype).expand(len(codes), -1).gather(1, codes.long())


def _product(node: Node, inputs: list[Tensor], read: list[Value], dtype: torch.dtype) -> Tensor:
    """conv2d and linear before their activation, in ``dtype``; float32 where x is uint8."""
    x, value = inputs[0], read[0]
    exact = value.dtype == "uint8"
    # Sums of products of integers are exact in float64, in whatever order.
    summed = torch.float64 if exact else dtype
    weight = decoded_weight(node, columns_of(node, value.shape), summed)
    y = sums_of_products(node, (x.to(summed) - value.zero) if exact else x.to(summed), weight).to(dtype)
    channels = (-1, *[1] * (y.dim() - 2))
    if "scale" in node.tensors:
        y = y * node.tensors["scale"].to(y).view(channels)
    if "bias" in node.tensors:
        y = y + node.tensors["bias"].to(y).view(channels)
    return y + real(inputs[1], read[1], dtype) if len(inputs) == 2 else y


def sums_of_products(node: Node, x: Tensor, weight: Tensor, border: float = 0.0) -> Tensor:
    """Sums of products with a decoded weight, in their dtype; images of a convolution are surrounded by ``border``."""
    weight = weight.to(x.device)
    if node.op == "linear":
        return x.flatten(1) @ weight.T
    attributes = node.attributes
    top, bottom, left, right = attributes["padding"]
    groups = attributes["groups"]
    weight = weight.view(len(weight), x.shape[1] // groups, *attributes["kernel"])
    return F.conv2d(
        F.pad(x, (left, right, top, bottom), value=border),
        weight,
        stride=attributes["stride"],
        dilation=attributes["dilation"],
        groups=groups,
    )


def _mean_of_integers(node: Node, x: Tensor, value: Value, shape: Shape) -> Tensor:
    sums, divisors = window_sums(node, x.to(torch.float64) - value.zero, shape)
    return sums.float() * torch.tensor(value.scale, dtype=torch.float32) / divisors.float()


def _affine(node: Node, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    channels = (-1, *[1] * (x.dim() - 2))
    return x * node.tensors["scale"].to(x).view(channels) + node.tensors["shift"].to(x).view(channels)


def _avg_pool2d(node: Node, inputs: list[Tensor]) -> Tensor:
    kernel, stride, padding = (node.attributes[name] for name in ("kernel", "stride", "padding"))
    rounding, count_pad = bool(node.attributes["ceil_mode"]), bool(node.attributes["count_include_pad"])
    return F.avg_pool2d(inputs[0], kernel, stride, padding, rounding, count_pad, node.attributes["divisor"] or None)


_ELEMENTS = {
    "affine": _affine,
    "activation": lambda node, inputs: inputs[0],
    "add": lambda node, inputs: inputs[0] + inputs[1],
    "sub": lambda node, inputs: inputs[0] - inputs[1],
    "mul": lambda node, inputs: inputs[0] * inputs[1],
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": lambda node, inputs: F.adaptive_avg_pool2d(inputs[0], node.attributes["size"]),
    "softmax": lambda node, inputs: inputs[0].softmax(1),
    "log_softmax": lambda node, inputs: inputs[0].log_softmax(1),
}


def _max_pool2d(node: Node, inputs: list[Tensor], written: Value) -> Tensor:
    attributes = node.attributes
    kernel, stride, padding, dilation = (attributes[name] for name in ("kernel", "stride", "padding", "dilation"))
    # torch has no maxima of uint8; float32 holds these.
    x = inputs[0].float() if inputs[0].dtype == torch.uint8 else inputs[0]
    y = F.max_pool2d(x, kernel, stride, padding, dilation, bool(attributes["ceil_mode"]))
    return y.to(inputs[0].dtype)


def _pad(node: Node, inputs: list[Tensor], written: Value) -> Tensor:
    x, value = inputs[0], node.attributes["value"]
    if written.dtype == "uint8":
        value = int(store(torch.tensor(value, dtype=torch.float32), written))
    # torch pads the last dimension first.
    sides = [each for pair in zip(node.attributes["low"], node.attributes["high"]) for each in pair[::-1]]
    return F.pad(x, sides[::-1], value=value)


def _slice(node: Node, inputs: list[Tensor], written: Value) -> Tensor:
    spans = zip(*(node.attributes[name] for name in ("start", "stop", "step")))
    index = (slice(None), *(slice(*span) for span in spans))
    return inputs[0][index]


_MOVES: dict[str, Callable[[Node, list[Tensor], Value], Tensor]] = {
    "max_pool2d": _max_pool2d,
    "cat": lambda node, inputs, written: torch.cat(inputs, 1),
    "pad": _pad,
    "slice": _slice,
    "reshape": lambda node, inputs, written: inputs[0].reshape(len(inputs[0]), *written.shape),
}
