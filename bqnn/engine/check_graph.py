"""Whether a graph is sound, whoever made it: what a program is planned from may come from a file of unknown origin.

Every size is compared before anything is done with it; what is allocated is no larger than the tensors that are there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bqnn.core.check import MAX_LEVELS, MIN_LEVELS
from bqnn.core.codes import find_bad_byte, packed_width
from bqnn.core.text import shown
from bqnn.engine.node import ACTIVATIONS, Activation, Node, Shape, Value
from bqnn.engine.operators import MAX_WEIGHT, MOST, OPERATORS, channels_of, columns_of, output_shape

DTYPES = ("float32", "uint8")
LONGEST_NAME = 100  # characters of a name in a message
_PRODUCTS = ("conv2d", "linear")
# A scale and its reciprocal are then ordinary float32 numbers.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-120, 2.0**120
MOST_COLUMNS = MOST // (255 * MAX_WEIGHT)
"""Products of a uint8 and an integer weight that 32 bits can sum whatever the numbers."""


def check_graph(inputs: Any, outputs: Any, values: Any, nodes: Any) -> None:
    """:meth:`bqnn.engine.graph.Graph.check`, of a graph's four parts."""
    if not isinstance(values, Mapping) or not isinstance(nodes, tuple):
        raise ValueError("a graph must have a mapping of values and a tuple of nodes")
    for kind, names in (("inputs", inputs), ("outputs", outputs)):
        if not _are_names(names) or not names:
            raise ValueError(f"the graph's {kind} must be a tuple of names, one or more")
    for name, value in values.items():
        _named(f"value {_name(name)}", _check_value, name, value)
    defined: set[str] = set()
    for name in inputs:
        _define(name, values, defined, "the graph's inputs")
    for index, node in enumerate(nodes):
        if not isinstance(node, Node) or not isinstance(node.op, str) or not isinstance(node.output, str):
            raise ValueError(f"node {index}: must be a Node with the names of its operator and output")
        label = f"node {index} ({_name(node.op)} -> {_name(node.output)})"
        if not _are_names(node.inputs):
            raise ValueError(f"{label}: inputs must be a tuple of names")
        for name in node.inputs:
            if name not in defined:
                raise ValueError(f"{label}: its input {_name(name)} is not there yet")
        _define(node.output, values, defined, label)
        _named(label, _check_node, node, [values[name] for name in node.inputs], values[node.output])
    for name in outputs:
        if name not in defined:
            raise ValueError(f"the graph's output {_name(name)} is written by no node")
    for name in values:
        if name not in defined:
            raise ValueError(f"value {_name(name)}: is written by no node")


def _named(label: str, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label}: {error}") from None


def _name(name: Any) -> str:
    return shown(name, LONGEST_NAME) if isinstance(name, str) else f"of type {type(name).__name__}"


def _are_names(names: Any) -> bool:
    return isinstance(names, tuple) and all(isinstance(each, str) for each in names)


def _define(name: str, values: Mapping[str, Value], defined: set[str], label: str) -> None:
    if name not in values:
        raise ValueError(f"{label}: {_name(name)} is no value of the graph")
    if name in defined:
        raise ValueError(f"{label}: {_name(name)} is there already")
    defined.add(name)


def _check_value(name: Any, value: Any) -> None:
    if not isinstance(value, Value) or not isinstance(name, str) or value.name != name:
        raise ValueError("must be a Value under its own name")
    shape = value.shape
    if not isinstance(shape, tuple) or len(shape) not in (1, 3):
        raise ValueError("must have the shape (channels, height, width) or (features,)")
    if any(type(size) is not int or not 1 <= size <= MOST for size in shape) or math.prod(shape) > MOST:
        raise ValueError(f"must have sizes from 1 on, and at most {MOST} elements")
    if value.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}")
    if type(value.scale) is not float or not _SMALLEST_SCALE <= value.scale <= _LARGEST_SCALE:
        raise ValueError(f"scale must be a number from {_SMALLEST_SCALE} to {_LARGEST_SCALE}")
    if struct.unpack("f", struct.pack("f", value.scale))[0] != value.scale:
        raise ValueError(f"scale must be a float32 number, got {value.scale}")
    if type(value.zero) is not int or not 0 <= value.zero <= 255:
        raise ValueError("zero must be an integer from 0 to 255")


def _check_node(node: Node, inputs: Sequence[Value], output: Value) -> None:
    if not isinstance(node.attributes, dict) or not all(isinstance(each, str) for each in node.attributes):
        raise ValueError("attributes must be a dictionary of names")
    if not isinstance(node.tensors, dict) or not all(isinstance(each, str) for each in node.tensors):
        raise ValueError("tensors must be a dictionary of names")
    _check_activation(node.activation)
    if node.op in _PRODUCTS:
        _check_weight_kind(node, inputs)
    shape = output_shape(node, [each.shape for each in inputs])
    if shape != output.shape:
        raise ValueError(f"its output has the shape {list(output.shape)}, and it gives {list(shape)}")
    if node.op in _PRODUCTS:
        _check_product(node, inputs[0])
    else:
        names = ("scale", "shift") if node.op == "affine" else ()
        if set(node.tensors) != set(names):
            raise ValueError(f"must have the tensors {', '.join(names) or 'none'} and no others")
        for name in names:
            _check_tensor(name, node.tensors[name], torch.float32, (shape[0],))
    if OPERATORS[node.op].moves:
        _check_moves(node, inputs, output)
    _check_sums(node, inputs[0])
    if node.op.endswith("softmax") and output.dtype != "float32":
        raise ValueError("its output must be float32")


