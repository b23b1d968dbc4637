"""Nodes that only move numbers, or average what is one number, vanish or become one."""

from __future__ import annotations

import dataclasses
import math

from bqnn.engine.graph import Graph, Node
from bqnn.engine.passes.rewrite import apply_everywhere, bypassed, replaced


def simplify_shapes(graph: Graph) -> Graph:
    """Fewer reshapes, slices and pools.

    A reshape or slice of another one reads what that one read; linear, which flattens, reads what a reshape before it
    read. Whatever changes nothing vanishes: a reshape or an adaptive pool to the same size, a slice of everything, a
    pool of windows of one element. An avg_pool2d of one window over everything is an adaptive_avg_pool2d to (1, 1).
    """
    return apply_everywhere(graph, _simplify)


def _simplify(graph: Graph, node: Node) -> Graph | None:
    source = graph.producer(node.inputs[0])
    if node.op in ("linear", "reshape") and source is not None and source.op == "reshape":
        return replaced(graph, node, dataclasses.replace(node, inputs=(source.inputs[0], *node.inputs[1:])))
    if node.op == "slice" and source is not None and source.op == "slice":
        return replaced(graph, node, _slice_of_both(source, node))
    if _changes_nothing(graph, node):
        return bypassed(graph, node, node.inputs[0])
    if node.op == "avg_pool2d" and _is_mean(graph, node):
        return replaced(graph, node, dataclasses.replace(node, op="adaptive_avg_pool2d", attributes={"size": (1, 1)}))
    return None


def _slice_of_both(first: Node, second: Node) -> Node:
    """What ``second`` takes of what ``first`` takes, of the input of ``first``."""
    start, stop, step = [], [], []
    for axis, origin in enumerate(first.attributes["start"]):
        stride, begin, end, each = (
            first.attributes["step"][axis],
            *(second.attributes[name][axis] for name in ("start", "stop", "step")),
        )
        start.append(origin + begin * stride)
        stop.append(origin + (end - 1) * stride + 1)
        step.append(each * stride)
    attributes = {"start": tuple(start), "stop": tuple(stop), "step": tuple(step)}
    return dataclasses.replace(second, inputs=first.inputs, attributes=attributes)


def _changes_nothing(graph: Graph, node: Node) -> bool:
    shape = graph.values[node.inputs[0]].shape
    if node.op in ("reshape", "slice", "adaptive_avg_pool2d"):
        # A slice keeps every element, or its output has fewer.
        return graph.values[node.output].shape == shape
    if node.op in ("max_pool2d", "avg_pool2d"):
        same = all(node.attributes[name] == (1, 1) for name in ("kernel", "stride"))
        return same and node.attributes.get("divisor", 0) in (0, 1)
    return False


def _is_mean(graph: Graph, node: Node) -> bool:
    """Whether an avg_pool2d has one window, which is the whole image and nothing else."""
    size = graph.values[node.inputs[0]].shape[1:]
    whole = node.attributes["kernel"] == size and node.attributes["padding"] == (0, 0)
    return whole and node.attributes["divisor"] in (0, math.prod(size))
