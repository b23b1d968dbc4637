"""Activations join the node before, which applies them for free."""

from __future__ import annotations

import dataclasses

from bqnn.engine.graph import Activation, Graph, Node
from bqnn.engine.operators import OPERATORS
from bqnn.engine.passes.rewrite import apply_everywhere, bypassed, replaced, sole_user

_MONOTONE = ("clamp", "sigmoid", "tanh", "hardsigmoid")


def fold_activations(graph: Graph) -> Graph:
    """An activation node becomes the activation of the node before it, if that has none and no other user.

    It passes reshapes on the way and, where it never decreases, max_pool2d: the maximum of what it gives is what it
    gives for the maximum. A clamp joins a clamp, and an activation that does nothing vanishes.
    """
    return apply_everywhere(graph, _fold)


def _fold(graph: Graph, node: Node) -> Graph | None:
    if node.op != "activation":
        return None
    if node.activation.name == "none":
        return bypassed(graph, node, node.inputs[0])
    user = node
    source = graph.producer(user.inputs[0])
    while source is not None and sole_user(graph, source.output) is user:
        if OPERATORS[source.op].activates:
            activation = _joined(source.activation, node.activation)
            if activation is None:
                return None
            graph = replaced(graph, source, dataclasses.replace(source, activation=activation))
            return bypassed(graph, node, node.inputs[0])
        if source.op != "reshape" and not (source.op == "max_pool2d" and _never_decreases(node.activation)):
            return None
        user = source
        source = graph.producer(user.inputs[0])
    return None


def _never_decreases(activation: Activation) -> bool:
    return activation.name in _MONOTONE or (activation.name == "leaky_relu" and activation.low >= 0)


def _joined(first: Activation, second: Activation) -> Activation | None:
    """One activation that does what both do in turn, or None."""
    if first.name == "none":
        return second
    if first.name != "clamp" or second.name != "clamp":
        return None
    low, high = (min(max(each, second.low), second.high) for each in (first.low, first.high))
    return Activation("clamp", low, high)
