"""The engine's graph: a network as data, without its Python.

A graph is what the passes rewrite, what a compiled file holds and what a program is planned from: values, nodes in the
order in which they run, and the tensors of their weights. Nothing in it is code, and :meth:`Graph.check` decides
whether one is sound, whoever made it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bqnn.engine.check_graph import check_graph
from bqnn.engine.node import ACTIVATIONS, NO_ACTIVATION, RELU, Activation, Node, Shape, Value

__all__ = ["ACTIVATIONS", "NO_ACTIVATION", "RELU", "Activation", "Graph", "Node", "Shape", "Value"]


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run; each value is written by one node, or is an input."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    nodes: tuple[Node, ...]

    def producer(self, value: str) -> Node | None:
        return next((node for node in self.nodes if node.output == value), None)

    def users(self, value: str) -> list[Node]:
        return [node for node in self.nodes if value in node.inputs]

    def replaced(self, **changes: Any) -> Graph:
        return replace(self, **changes)

    def check(self) -> None:
        """Decides whether the graph is sound: names, order, shapes, attributes, tensors, dtypes and the bounds of sums.

        Whatever its parts hold, it allocates no more than the tensors that are there take.

        Raises:
            ValueError: it is not; names the node or value and what is wrong with it, in one line.
        """
        check_graph(self.inputs, self.outputs, self.values, self.nodes)
