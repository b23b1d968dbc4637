"""Passes: each a function from graph to graph, in a file of its own, that leaves what the graph computes as it is."""

from __future__ import annotations

from bqnn.engine.graph import Graph
from bqnn.engine.passes.activations import fold_activations
from bqnn.engine.passes.affines import fold_affines
from bqnn.engine.passes.dead import drop_dead
from bqnn.engine.passes.padding import fold_padding
from bqnn.engine.passes.residuals import fold_residuals
from bqnn.engine.passes.shapes import simplify_shapes

# Affines come before activations, which would stand between them and a layer, and both before residuals, which take
# them along.
PASSES = (drop_dead, simplify_shapes, fold_padding, fold_affines, fold_activations, fold_residuals)


def optimize(graph: Graph) -> Graph:
    """``graph`` after all passes, until none of them finds anything; with the same inputs and outputs, by name.

    Equal to it but for the rounding of folded scales and biases to float32.

    Raises:
        ValueError: the graph is quantized: where its values are rounded is then part of what it computes.
    """
    if any(value.dtype != "float32" for value in graph.values.values()):
        raise ValueError("graph must be float32 to be optimized, got one with uint8 values: optimize before quantizing")
    while True:
        before = graph
        for each in PASSES:
            graph = each(graph)
        if graph is before:
            return graph
