"""Additions join the layer before: its epilogue adds while the sums are in registers."""

from __future__ import annotations

import dataclasses

from bqnn.engine.graph import Graph, Node
from bqnn.engine.passes.rewrite import apply_everywhere, merged, sole_user


def fold_residuals(graph: Graph) -> Graph:
    """An addition of equal shapes becomes the residual of the conv2d or linear node that made one of its operands.

    That node must have no activation, no residual and no other user; of two such nodes it is the later one. It moves to
    where the addition was, with the addition's activation, so that both operands are there when it runs.
    """
    return apply_everywhere(graph, _fold)


def _fold(graph: Graph, node: Node) -> Graph | None:
    if node.op != "add" or graph.values[node.inputs[0]].shape != graph.values[node.inputs[1]].shape:
        return None
    for layer in reversed(graph.nodes):
        if layer.output not in node.inputs or layer.op not in ("conv2d", "linear"):
            continue
        if len(layer.inputs) > 1 or layer.activation.name != "none" or sole_user(graph, layer.output) is not node:
            continue
        residual = next(name for name in node.inputs if name != layer.output)
        joined = dataclasses.replace(
            layer, inputs=(layer.inputs[0], residual), output=node.output, activation=node.activation
        )
        return merged(graph, layer, node, joined)
    return None
