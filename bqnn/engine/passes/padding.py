"""Zeros that a node pads become those that the convolution after it pads itself."""

from __future__ import annotations

import dataclasses

from bqnn.engine.graph import Graph, Node
from bqnn.engine.operators import MOST
from bqnn.engine.passes.rewrite import apply_everywhere, bypassed, replaced


def fold_padding(graph: Graph) -> Graph:
    """A conv2d after a pad of zeros, in height and width alone, pads them itself; a pad of nothing vanishes.

    Other users still read the padded value.
    """
    return apply_everywhere(graph, _fold)


def _fold(graph: Graph, node: Node) -> Graph | None:
    if node.op == "pad" and not any((*node.attributes["low"], *node.attributes["high"])):
        return bypassed(graph, node, node.inputs[0])
    pad = graph.producer(node.inputs[0])
    if node.op != "conv2d" or pad is None or pad.op != "pad" or pad.attributes["value"] != 0:
        return None
    low, high = pad.attributes["low"], pad.attributes["high"]
    more = (low[1], high[1], low[2], high[2])
    padding = tuple(map(sum, zip(node.attributes["padding"], more)))
    if low[0] or high[0] or max(padding) > MOST:
        return None
    attributes = {**node.attributes, "padding": padding}
    inputs = (pad.inputs[0], *node.inputs[1:])
    return replaced(graph, node, dataclasses.replace(node, inputs=inputs, attributes=attributes))
