"""Each pass finds its places, leaves the others, and changes nothing that a graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.engine.graph import NO_ACTIVATION, RELU, Activation, Graph, Node, Value
from bqnn.engine.operators import output_shape
from bqnn.engine.passes import PASSES, optimize
from bqnn.engine.passes.activations import fold_activations
from bqnn.engine.passes.affines import fold_affines
from bqnn.engine.passes.dead import drop_dead
from bqnn.engine.passes.padding import fold_padding
from bqnn.engine.passes.residuals import fold_residuals
from bqnn.engine.passes.shapes import simplify_shapes
from bqnn.engine.reference import run
from tests.support.draw_graphs import draw_graph

CONV = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
WINDOWS = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil_mode": 0}
POOL = {**WINDOWS, "dilation": (1, 1)}
AVERAGE = {**WINDOWS, "count_include_pad": 1, "divisor": 0}


class Net:
    """A graph node by node; its values are a, b, c, ... and the first is the input, [4, 6, 6] or as given."""

    def __init__(self, *shape: int) -> None:
        self.values = {"a": Value("a", shape or (4, 6, 6))}
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: str, activation: Activation = NO_ACTIVATION, **rest: Any) -> Net:
        """Reads the last value where no inputs are named."""
        inputs = inputs or (list(self.values)[-1],)
        tensors = {name: each for name, each in rest.items() if isinstance(each, Tensor)}
        attributes = {name: each for name, each in rest.items() if name not in tensors}
        output = chr(ord("a") + len(self.values))
        node = Node(op, inputs, output, attributes, tensors, activation)
        shape = output_shape(node, [self.values[name].shape for name in inputs])
        self.values[output] = Value(output, shape)
        self.nodes.append(node)
        return self

    def conv(self, *inputs: str, activation: Activation = NO_ACTIVATION, **tensors: Any) -> Net:
        return self.add("conv2d", *inputs, activation=activation, **CONV, weight=torch.randn(4, 36) / 6, **tensors)

    def linear(self, columns: int, *inputs: str, **rest: Any) -> Net:
        return self.add("linear", *inputs, weight=torch.randn(5, columns) / columns**0.5, **rest)

    def affine(self, *inputs: str, channels: int = 4, **rest: Any) -> Net:
        return self.add("affine", *inputs, scale=torch.randn(channels), shift=torch.randn(channels), **rest)

    def graph(self, *outputs: str) -> Graph:
        graph = Graph(("a",), outputs or (list(self.values)[-1],), self.values, tuple(self.nodes))
        graph.check()
        return graph


def changed(graph: Graph, found: Graph, tolerance: float = 1e-12) -> list[str]:
    """The operators of ``found``, after a comparison of all outputs with those of ``graph``."""
    found.check()
    assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
    inputs = [torch.randn(3, *graph.values[name].shape, dtype=torch.float64) for name in graph.inputs]
    for y, expected in zip(run(found, inputs), run(graph, inputs)):
        assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    return [node.op for node in found.nodes]


def unchanged(graph: Graph, rule: Any) -> None:
    assert rule(graph) is graph


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("seed", range(60))
def test_drawn_graphs_stay_what_they_are(seed: int) -> None:
    graph, inputs = draw_graph(seed)
    expected = run(graph, inputs)
    for rule in (*PASSES, optimize):
        found = rule(graph)
        found.check()
        assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
        # Folded scales and biases are rounded to float32.
        tolerance = 1e-6 if rule in (fold_affines, optimize) else 1e-12
        for y, each in zip(run(found, inputs), expected):
            torch.testing.assert_close(y, each, rtol=tolerance, atol=tolerance * max(1.0, float(each.abs().max())))


def test_optimizing_ends_and_again_finds_nothing() -> None:
    for seed in range(60, 90):
        found = optimize(draw_graph(seed)[0])
        assert optimize(found) is found


def test_a_residual_network_becomes_its_layers() -> None:
    net = Net().conv().affine().add("activation", activation=RELU)
    net.add("pad", low=(0, 1, 1), high=(0, 1, 1), value=0.0)
    net.add("conv2d", weight=torch.randn(4, 36), **{**CONV, "padding": (0,) * 4}).affine()
    net.add("activation", activation=RELU).conv().affine().add("add", "d", "j").add("activation", activation=RELU)
    net.add("max_pool2d", **POOL).add("avg_pool2d", **{**AVERAGE, "kernel": (3, 3)})
    net.add("reshape", shape=(4,)).linear(4).affine(channels=5).add("softmax")
    graph = net.graph()
    found = optimize(graph)
    operators = ["conv2d", "conv2d", "conv2d", "max_pool2d", "adaptive_avg_pool2d", "linear", "softmax"]
    assert changed(graph, found, 1e-5) == operators
    assert [node.activation for node in found.nodes[:3]] == [RELU] * 3
    assert len(found.nodes[2].inputs) == 2


def test_a_quantized_graph_is_not_optimized() -> None:
    with pytest.raises(ValueError, match="uint8"):
        optimize(
            next(graph for graph, _ in (draw_graph(seed, True) for seed in range(9)) if "uint8" in str(graph.values))
        )


# ---- affines ----


@pytest.mark.parametrize("tensors", ((), ("scale",), ("bias",), ("scale", "bias")), ids="-".join)
def test_an_affine_joins_a_layer(tensors: tuple[str, ...]) -> None:
    for net in (Net().conv(**{name: torch.randn(4) for name in tensors}).affine(activation=RELU),):
        found = fold_affines(net.graph())
        assert changed(net.graph(), found, 1e-6) == ["conv2d"]
        assert found.nodes[0].activation == RELU
        assert found.nodes[0].tensors["weight"] is net.nodes[0].tensors["weight"]
    net = Net(7).linear(7, **{name: torch.randn(5) for name in tensors}).affine(channels=5)
    assert changed(net.graph(), fold_affines(net.graph()), 1e-6) == ["linear"]


def test_affines_join_each_other() -> None:
    graph = Net().affine().affine().affine(activation=RELU).graph()
    assert changed(graph, fold_affines(graph), 1e-6) == ["affine"]


def test_an_affine_that_does_nothing_is_its_activation() -> None:
    graph = Net().add("affine", scale=torch.ones(4), shift=torch.zeros(4), activation=RELU).graph()
    assert changed(graph, fold_affines(graph)) == ["activation"]


def test_affines_that_stay() -> None:
    unchanged(Net().affine().conv().graph(), fold_affines)
    unchanged(Net().conv(activation=RELU).affine().graph(), fold_affines)
    unchanged(Net().conv("a", "a").affine().graph(), fold_affines)
    unchanged(Net().conv().affine().graph("b", "c"), fold_affines)
    unchanged(Net().conv().affine().add("add", "b", "c").graph(), fold_affines)
    huge = torch.full((4,), 1e38)
    unchanged(Net().conv(scale=huge).add("affine", scale=huge, shift=huge).graph(), fold_affines)


# ---- activations ----

EVERY = [RELU, Activation("leaky_relu", 0.1), Activation("sigmoid"), Activation("tanh"), Activation("hardsigmoid")]
OTHERS = [Activation("leaky_relu", -0.1), Activation("hardswish"), Activation("silu"), Activation("gelu")]


@pytest.mark.parametrize("activation", (*EVERY, *OTHERS), ids=lambda each: each.name)
def test_an_activation_joins_the_node_before(activation: Activation) -> None:
    for net in (Net().conv(), Net().conv("a", "a"), Net().affine(), Net().add("mul", "a", "a"), Net(4).linear(4)):
        graph = net.add("activation", activation=activation).graph()
        found = fold_activations(graph)
        assert changed(graph, found) == [net.nodes[0].op]
        assert found.nodes[0].activation == activation


@pytest.mark.parametrize("activation", EVERY, ids=lambda each: each.name)
def test_an_activation_that_never_decreases_passes_max_pool2d(activation: Activation) -> None:
    net = Net().conv().add("max_pool2d", **POOL).add("reshape", shape=(36,)).add("activation", activation=activation)
    found = fold_activations(net.graph())
    assert changed(net.graph(), found) == ["conv2d", "max_pool2d", "reshape"]
    assert found.nodes[0].activation == activation


@pytest.mark.parametrize("activation", OTHERS, ids=lambda each: each.name)
def test_another_activation_does_not(activation: Activation) -> None:
    unchanged(Net().conv().add("max_pool2d", **POOL).add("activation", activation=activation).graph(), fold_activations)


def test_clamps_join() -> None:
    for low, high in ((0.0, 6.0), (0.5, float("inf")), (-3.0, -1.0)):
        graph = Net().conv(activation=RELU).add("activation", activation=Activation("clamp", low, high)).graph()
        assert changed(graph, fold_activations(graph)) == ["conv2d"]


def test_activations_that_stay() -> None:
    relu = {"activation": RELU}
    unchanged(Net().add("activation", **relu).graph(), fold_activations)
    unchanged(Net().conv(activation=Activation("tanh")).add("activation", **relu).graph(), fold_activations)
    unchanged(Net().conv().add("activation", **relu).graph("b", "c"), fold_activations)
    unchanged(Net().conv().add("activation", **relu).add("mul", "b", "c").graph(), fold_activations)
    unchanged(Net().conv().add("avg_pool2d", **AVERAGE).add("activation", **relu).graph(), fold_activations)
    unchanged(Net().conv().add("max_pool2d", **POOL).add("activation", **relu).graph("c", "d"), fold_activations)


def test_an_activation_that_does_nothing_vanishes() -> None:
    graph = Net().conv().add("activation").add("add", "b", "c").graph("c", "d")
    assert changed(graph, fold_activations(graph)) == ["conv2d", "add"]
    unchanged(Net().add("activation").graph(), fold_activations)  # an output that is the input
    unchanged(Net().conv().add("activation").graph("b", "c"), fold_activations)  # two outputs


# ---- residuals ----


def test_an_addition_joins_the_later_layer() -> None:
    graph = Net().conv().conv("a").add("add", "b", "c", activation=RELU).graph()
    found = fold_residuals(graph)
    assert changed(graph, found) == ["conv2d", "conv2d"]
    assert found.nodes[1].inputs == ("a", "b") and found.nodes[1].activation == RELU
    assert found.nodes[1].tensors is graph.nodes[1].tensors


def test_the_layer_moves_to_the_addition() -> None:
    graph = Net().conv().affine("a").add("add", "c", "b").graph()
    found = fold_residuals(graph)
    assert changed(graph, found) == ["affine", "conv2d"]
    graph = Net(5).linear(5).affine("a", channels=5).add("add", "b", "c").graph()
    assert changed(graph, fold_residuals(graph)) == ["affine", "linear"]


def test_additions_that_stay() -> None:
    unchanged(Net().conv(activation=RELU).add("add", "b", "a").graph(), fold_residuals)
    unchanged(Net().conv("a", "a").add("add", "b", "a").graph(), fold_residuals)
    unchanged(Net().conv().add("add", "b", "b").graph(), fold_residuals)
    unchanged(Net().conv().add("add", "b", "a").graph("b", "c"), fold_residuals)
    unchanged(Net().conv().add("sub", "a", "b").graph(), fold_residuals)
    unchanged(Net().conv().add("adaptive_avg_pool2d", "a", size=(1, 1)).add("add", "b", "c").graph(), fold_residuals)


# ---- padding ----


def test_zeros_join_a_convolution() -> None:
    graph = Net().add("pad", low=(0, 1, 0), high=(0, 2, 3), value=0.0).conv().graph()
    found = drop_dead(fold_padding(graph))
    assert changed(graph, found) == ["conv2d"]
    assert found.nodes[0].attributes["padding"] == (2, 3, 1, 4)
    graph = Net().add("pad", low=(0, 1, 0), high=(0, 1, 0), value=0.0).conv().graph("b", "c")
    assert changed(graph, fold_padding(graph)) == ["pad", "conv2d"]
    graph = Net().conv().add("pad", low=(0,) * 3, high=(0,) * 3, value=1.0).graph()
    assert changed(graph, fold_padding(graph)) == ["conv2d"]


def test_padding_that_stays() -> None:
    unchanged(Net().add("pad", low=(0, 1, 0), high=(0, 0, 0), value=1.0).conv().graph(), fold_padding)
    unchanged(Net(3, 6, 6).add("pad", low=(1, 1, 0), high=(0, 0, 0), value=0.0).conv().graph(), fold_padding)
    unchanged(Net().add("pad", low=(0, 1, 0), high=(0, 0, 0), value=0.0).affine().graph(), fold_padding)


# ---- shapes ----


def test_reshapes_vanish() -> None:
    net = Net().add("reshape", shape=(8, 6, 3)).add("reshape", shape=(144,)).linear(144)
    graph = net.add("reshape", shape=(5,)).add("reshape", shape=(1, 5, 1)).graph()
    assert changed(graph, drop_dead(simplify_shapes(graph))) == ["linear", "reshape"]
    graph = Net().add("reshape", shape=(144,)).linear(144).graph("b", "c")
    found = simplify_shapes(graph)
    assert changed(graph, found) == ["reshape", "linear"]
    assert found.nodes[1].inputs == ("a",)


def test_slices_of_slices() -> None:
    net = Net().add("slice", start=(1, 0, 2), stop=(4, 6, 6), step=(1, 2, 1))
    graph = net.add("slice", start=(0, 1, 1), stop=(3, 3, 4), step=(2, 1, 2)).graph()
    found = drop_dead(simplify_shapes(graph))
    assert changed(graph, found) == ["slice"]
    assert found.nodes[0].attributes == {"start": (1, 2, 3), "stop": (4, 5, 6), "step": (2, 2, 2)}
    graph = Net().conv().add("slice", start=(0,) * 3, stop=(4, 6, 6), step=(1,) * 3).graph()
    assert changed(graph, simplify_shapes(graph)) == ["conv2d"]


def test_pools_that_do_nothing_vanish() -> None:
    one = {"kernel": (1, 1), "stride": (1, 1)}
    net = Net().conv().add("adaptive_avg_pool2d", size=(6, 6)).add("max_pool2d", **POOL | one)
    graph = net.add("avg_pool2d", **AVERAGE | one).graph()
    assert changed(graph, simplify_shapes(graph)) == ["conv2d"]
    unchanged(Net().add("avg_pool2d", **AVERAGE | one | {"divisor": 2}).graph(), simplify_shapes)
    unchanged(Net().add("max_pool2d", **POOL | {"kernel": (1, 1)}).graph(), simplify_shapes)


def test_an_average_over_everything_is_a_mean() -> None:
    for numbers in ({}, {"stride": (1, 1)}, {"divisor": 36}, {"count_include_pad": 0}):
        graph = Net().add("avg_pool2d", **AVERAGE | {"kernel": (6, 6)} | numbers).graph()
        found = simplify_shapes(graph)
        assert changed(graph, found) == ["adaptive_avg_pool2d"]
    for numbers in ({"divisor": 35}, {"kernel": (5, 6)}, {"padding": (1, 0), "kernel": (6, 6), "stride": (9, 9)}):
        unchanged(Net().add("avg_pool2d", **AVERAGE | {"kernel": (6, 6)} | numbers).graph(), simplify_shapes)


# ---- dead nodes ----


def test_dead_nodes_are_dropped() -> None:
    graph = Net().conv().affine("a").affine("c").graph("b")
    found = drop_dead(graph)
    assert changed(graph, found) == ["conv2d"]
    assert set(found.values) == {"a", "b"}
    unchanged(Net().conv().affine("a").graph("b", "c"), drop_dead)