def _check_activation(activation: Any) -> None:
    if not isinstance(activation, Activation) or activation.name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}")
    low, high = activation.low, activation.high
    if type(low) is not float or type(high) is not float or math.isnan(low) or math.isnan(high):
        raise ValueError("an activation's low and high must be numbers")
    if activation.name == "clamp" and low > high:
        raise ValueError(f"a clamp's low must be at most its high, got {low} and {high}")
    if activation.name == "leaky_relu" and math.isinf(low):
        raise ValueError("a leaky_relu's low must be finite")


def _check_weight_kind(node: Node, inputs: Sequence[Value]) -> None:
    """Enough of a weight for ``channels_of``: a matrix of codes, or a dense one."""
    if not inputs:
        raise ValueError("must have an input")
    quantized = inputs[0].dtype == "uint8"
    coded = "codes" in node.tensors
    names = {"codes", "integers" if quantized else "levels"} if coded else {"weight"}
    names |= {"scale"} if quantized else set()
    missing, more = names - set(node.tensors), set(node.tensors) - names - {"scale", "bias"}
    if missing or more:
        raise ValueError(
            f"an input of {inputs[0].dtype} needs the tensors {', '.join(sorted(names))}, got "
            f"{', '.join(shown(name, LONGEST_NAME) for name in sorted(node.tensors)[:8]) or 'none'}"
        )
    for name in ("codes", "integers", "levels", "weight"):
        if name in node.tensors and (not isinstance(node.tensors[name], Tensor) or node.tensors[name].dim() != 2):
            raise ValueError(f"{name} must be a matrix")
    if not channels_of(node):
        raise ValueError("its weight must have a row or more")


def _check_product(node: Node, x: Value) -> None:
    channels, columns, tensors = channels_of(node), columns_of(node, x.shape), node.tensors
    quantized = x.dtype == "uint8"
    if "codes" in tensors:
        name, dtype = ("integers", torch.int8) if quantized else ("levels", torch.float32)
        books, levels = tensors[name].shape
        if books not in (1, channels) or not MIN_LEVELS <= levels <= MAX_LEVELS:
            raise ValueError(
                f"{name} must have the shape [1 or {channels}, {MIN_LEVELS} to {MAX_LEVELS}], got {[books, levels]}"
            )
        _check_tensor(name, tensors[name], dtype, (books, levels))
        _check_tensor("codes", tensors["codes"], torch.uint8, (channels, packed_width(columns, levels)))
        bad = find_bad_byte(tensors["codes"], levels, columns)
        if bad:
            raise ValueError(f"codes {bad}")
    else:
        _check_tensor("weight", tensors["weight"], torch.int8 if quantized else torch.float32, (channels, columns))
    for name in ("scale", "bias"):
        if name in tensors:
            _check_tensor(name, tensors[name], torch.float32, (channels,))


def _check_tensor(name: str, tensor: Any, dtype: torch.dtype, shape: Shape) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be a tensor of the CPU")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if dtype == torch.float32 and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    if dtype == torch.int8 and bool(((tensor > MAX_WEIGHT) | (tensor < -MAX_WEIGHT)).any()):
        raise ValueError(f"{name} must be from {-MAX_WEIGHT} to {MAX_WEIGHT}")


def _check_moves(node: Node, inputs: Sequence[Value], output: Value) -> None:
    if any(quantization(each) != quantization(output) for each in inputs):
        raise ValueError("inputs and output must have one dtype, scale and zero")
    if node.op == "pad" and output.dtype == "uint8" and not math.isfinite(node.attributes["value"]):
        raise ValueError("value must be finite where it is stored as uint8")


def _check_sums(node: Node, x: Value) -> None:
    """That the sums of integers fit 32 bits."""
    if x.dtype != "uint8":
        return
    if node.op in _PRODUCTS and columns_of(node, x.shape) > MOST_COLUMNS:
        raise ValueError(f"sums of more than {MOST_COLUMNS} products could overflow, got {columns_of(node, x.shape)}")
    if "avg_pool2d" in node.op and 255 * math.prod(largest_window(node, x.shape)) > MOST:
        raise ValueError("sums of so large windows could overflow")


def largest_window(node: Node, x: Shape) -> tuple[int, int]:
    """Height and width of the largest window of an avg_pool2d or adaptive_avg_pool2d of ``x`` [C, H, W]."""
    # An adaptive window spans from floor(i * size / out) to ceil((i + 1) * size / out).
    adaptive = node.op == "adaptive_avg_pool2d"
    spans = [-(-x[1 + axis] // node.attributes["size"][axis]) + 1 for axis in (0, 1)] if adaptive else None
    height, width = spans or node.attributes["kernel"]
    return min(height, x[1]), min(width, x[2])


def quantization(value: Value) -> tuple[str, float, int]:
    """What a number of the value stands for: dtype, scale and zero."""
    return value.dtype, value.scale, value.zero
