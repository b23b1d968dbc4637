"""What the passes share: finding places in a graph, and the few edits that they make there.

Nodes are told apart by identity. An edit keeps the names of the graph's inputs and outputs, and the order valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bqnn.engine.graph import Graph, Node, Value

Rule = Callable[[Graph, Node], "Graph | None"]
"""What becomes of a graph at one of its nodes, or None where there is nothing to do."""


def apply_everywhere(graph: Graph, rule: Rule) -> Graph:
    """``graph`` after ``rule`` at every node, again until it finds nothing; the same object if it never did."""
    while True:
        before = graph
        for node in before.nodes:
            if any(each is node for each in graph.nodes):  # an edit before may have taken it away
                graph = rule(graph, node) or graph
        if graph is before:
            return graph


def sole_user(graph: Graph, value: str) -> Node | None:
    """The node that reads ``value``, if it is the only one, does it once, and the graph does not give the value out."""
    users = graph.users(value)
    if len(users) != 1 or users[0].inputs.count(value) != 1 or value in graph.outputs:
        return None
    return users[0]


def replaced(graph: Graph, old: Node, new: Node) -> Graph:
    """``new`` in the place of ``old``; it writes the same value."""
    return graph.replaced(nodes=tuple(new if node is old else node for node in graph.nodes))


def merged(graph: Graph, first: Node, second: Node, node: Node) -> Graph:
    """``node`` in the place of ``second``, whose value it writes; nobody but ``second`` reads what ``first`` wrote."""
    nodes = tuple(node if each is second else each for each in graph.nodes if each is not first)
    values = {name: value for name, value in graph.values.items() if name != first.output}
    return graph.replaced(nodes=nodes, values=values)


def bypassed(graph: Graph, node: Node, source: str) -> Graph | None:
    """``graph`` without ``node``, whose users read ``source`` instead, a value of the same numbers.

    None where both are outputs, or the graph would give out an input: the node then stays.
    """
    old, new = node.output, source
    if node.output in graph.outputs:
        if source in graph.outputs or source in graph.inputs:
            return None
        old, new = source, node.output  # the output keeps its name
    values: dict[str, Value] = {name: value for name, value in graph.values.items() if name != old}
    kept = []
    for each in graph.nodes:
        if each is node:
            continue
        output = new if each.output == old else each.output
        inputs = tuple(new if name == old else name for name in each.inputs)
        same = output == each.output and inputs == each.inputs
        kept.append(each if same else dataclasses.replace(each, inputs=inputs, output=output))
    return graph.replaced(nodes=tuple(kept), values=values)
