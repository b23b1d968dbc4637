"""How programs of the engine are run and compared: by every plan, for any batch, with the float64 reference."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bqnn.engine.graph import NO_ACTIVATION, Graph, Node
from bqnn.engine.program import Program
from bqnn.engine.reference import run

PLANS: dict[str, dict[str, int]] = {
    "kept": {},
    "made": {"kept_panels": 0, "wide_layer": 1 << 40},
    "wide": {"kept_panels": 0, "wide_layer": 1, "team": 0},
    "together": {"team": 0},
}

SMOOTH = ("sigmoid", "silu", "gelu", "gelu_tanh", "tanh")
"""Activations whose float32 value may be a few units in the last place off."""


def of_batch(inputs: tuple[Tensor, ...], batch: int) -> list[Tensor]:
    return [x.repeat(-(-batch // len(x)), *[1] * (x.dim() - 1))[:batch] for x in inputs]


def check_near(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for y, reference in zip(found, expected):
        assert y.dtype == torch.float32 and y.shape == reference.shape
        distance = (y.double() - reference).norm()
        assert distance <= 1e-5 * reference.norm() + 1e-6 * reference.numel() ** 0.5


def alone(graph: Graph, node: Node) -> Graph:
    """A graph of one node of a quantized one: its inputs are made uint8 of float32, and its output float32 of uint8."""
    values, nodes, inputs = {}, [], []
    for name in dict.fromkeys(node.inputs):
        value = graph.values[name]
        values[name], wide = value, f"{name}.float32"
        if value.dtype == "float32":
            inputs.append(name)
            continue
        values[wide] = dataclasses.replace(value, name=wide, dtype="float32", scale=1.0, zero=0)
        nodes.append(Node("activation", (wide,), name))
        inputs.append(wide)
    output = values[node.output] = graph.values[node.output]
    nodes.append(node)
    last = node.output
    if output.dtype == "uint8":
        last = f"{last}.float32"
        values[last] = dataclasses.replace(output, name=last, dtype="float32", scale=1.0, zero=0)
        nodes.append(Node("activation", (node.output,), last, {}, {}, NO_ACTIVATION))
    return Graph(tuple(inputs), (last,), values, tuple(nodes))


def check_quantized_nodes(graph: Graph, inputs: tuple[Tensor, ...], **plan: int) -> int:
    """Raises AssertionError unless each node of a quantized graph has, alone, the bits of the integer model.

    Inputs of a node are what the model gives the ones before it. Where an activation is smooth, uint8 values may be one
    step off. Gives the number of nodes that were checked: those with a uint8 value, but for sums of float32 numbers.
    """
    found, checked = run(graph, inputs, torch.float32, keep=True), 0
    for index, node in enumerate(graph.nodes):
        dtypes = [graph.values[name].dtype for name in (*node.inputs, node.output)]
        sums = node.op in ("conv2d", "linear", "avg_pool2d", "adaptive_avg_pool2d")
        if "uint8" not in dtypes or node.op.endswith("softmax") or (sums and dtypes[0] == "float32"):
            continue
        single = alone(graph, node)
        values = [graph.values[name.removesuffix(".float32")] for name in single.inputs]
        given = [
            (found[value.name].float() - value.zero) * value.scale if value.dtype == "uint8" else found[value.name]
            for value in values
        ]
        y, expected = Program(single, **plan)(given)[0], run(single, given, torch.float32)[0]
        where = f"node {index}, {node.op} with {node.activation.name}"
        if node.activation.name in SMOOTH:
            step = graph.values[node.output].scale if dtypes[-1] == "uint8" else 1e-5 * float(expected.abs().max())
            assert (y - expected).abs().max() <= step * 1.001, where
        else:
            assert torch.equal(y, expected), where
        checked += 1
    return checked
