"""A float32 graph with its ranges becomes a graph of uint8 values and integer weights.

A value is uint8 where that leads to products of integers: it is what a conv2d or linear node reads, or nodes that lie
between make that of it. What leads to the outputs alone stays float32, and so do inputs and outputs themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from bqnn.core.text import shown
from bqnn.engine.check_graph import MOST_COLUMNS
from bqnn.engine.graph import Graph, Node, Value
from bqnn.engine.integers import CodedWeights, CodeSums, integer_rows
from bqnn.engine.operators import OPERATORS, columns_of

Range = tuple[float, float]

_GATES = ("sigmoid", "hardsigmoid")
# Of |x|: a scale is then an ordinary float32 number, that of a value that is always 0 too.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


def quantize(
    graph: Graph,
    ranges: Mapping[str, Range],
    means: Mapping[str, Tensor] | None = None,
    sums: Mapping[str, CodeSums] | None = None,
) -> Graph:
    """``graph`` in 8 bits, with the same inputs and outputs, in float32.

    Where a float32 value is wanted as uint8, an ``activation`` node makes a copy. Values that are moved into each other
    (by cat, max_pool2d, pad, slice, reshape) have one scale, that of their joint range; what sigmoid and hardsigmoid
    give has the range from 0 to 1. Layers whose sums could overflow 32 bits stay in float32.

    Args:
        graph: sound, of float32 values, after the passes.
        ranges: the least and the largest number of each value (:func:`bqnn.engine.calibrate.calibrate`).
        means: of each value in its shape, from the same place: biases make up for what rounded weights change in the
            mean of a layer's outputs. None leaves biases as they are.
        sums: of each layer with codes, from there too: what its integers are chosen by, and its bias makes up for.

    Raises:
        ValueError: the graph has uint8 values already, or a value has no range that is finite and in order.
    """
    if any(value.dtype != "float32" for value in graph.values.values()):
        raise ValueError("graph must be float32 to be quantized, got one with uint8 values")
    known = {name: _range_of(name, ranges) for name in graph.values}
    known |= {node.output: (0.0, 1.0) for node in graph.nodes if node.activation.name in _GATES}
    layers = {node.output for node in graph.nodes if _fits_integers(graph, node)}
    wanted = _wanted(graph.nodes, layers)
    # Inputs are copied before anything moves them, but nodes that compute with them read them as they are.
    movers = {node.output for node in graph.nodes if OPERATORS[node.op].moves} & wanted - set(graph.outputs)
    graph, copies = _with_copies(graph, graph.inputs, layers | movers)
    known |= {copy: known[name] for name, copy in copies.items()}
    originals = {copy: name for name, copy in copies.items()}
    stored = _stored(graph, wanted | set(copies.values()), known)
    floats = [name for name in graph.values if name not in stored]
    graph, copies = _with_copies(graph, floats, layers)
    stored |= {copy: known[name] for name, copy in copies.items()}
    originals |= {copy: originals.get(name, name) for name, copy in copies.items()}
    values = {name: _quantized(value, stored.get(name)) for name, value in graph.values.items()}
    nodes = []
    for node in graph.nodes:
        if node.output in layers:
            x = values[node.inputs[0]]
            mean = None if means is None else means[originals.get(x.name, x.name)]
            node = _with_integers(node, x, mean, None if sums is None else sums.get(node.output))
        nodes.append(node)
    return graph.replaced(values=values, nodes=tuple(nodes))


def _range_of(name: str, ranges: Mapping[str, Range]) -> Range:
    low, high = ranges.get(name, (math.nan, math.nan))
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"ranges must have a finite range of value {shown(name)}, got {ranges.get(name)}")
    return low, high


def _fits_integers(graph: Graph, node: Node) -> bool:
    """Whether the node is a product of so few columns that 32 bits hold its sums."""
    if node.op not in ("conv2d", "linear"):
        return False
    return columns_of(node, graph.values[node.inputs[0]].shape) <= MOST_COLUMNS


def _wanted(nodes: tuple[Node, ...], layers: set[str]) -> set[str]:
    """The values that serve as uint8: products of integers, those that write ``layers``, read them or what becomes of
    them."""
    wanted: set[str] = set()
    for node in reversed(nodes):
        if node.output in layers:
            wanted.add(node.inputs[0])
        if node.output in wanted and not node.op.endswith("softmax"):
            # A product's x is decided above: where it is no product of integers, it reads float32.
            wanted.update(node.inputs[1:] if node.op in ("conv2d", "linear") else node.inputs)
    return wanted


def _with_copies(graph: Graph, names: Iterable[str], readers: set[str]) -> tuple[Graph, dict[str, str]]:
    """``graph`` with copies of those of ``names`` that certain nodes read, and the copies' names by the values'.

    The nodes are those that write ``readers``: they read a copy as their first input, or as any that they move.
    """
    names, copies = set(names), {}
    values, nodes = dict(graph.values), []

    def copied(name: str) -> str:
        if name not in copies:
            copy = f"{name}.uint8"
            while copy in values:
                copy += "_"
            copies[name], values[copy] = copy, dataclasses.replace(values[name], name=copy)
            nodes.append(Node("activation", (name,), copy))
        return copies[name]

    for node in graph.nodes:
        if node.output in readers:
            most = len(node.inputs) if OPERATORS[node.op].moves else 1
            inputs = tuple(copied(name) if i < most and name in names else name for i, name in enumerate(node.inputs))
            node = node if inputs == node.inputs else dataclasses.replace(node, inputs=inputs)
        nodes.append(node)
    return graph.replaced(values=values, nodes=tuple(nodes)), copies


def _stored(graph: Graph, wanted: set[str], known: Mapping[str, Range]) -> dict[str, Range]:
    """The values that are uint8 and the ranges of their numbers; those that are moved into each other have one."""
    groups = {name: [name] for name in graph.values}
    fixed = {*graph.inputs, *graph.outputs}
    for node in graph.nodes:
        if node.op.endswith("softmax"):
            fixed.add(node.output)
        if not OPERATORS[node.op].moves:
            continue
        if node.op == "pad" and not _is_within(node.attributes["value"], known[node.inputs[0]]):
            fixed.add(node.output)
        for name in node.inputs:
            if groups[name] is not groups[node.output]:
                groups[node.output] += groups[name]
                groups |= {each: groups[node.output] for each in groups[name]}
    stored = {}
    for name, group in groups.items():
        if not wanted.isdisjoint(group) and fixed.isdisjoint(group):
            stored[name] = min(known[each][0] for each in group), max(known[each][1] for each in group)
    return stored


def _is_within(number: float, known: Range) -> bool:
    return number == 0 or known[0] <= number <= known[1]


def _quantized(value: Value, known: Range | None) -> Value:
    if known is None:
        return value
    low, high = (min(max(end, -_LARGEST), _LARGEST) for end in (min(known[0], 0.0), max(known[1], 0.0)))
    scale = float(np.float32(max(high - low, _SMALLEST) / 255))
    return dataclasses.replace(value, dtype="uint8", scale=scale, zero=round(-low / scale))


def _with_integers(node: Node, x: Value, mean: Tensor | None, sums: CodeSums | None) -> Node:
    """A conv2d or linear node with the tensors that it needs where its input ``x``, of such a mean, is uint8."""
    tensors = dict(node.tensors)
    if "codes" in tensors:
        weights = CodedWeights(tensors["codes"], tensors.pop("levels"), columns_of(node, x.shape), sums)
        tensors["integers"], steps, shift = weights.integers()
    else:
        tensors["weight"], steps, shift = integer_rows(
            tensors["weight"], None if mean is None else _mean_columns(node, mean)
        )
    scale = tensors["scale"].double() if "scale" in tensors else 1.0
    tensors["scale"] = (steps * x.scale * scale).float()
    if shift.any():
        tensors["bias"] = (tensors.get("bias", torch.zeros(())).double() + shift * scale).float()
    return dataclasses.replace(node, tensors=tensors)


def _mean_columns(node: Node, mean: Tensor) -> Tensor:
    """The mean of what a layer's columns are multiplied with, [groups, columns]; a convolution's border counts as any
    other place."""
    if node.op == "linear":
        return mean.reshape(1, -1)
    groups, taps = node.attributes["groups"], math.prod(node.attributes["kernel"])
    return mean.mean((1, 2)).view(groups, -1).repeat_interleave(taps, 1)
