"""What no output needs is not computed."""

from __future__ import annotations

from bqnn.engine.graph import Graph


def drop_dead(graph: Graph) -> Graph:
    """``graph`` without the nodes that no output depends on, and without their values; inputs stay, read or not."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    if len(kept) == len(graph.nodes):
        return graph
    needed.update(graph.inputs)
    values = {name: value for name, value in graph.values.items() if name in needed}
    return graph.replaced(nodes=tuple(reversed(kept)), values=values)
