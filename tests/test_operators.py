"""Graph.check: what is sound passes, and whatever else a graph holds is refused in one line."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch

from bqnn.core.codes import pack_codes
from bqnn.engine.graph import RELU, Activation, Graph, Node, Value
from bqnn.engine.operators import output_shape
from bqnn.engine.reference import run
from tests.support.draw_graphs import draw_graph

POOL = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": 0}
AVERAGE = {name: value for name, value in POOL.items() if name != "dilation"} | {"count_include_pad": 1, "divisor": 0}
CONV = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}


def coded(channels: int, columns: int, levels: int = 3) -> dict[str, Any]:
    codes = torch.randint(0, levels, (channels, columns), dtype=torch.uint8)
    return {"codes": pack_codes(codes, levels), "levels": torch.randn(1, levels)}


def sound() -> Graph:
    """conv2d with a residual - max_pool2d - linear."""
    shapes = {"x": (4, 6, 6), "c": (4, 6, 6), "p": (4, 3, 3), "y": (5,)}
    nodes = (
        Node("conv2d", ("x", "x"), "c", dict(CONV), {**coded(4, 36), "bias": torch.zeros(4)}, RELU),
        Node("max_pool2d", ("c",), "p", dict(POOL)),
        Node("linear", ("p",), "y", {}, {"weight": torch.randn(5, 36), "scale": torch.ones(5)}),
    )
    return Graph(("x",), ("y",), {name: Value(name, shape) for name, shape in shapes.items()}, nodes)


def quantized() -> Graph:
    """The same with uint8 values, up to the output."""
    graph = sound()
    values = {
        name: dataclasses.replace(value, dtype="uint8", scale=0.5)
        for name, value in graph.values.items()
        if name != "y"
    }
    tensors = [
        {**coded(4, 36), "integers": torch.tensor([[-64, 0, 64]], dtype=torch.int8), "scale": torch.ones(4)},
        {},
        {"weight": torch.zeros(5, 36, dtype=torch.int8), "scale": torch.ones(5)},
    ]
    del tensors[0]["levels"]
    nodes = tuple(dataclasses.replace(node, tensors=each) for node, each in zip(graph.nodes, tensors))
    return Graph(graph.inputs, graph.outputs, values | {"y": graph.values["y"]}, nodes)


def with_node(graph: Graph, index: int, **changes: Any) -> Graph:
    nodes = list(graph.nodes)
    nodes[index] = dataclasses.replace(nodes[index], **changes)
    return graph.replaced(nodes=tuple(nodes))


def with_attribute(graph: Graph, index: int, **changes: Any) -> Graph:
    return with_node(graph, index, attributes=graph.nodes[index].attributes | changes)


def with_tensors(graph: Graph, index: int, **changes: Any) -> Graph:
    tensors = {name: each for name, each in (graph.nodes[index].tensors | changes).items() if each is not None}
    return with_node(graph, index, tensors=tensors)


def with_value(graph: Graph, name: str, **changes: Any) -> Graph:
    return graph.replaced(values=graph.values | {name: dataclasses.replace(graph.values[name], **changes)})


def test_a_sound_graph_passes() -> None:
    sound().check()
    quantized().check()


HUGE = 2**31
WRONG = [
    pytest.param(lambda g: g.replaced(inputs=("x", "x")), "there already", id="input-twice"),
    pytest.param(lambda g: g.replaced(inputs=["x"]), "tuple of names", id="inputs-list"),
    pytest.param(lambda g: g.replaced(outputs=()), "one or more", id="no-outputs"),
    pytest.param(lambda g: g.replaced(outputs=("z",)), "written by no node", id="unknown-output"),
    pytest.param(lambda g: g.replaced(outputs=(["y"],)), "tuple of names", id="output-unhashable"),
    pytest.param(lambda g: g.replaced(nodes=g.nodes[::-1]), "not there yet", id="order"),
    pytest.param(lambda g: g.replaced(nodes=(*g.nodes, g.nodes[0])), "there already", id="written-twice"),
    pytest.param(lambda g: g.replaced(nodes=(*g.nodes, None)), "node 3", id="no-node"),
    pytest.param(lambda g: g.replaced(values=g.values | {"z": Value("z", (1,))}), "no node", id="value-unwritten"),
    pytest.param(lambda g: g.replaced(values=g.values | {"x": Value("z", (1,))}), "own name", id="value-name"),
    pytest.param(lambda g: g.replaced(values={}), "no value of the graph", id="no-values"),
    pytest.param(lambda g: with_value(g, "c", shape=(4, 6, 5)), "it gives", id="shape"),
    pytest.param(lambda g: with_value(g, "x", shape=(4, 6)), "value x", id="rank"),
    pytest.param(lambda g: with_value(g, "x", shape=(4, HUGE, 6)), "at most", id="shape-huge"),
    pytest.param(lambda g: with_value(g, "x", shape=(4, 2**16, 2**16)), "at most", id="elements-huge"),
    pytest.param(lambda g: with_value(g, "x", shape=(4, True, 6)), "sizes", id="shape-bool"),
    pytest.param(lambda g: with_value(g, "x", shape=(4, "6", 6)), "sizes", id="shape-text"),
    pytest.param(lambda g: with_value(g, "x", shape=(4, 0, 6)), "sizes", id="shape-zero"),
    pytest.param(lambda g: with_value(g, "x", dtype="int8"), "dtype", id="dtype"),
    pytest.param(lambda g: with_value(g, "x", scale=float("nan")), "scale", id="scale-nan"),
    pytest.param(lambda g: with_value(g, "x", scale=0.0), "scale", id="scale-0"),
    pytest.param(lambda g: with_value(g, "x", scale=1e300), "scale", id="scale-huge"),
    pytest.param(lambda g: with_value(g, "x", scale=0.1), "float32 number", id="scale-float64"),
    pytest.param(lambda g: with_value(g, "x", zero=256), "zero", id="zero"),
    pytest.param(lambda g: with_node(g, 0, op="system"), "no such operator", id="op"),
    pytest.param(lambda g: with_node(g, 0, op=None), "node 0", id="op-none"),
    pytest.param(lambda g: with_node(g, 1, inputs=("c", "c")), "inputs", id="too-many-inputs"),
    pytest.param(lambda g: with_node(g, 0, inputs=()), "an input", id="no-inputs"),
    pytest.param(lambda g: with_node(g, 0, inputs=None), "tuple of names", id="inputs-none"),
    pytest.param(lambda g: with_node(g, 1, activation=RELU), "can not have", id="activation-of-pool"),
    pytest.param(lambda g: with_node(g, 0, activation=Activation("relu")), "activation", id="activation"),
    pytest.param(lambda g: with_node(g, 0, activation=Activation("clamp", 1.0, 0.0)), "clamp", id="clamp"),
    pytest.param(lambda g: with_node(g, 0, activation=Activation("clamp", float("nan"))), "numbers", id="clamp-nan"),
    pytest.param(lambda g: with_node(g, 0, activation="relu"), "activation", id="activation-text"),
    pytest.param(lambda g: with_node(g, 1, attributes=None), "dictionary", id="attributes-none"),
    pytest.param(lambda g: with_attribute(g, 0, more=1), "no others", id="attribute-more"),
    pytest.param(lambda g: with_attribute(g, 0, stride=(0, 1)), "stride", id="stride-0"),
    pytest.param(lambda g: with_attribute(g, 0, stride=(1.0, 1)), "stride", id="stride-float"),
    pytest.param(lambda g: with_attribute(g, 0, stride=(True, 1)), "stride", id="stride-bool"),
    pytest.param(lambda g: with_attribute(g, 0, stride=[1, 1]), "stride", id="stride-list"),
    pytest.param(lambda g: with_attribute(g, 0, stride=(1, 1, 1)), "stride", id="stride-three"),
    pytest.param(lambda g: with_attribute(g, 0, padding=(-1, 1, 1, 1)), "padding", id="padding-negative"),
    pytest.param(lambda g: with_attribute(g, 0, padding=(HUGE - 1, HUGE - 1, 1, 1)), "shape", id="padding-huge"),
    pytest.param(lambda g: with_attribute(g, 0, kernel=(HUGE, 1)), "kernel", id="kernel-huge"),
    pytest.param(lambda g: with_attribute(g, 0, kernel=(HUGE - 1, HUGE - 1)), "shape", id="kernel-large"),
    pytest.param(lambda g: with_attribute(g, 0, groups=3), "groups", id="groups"),
    pytest.param(lambda g: with_attribute(g, 0, groups=0), "groups", id="groups-0"),
    pytest.param(lambda g: with_attribute(g, 1, padding=(2, 0)), "padding", id="pool-padding"),
    pytest.param(lambda g: with_attribute(g, 1, ceil_mode=True), "ceil_mode", id="ceil-bool"),
    pytest.param(lambda g: with_tensors(g, 0, levels=None), "needs the tensors", id="no-levels"),
    pytest.param(lambda g: with_tensors(g, 0, weight=torch.zeros(4, 36)), "needs the tensors", id="two-weights"),
    pytest.param(lambda g: with_tensors(g, 0, codes=torch.zeros(4, dtype=torch.uint8)), "matrix", id="codes-vector"),
    pytest.param(lambda g: with_tensors(g, 0, codes=torch.zeros(0, 8, dtype=torch.uint8)), "row", id="codes-empty"),
    pytest.param(lambda g: with_tensors(g, 0, codes=torch.zeros(4, 9, dtype=torch.uint8)), "codes", id="codes-width"),
    pytest.param(lambda g: with_tensors(g, 0, codes=torch.zeros(4, 8)), "codes", id="codes-dtype"),
    pytest.param(
        lambda g: with_tensors(g, 0, codes=torch.full((4, 8), 255, dtype=torch.uint8)), "base-3", id="codes-bad"
    ),
    pytest.param(lambda g: with_tensors(g, 0, levels=torch.zeros(1, 17)), "levels", id="17-levels"),
    pytest.param(lambda g: with_tensors(g, 0, levels=torch.zeros(3, 3)), "levels", id="3-codebooks"),
    pytest.param(lambda g: with_tensors(g, 0, levels=torch.full((1, 3), float("inf"))), "finite", id="levels-inf"),
    pytest.param(lambda g: with_tensors(g, 0, bias=torch.zeros(5)), "bias", id="bias-shape"),
    pytest.param(lambda g: with_tensors(g, 0, bias=torch.zeros(4).double()), "bias", id="bias-dtype"),
    pytest.param(lambda g: with_tensors(g, 0, bias=torch.zeros(8)[::2]), "contiguous", id="bias-strided"),
    pytest.param(lambda g: with_tensors(g, 0, bias=torch.zeros(4, device="meta")), "CPU", id="bias-meta"),
    pytest.param(lambda g: with_tensors(g, 0, bias=[0.0]), "CPU", id="bias-list"),
    pytest.param(lambda g: with_tensors(g, 1, bias=torch.zeros(4)), "no others", id="pool-tensor"),
    pytest.param(lambda g: with_tensors(g, 2, weight=torch.zeros(5, 35)), "weight", id="weight-columns"),
]
WRONG_QUANTIZED = [
    pytest.param(lambda g: with_value(g, "p", scale=0.25), "one dtype", id="pool-scale"),
    pytest.param(lambda g: with_value(g, "p", dtype="float32"), "one dtype", id="pool-dtype"),
    pytest.param(lambda g: with_tensors(g, 0, scale=None), "needs the tensors", id="no-scale"),
    pytest.param(lambda g: with_tensors(g, 2, weight=torch.zeros(5, 36)), "int8", id="weight-float"),
    pytest.param(
        lambda g: with_tensors(g, 0, integers=torch.full((1, 3), 65, dtype=torch.int8)), "-64 to 64", id="integer-65"
    ),
    pytest.param(
        lambda g: with_tensors(g, 0, integers=torch.full((1, 3), -128, dtype=torch.int8)), "-64", id="integer-128"
    ),
    pytest.param(lambda g: with_value(g, "x", dtype="float32"), "needs the tensors", id="float-input"),
]


def refused(graph: Graph, said: str) -> None:
    with pytest.raises(ValueError) as error:
        graph.check()
    assert said in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(("damage", "said"), WRONG)
def test_a_damaged_graph_is_refused(damage: Any, said: str) -> None:
    refused(damage(sound()), said)


@pytest.mark.parametrize(("damage", "said"), WRONG_QUANTIZED)
def test_a_damaged_quantized_graph_is_refused(damage: Any, said: str) -> None:
    refused(damage(quantized()), said)


def test_a_name_of_a_file_is_shown_in_one_short_line() -> None:
    name = "\x1b[2J\n" * 1000
    graph = sound()
    refused(graph.replaced(values=graph.values | {name: Value(name, (1,))}), "\\x1b")


def test_sums_that_could_overflow_are_refused() -> None:
    columns = 131_587  # 255 * 64 * columns is above 2**31
    for width, said in ((columns - 1, None), (columns, "overflow")):
        tensors = {"weight": torch.zeros(1, width, dtype=torch.int8), "scale": torch.ones(1)}
        values = {"x": Value("x", (width,), "uint8"), "y": Value("y", (1,))}
        graph = Graph(("x",), ("y",), values, (Node("linear", ("x",), "y", {}, tensors),))
        if said:
            refused(graph, said)
        else:
            graph.check()
    values = {"x": Value("x", (1, 3000, 3000), "uint8"), "y": Value("y", (1, 1, 1))}
    refused(Graph(("x",), ("y",), values, (Node("adaptive_avg_pool2d", ("x",), "y", {"size": (1, 1)}),)), "overflow")


SHAPES = [
    ("affine", {}, [(3, 4, 5)], (3, 4, 5)),
    ("add", {}, [(3, 4, 5), (3, 1, 1)], (3, 4, 5)),
    ("mul", {}, [(3, 4, 5), (2, 1, 1)], None),
    ("sub", {}, [(1, 4, 5), (3, 4, 5)], None),
    ("cat", {}, [(3, 4, 5), (2, 4, 5), (1, 4, 5)], (6, 4, 5)),
    ("cat", {}, [(3,), (2,)], (5,)),
    ("cat", {}, [(3, 4, 5), (2, 4, 4)], None),
    ("cat", {}, [(3, 4, 5)], None),
    ("pad", {"low": (0, 1, 2), "high": (3, 0, 1), "value": 0.5}, [(1, 2, 3)], (4, 3, 6)),
    ("pad", {"low": (0, 1), "high": (3, 0), "value": 0.5}, [(1, 2, 3)], None),
    ("pad", {"low": (0,), "high": (3,), "value": 0}, [(2,)], None),
    ("pad", {"low": (0,), "high": (3,), "value": float("nan")}, [(2,)], None),
    ("slice", {"start": (0, 1, 0), "stop": (2, 6, 7), "step": (1, 2, 3)}, [(2, 7, 7)], (2, 3, 3)),
    ("slice", {"start": (0, 1, 0), "stop": (3, 6, 7), "step": (1, 2, 3)}, [(2, 7, 7)], None),
    ("slice", {"start": (4,), "stop": (4,), "step": (1,)}, [(7,)], None),
    ("reshape", {"shape": (12,)}, [(2, 3, 2)], (12,)),
    ("reshape", {"shape": (3, 4)}, [(2, 3, 2)], None),
    ("reshape", {"shape": (3, 4, 0)}, [(2, 3, 2)], None),
    ("reshape", {"shape": (11,)}, [(2, 3, 2)], None),
    ("adaptive_avg_pool2d", {"size": (1, 2)}, [(2, 3, 2)], (2, 1, 2)),
    ("adaptive_avg_pool2d", {"size": (1, 2)}, [(2,)], None),
    ("softmax", {}, [(7,)], (7,)),
    ("max_pool2d", POOL | {"padding": (1, 1), "dilation": (2, 2)}, [(1, 1, 1)], None),
]


@pytest.mark.parametrize(("op", "attributes", "inputs", "expected"), SHAPES)
def test_shapes(op: str, attributes: dict[str, Any], inputs: list[Any], expected: Any) -> None:
    node = Node(op, tuple("abc"[: len(inputs)]), "y", attributes)
    if expected is not None:
        assert output_shape(node, inputs) == expected
        return
    with pytest.raises(ValueError):
        output_shape(node, inputs)


@pytest.mark.parametrize("ceil_mode", (0, 1))
@pytest.mark.parametrize("op", ("max_pool2d", "avg_pool2d"))
def test_pools_have_the_sizes_of_torch(op: str, ceil_mode: int) -> None:
    compared = refusals = 0
    for size in range(1, 8):
        for kernel in range(1, 5):
            for stride in range(1, 4):
                for padding in range(3):
                    for dilation in (1, 2, 3) if op == "max_pool2d" else (1,):
                        numbers = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
                        attributes = {name: (each, each) for name, each in numbers.items()}
                        if op == "avg_pool2d":
                            attributes = AVERAGE | {name: attributes[name] for name in ("kernel", "stride", "padding")}
                        node = Node(op, ("x",), "y", attributes | {"ceil_mode": ceil_mode})
                        x = torch.zeros(1, 1, size, size)
                        extra = [dilation] if op == "max_pool2d" else []
                        try:
                            function = getattr(torch.nn.functional, op)
                            expected = function(x, kernel, stride, padding, *extra, ceil_mode=bool(ceil_mode))
                        except RuntimeError:
                            expected = None
                        try:
                            assert (1, *output_shape(node, [(1, size, size)])) == tuple(expected.shape)
                            compared += 1
                        except ValueError:
                            # Only padded images smaller than the dilation are the engine's to refuse.
                            assert expected is None or (padding and dilation > size)
                            refusals += 1
    assert compared > 50 and refusals > 50


JUNK = (None, True, -1, 0, 1, 2, 3, 7, HUGE - 1, HUGE, 2**70, 0.5, math.nan, math.inf, "", "uint8", "x", (), [], {})


def junk(pick: random.Random, old: Any) -> Any:
    """Something else in the place of ``old``: of its kind, or not."""
    if isinstance(old, tuple) and old and pick.random() < 0.8:
        at = pick.randrange(len(old))
        return (*old[:at], junk(pick, old[at]), *old[at + 1 :]) if pick.random() < 0.7 else old[:at] + old[at + 1 :]
    if isinstance(old, dict) and old and pick.random() < 0.9:
        name = pick.choice(sorted(old))
        rest = {each: value for each, value in old.items() if each != name}
        return rest if pick.random() < 0.2 else rest | {name: junk(pick, old[name])}
    if isinstance(old, torch.Tensor) and pick.random() < 0.8:
        others = (
            old[:-1],
            old.double(),
            old.to(torch.uint8),
            old.mT if old.dim() > 1 else old[:, None],
            old * float("nan"),
            old + 200,
            old[None],
        )
        return pick.choice((*others, old[:, :-1] if old.dim() == 2 else old[:0], torch.zeros(0)))
    if dataclasses.is_dataclass(old) and pick.random() < 0.9:
        name = pick.choice([field.name for field in dataclasses.fields(old)])
        return dataclasses.replace(old, **{name: junk(pick, getattr(old, name))})  # type: ignore[type-var]
    if type(old) is int and pick.random() < 0.7:
        return old + pick.choice((-1, 1))
    return pick.choice(JUNK)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_graph_holds_it_is_sound_and_runs_or_is_refused(seed: int) -> None:
    pick = random.Random(seed)
    graph, inputs = draw_graph(seed, quantized=seed % 2 == 0)
    refusals = 0
    for _ in range(60):
        damaged: Any = junk(pick, graph)
        try:
            if not isinstance(damaged, Graph):
                continue
            damaged.check()
        except ValueError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        read = [damaged.values[name] for name in damaged.inputs]
        if max(math.prod(value.shape) for value in damaged.values.values()) < 100_000:
            run(damaged, [torch.zeros(1, *value.shape, dtype=getattr(torch, value.dtype)) for value in read])
    assert refusals > 10
