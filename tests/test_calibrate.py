"""Ranges over batches: what is exact, what is cut, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bqnn.engine.calibrate import Observer, calibrate
from bqnn.engine.graph import RELU, Activation, Graph, Node, Value
from bqnn.engine.operators import OPERATORS
from bqnn.engine.quantize import quantize
from bqnn.engine.reference import run
from tests.support.draw_graphs import draw_graph


def relu_graph() -> Graph:
    values = {"x": Value("x", (5,)), "y": Value("y", (5,))}
    return Graph(("x",), ("y",), values, (Node("activation", ("x",), "y", activation=RELU),))


def test_ranges_are_those_of_all_batches() -> None:
    batches = [torch.linspace(-1, 1, 50).view(10, 5), torch.linspace(-4, 3, 50).view(10, 5)]
    assert calibrate(relu_graph(), batches).ranges == {"x": (-4.0, 3.0), "y": (0.0, 3.0)}
    assert calibrate(relu_graph(), [(batch,) for batch in batches]).ranges == {"x": (-4.0, 3.0), "y": (0.0, 3.0)}
    assert calibrate(relu_graph(), iter(batches[:1])).ranges == {"x": (-1.0, 1.0), "y": (0.0, 1.0)}


def test_what_moves_numbers_has_the_range_of_all_that_it_holds() -> None:
    values = {name: Value(name, (5,)) for name in ("x", "y", "z")} | {"both": Value("both", (10,))}
    values["more"] = Value("more", (12,))
    nodes = (
        Node("activation", ("x",), "y", activation=RELU),
        Node("activation", ("x",), "z", activation=Activation("clamp", -1.0, 1.0)),
        Node("cat", ("y", "z"), "both"),
        Node("pad", ("both",), "more", {"low": (1,), "high": (1,), "value": 7.0}),
    )
    graph = Graph(("x",), ("more",), values, nodes)
    ranges = calibrate(graph, [torch.linspace(-4, 3, 50).view(10, 5)]).ranges
    assert ranges["both"] == (-1.0, 3.0) and ranges["more"] == (-1.0, 7.0)


def test_a_value_that_is_always_0_has_a_range() -> None:
    assert calibrate(relu_graph(), [-torch.ones(2, 5)]).ranges == {"x": (-1.0, -1.0), "y": (0.0, 0.0)}


def test_inputs_are_never_cut_and_rare_numbers_of_other_values_are() -> None:
    torch.manual_seed(0)
    x = torch.rand(100_000, 5)
    x[0, 0] = 100.0
    ranges = calibrate(relu_graph(), x.split(50_000)).ranges
    assert ranges["x"] == (float(x.min()), 100.0)
    assert ranges["y"][0] == float(x.min()) and 50 < ranges["y"][1] < 70


@pytest.mark.parametrize("order", (1, -1), ids=("growing", "shrinking"))
@pytest.mark.parametrize("shift", (0.0, 1.0), ids=("signed", "unsigned"))
def test_the_cut_has_nearly_the_smallest_error(order: int, shift: float) -> None:
    torch.manual_seed(1)
    numbers = torch.randn(64, 4096)
    numbers[0, 0] = 12.0
    numbers = numbers.abs() if shift else numbers
    numbers = numbers[numbers.abs().amax(1).argsort(descending=order < 0)]
    observer = Observer(mean=False)
    for each in numbers.split(16):
        observer.add("x", each)
    low, high = observer.range()
    assert observer.counts.sum() == numbers.numel()

    def error(largest: float) -> float:
        least, most = max(float(numbers.min()), -largest), min(float(numbers.max()), largest)
        step = (most - min(least, 0.0)) / 255
        zero = round(-min(least, 0.0) / step)
        return float(((numbers / step).round().clamp(-zero, 255 - zero) * step - numbers).square().mean())

    largest = float(numbers.abs().max())
    best = min(error(largest * i / 200) for i in range(10, 201))
    cut = max(-low, high)
    assert cut < 0.9 * largest and error(cut) < 1.05 * best < 0.9 * error(largest)


def test_a_batch_without_images_adds_nothing() -> None:
    for seed in range(20):
        graph, inputs = draw_graph(seed)
        empty = tuple(x[:0] for x in inputs)
        _, means, sums = calibrate(graph, [empty, inputs])
        _, alone, expected = calibrate(graph, [inputs])
        assert all(torch.equal(means[name], alone[name]) for name in alone)
        for name, each in expected.items():
            assert torch.equal(sums[name].mean, each.mean) and torch.equal(sums[name].covariance, each.covariance)


def test_ranges_of_drawn_graphs_are_what_quantize_takes() -> None:
    for seed in range(20):
        graph, inputs = draw_graph(seed)
        ranges, means, sums = calibrate(graph, [inputs, inputs])
        assert set(sums) == {node.output for node in graph.nodes if "codes" in node.tensors}
        assert set(ranges) == set(graph.values)
        assert set(means) == {node.inputs[0] for node in graph.nodes if node.op in ("conv2d", "linear")}
        values = run(graph, inputs, torch.float32, keep=True)
        bounds = {name: (float(x.min()), float(x.max())) for name, x in values.items()}
        for node in graph.nodes:
            if OPERATORS[node.op].moves:  # its range may be that of what it moves
                numbers = [number for name in (node.output, *node.inputs) for number in bounds[name]]
                bounds[node.output] = min(numbers), max(numbers)
        for name, x in values.items():
            low, high = ranges[name]
            rounding = 1e-5 * max(map(abs, bounds[name]))  # the extension's sums are of another order
            assert bounds[name][0] - rounding <= low <= high <= bounds[name][1] + rounding
            if name in means:
                torch.testing.assert_close(means[name], x.double().mean(0), rtol=1e-5, atol=1e-5)
        quantize(graph, ranges, means, sums).check()


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        pytest.param([], "a batch of one image or more", id="none"),
        pytest.param([torch.zeros(0, 5)], "a batch of one image or more", id="empty"),
        pytest.param([torch.zeros(1, 5), torch.zeros(1, 4)], "batch 1: input x must have the shape", id="shape"),
        pytest.param([()], "batch 0: the graph has 1 inputs", id="inputs"),
        pytest.param([torch.tensor([[0.0, 1.0, 2.0, 3.0, float("nan")]])], "batch 0: value x is not finite", id="nan"),
        pytest.param([torch.full((1, 5), float("inf"))], "batch 0: value x is not finite", id="infinity"),
    ],
)
def test_batches_that_are_none_are_refused(batches: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrate(relu_graph(), batches)
