"""Which values become uint8, what their scales are, and how near a quantized graph stays to its float32 one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bqnn.core.codes import pack_codes
from bqnn.engine.calibrate import calibrate
from bqnn.engine.graph import NO_ACTIVATION, RELU, Activation, Graph, Node, Value
from bqnn.engine.integers import DECIMALS, LIMITS, TOLERANCE, CodedWeights, CodeSums, CodeSumsObserver, integer_rows
from bqnn.engine.operators import output_shape
from bqnn.engine.passes import optimize
from bqnn.engine.quantize import quantize
from bqnn.engine.reference import run
from tests.support.draw_graphs import draw_graph

CONV = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
POOL = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": 0}


class Net:
    """A graph of named values; x is the input, [4, 6, 6] or of another shape."""

    def __init__(self, *shape: int) -> None:
        self.values = {"x": Value("x", shape or (4, 6, 6))}
        self.nodes: list[Node] = []

    def add(self, op: str, inputs: str, output: str, activation: Activation = NO_ACTIVATION, **rest: Any) -> Net:
        tensors = {name: each for name, each in rest.items() if isinstance(each, Tensor)}
        attributes = {name: each for name, each in rest.items() if name not in tensors}
        node = Node(op, tuple(inputs.split()), output, attributes, tensors, activation)
        shape = output_shape(node, [self.values[name].shape for name in node.inputs])
        self.values[output] = Value(output, shape)
        self.nodes.append(node)
        return self

    def conv(self, inputs: str, output: str, activation: Activation = NO_ACTIVATION) -> Net:
        return self.add("conv2d", inputs, output, activation, **CONV, weight=torch.randn(4, 36) / 6)

    def linear(self, inputs: str, output: str, activation: Activation = NO_ACTIVATION) -> Net:
        columns = math.prod(self.values[inputs].shape)
        return self.add("linear", inputs, output, activation, weight=torch.randn(5, columns) / columns**0.5)

    def graph(self, *outputs: str) -> Graph:
        graph = Graph(("x",), outputs, self.values, tuple(self.nodes))
        graph.check()
        return graph


def quantized(graph: Graph, **ranges: tuple[float, float]) -> Graph:
    """With the range from -1 to 1 of every value that is not named."""
    found = quantize(graph, dict.fromkeys(graph.values, (-1.0, 1.0)) | ranges)
    found.check()
    assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
    assert all(found.values[name].dtype == "float32" for name in (*found.inputs, *found.outputs))
    return found


def uint8(graph: Graph) -> str:
    return " ".join(sorted(name for name, value in graph.values.items() if value.dtype == "uint8"))


def measured(graph: Graph, inputs: tuple[Tensor, ...]) -> dict[str, tuple[float, float]]:
    return {name: (float(x.min()), float(x.max())) for name, x in run(graph, inputs, keep=True).items()}


# ---- which values ----


def test_a_network_is_uint8_from_its_input_to_its_last_layer() -> None:
    net = Net().conv("x", "a", RELU).add("max_pool2d", "a", "b", **POOL).conv("b", "c").linear("c", "d", RELU)
    found = quantized(net.linear("d", "e").add("softmax", "e", "f").graph("f"))
    assert uint8(found) == "a b c d x.uint8"
    assert [node.op for node in found.nodes] == ["activation", *(node.op for node in net.nodes)]
    assert found.nodes[0].activation == NO_ACTIVATION


def test_what_computes_with_an_input_reads_it_as_it_is() -> None:
    affine = {"scale": torch.ones(4), "shift": torch.ones(4)}
    net = Net().add("affine", "x", "a", **affine).conv("a", "b").add("add", "x b", "c").conv("c", "d")
    found = quantized(net.graph("d"))
    assert uint8(found) == "a b c"
    assert "x" in found.nodes[0].inputs


def test_an_input_that_is_moved_is_copied_first() -> None:
    net = Net().add("max_pool2d", "x", "a", **POOL).conv("a", "b").add("cat", "x x", "c").linear("c", "d")
    found = quantized(net.graph("b", "d"), x=(-2.0, 2.0))
    assert uint8(found) == "a c x.uint8"
    assert [node.op for node in found.nodes] == ["activation", "max_pool2d", "conv2d", "cat", "linear"]
    assert {found.values[name].scale for name in ("a", "c", "x.uint8")} == {float(np.float32(4 / 255))}


def test_an_output_that_a_layer_reads_is_copied() -> None:
    net = Net().conv("x", "a").conv("a", "b").add("max_pool2d", "b", "c", **POOL).conv("c", "d").conv("a", "e")
    found = quantized(net.graph("a", "c", "d", "e"), c=(-3.0, 3.0))
    # c is an output, so what it is moved from is float32 as well; both readers of a share one copy.
    assert uint8(found) == "a.uint8 c.uint8 x.uint8"
    assert found.values["c.uint8"].scale == float(np.float32(6 / 255))


def test_a_name_that_is_there_is_not_taken() -> None:
    net = Net().conv("x", "x.uint8").conv("x.uint8", "b")
    assert uint8(quantized(net.graph("b"))) == "x.uint8 x.uint8_"


def test_what_leads_to_outputs_alone_stays_float32() -> None:
    net = Net().conv("x", "a").conv("a", "b").add("adaptive_avg_pool2d", "b", "c", size=(1, 1)).add("softmax", "c", "d")
    assert uint8(quantized(net.add("add", "a b", "e").graph("d", "e"))) == "a x.uint8"
    assert uint8(quantized(Net().add("activation", "x", "a", RELU).graph("a"))) == ""


def test_a_softmax_between_layers_is_float32() -> None:
    net = Net().linear("x", "a").add("softmax", "a", "b").linear("b", "c")
    assert uint8(quantized(net.graph("c"))) == "b.uint8 x.uint8"


def test_a_residual_is_uint8_where_the_sum_is() -> None:
    net = Net().conv("x", "a").conv("a", "b").add("affine", "b", "r", scale=torch.ones(4), shift=torch.ones(4))
    net.add("conv2d", "b r", "c", **CONV, weight=torch.randn(4, 36))
    assert uint8(quantized(net.graph("c"))) == "a b x.uint8"
    assert uint8(quantized(net.linear("c", "d").graph("d"))) == "a b c r x.uint8"


def test_a_layer_whose_sums_could_overflow_stays_float32() -> None:
    net = Net(3).linear("x", "a").add("pad", "a", "b", low=(0,), high=(131_586,), value=0.0)
    net.linear("b", "c").linear("c", "d")
    assert uint8(quantized(net.graph("d"))) == "c x.uint8"


@pytest.mark.parametrize(("value", "names"), ((0.0, "a b x.uint8"), (-1.0, "a b x.uint8"), (-1.5, "b.uint8 x.uint8")))
def test_padding_beyond_the_range_stays_float32(value: float, names: str) -> None:
    net = Net().conv("x", "a").add("pad", "a", "b", low=(0, 1, 0), high=(0, 0, 0), value=value).conv("b", "c")
    assert uint8(quantized(net.graph("c"), b=(min(value, -1.0), 1.0))) == names


# ---- scales ----


@pytest.mark.parametrize(
    ("limits", "scale", "zero"),
    [
        ((0.0, 2.0), 2 / 255, 0),
        ((0.5, 2.0), 2 / 255, 0),
        ((-0.17, 2.0), 2.17 / 255, 20),
        ((-3.0, 2.0), 5 / 255, 153),
        ((-3.0, -1.0), 3 / 255, 255),
        ((0.0, 0.0), 2.0**-100 / 255, 0),
    ],
)
def test_scale_and_zero(limits: tuple[float, float], scale: float, zero: int) -> None:
    value = quantized(Net().conv("x", "a").conv("a", "b").graph("b"), a=limits).values["a"]
    assert (value.dtype, value.scale, value.zero) == ("uint8", float(np.float32(scale)), zero)


def test_values_that_are_moved_into_each_other_share_a_joint_range() -> None:
    net = Net().conv("x", "a", RELU).conv("a", "b", RELU).add("cat", "a b", "c").add("max_pool2d", "c", "d", **POOL)
    net.conv("x", "e", RELU).add("max_pool2d", "e", "f", **POOL).linear("d", "y").linear("f", "z")
    found = quantized(
        net.graph("y", "z"), a=(0.0, 2.0), b=(0.0, 5.0), c=(0.0, 5.0), d=(0.0, 5.0), e=(0.0, 1.0), f=(0.0, 1.0)
    )
    assert {found.values[name].scale for name in "abcd"} == {float(np.float32(5 / 255))}
    assert {found.values[name].scale for name in "ef"} == {float(np.float32(1 / 255))}


@pytest.mark.parametrize("name", ("sigmoid", "hardsigmoid"))
def test_gates_range_from_0_to_1(name: str) -> None:
    net = Net().conv("x", "a").add("adaptive_avg_pool2d", "a", "b", size=(1, 1))
    net.add("activation", "b", "c", Activation(name)).add("mul", "a c", "d").conv("d", "e")
    value = quantized(net.graph("e"), c=(0.4, 0.6)).values["c"]
    assert (value.scale, value.zero) == (float(np.float32(1 / 255)), 0)


@pytest.mark.parametrize("limits", (None, (math.nan, 1.0), (0.0, math.inf), (1.0, 0.0)))
def test_a_range_that_is_none_is_refused(limits: Any) -> None:
    graph = Net().conv("x", "a").graph("a")
    with pytest.raises(ValueError, match="range of value a"):
        quantize(graph, {"x": (0.0, 1.0)} | ({"a": limits} if limits else {}))


def test_a_quantized_graph_is_refused() -> None:
    graph = Net().conv("x", "a").graph("a")
    with pytest.raises(ValueError, match="uint8"):
        quantize(quantized(graph), {})


# ---- weights ----


def best_of(row: Any, counts: Any, limit: int) -> tuple[float, Any]:
    """The smallest share of error that one codebook has, over its channels' ``counts``, and its integers."""
    found = []
    for most in range(1, limit + 1):
        integers = np.rint(row / np.abs(row).max() * most)
        error = size = 0.0
        for count in counts:
            weights, units = np.repeat(row, count), np.repeat(integers, count)
            step = (units @ weights) / max(units @ units, 1)
            error += ((weights - step * units) ** 2).sum()
            size += (weights**2).sum()
        found.append((round(error / size, DECIMALS), most, integers))
    share, _, integers = min(found, key=lambda each: each[:2])
    return share, integers


def coded(table: Tensor, codes: Tensor, sums: CodeSums | None = None) -> CodedWeights:
    levels = table.shape[1]
    return CodedWeights(pack_codes(codes, levels), table, codes.shape[1], sums)


def sums_of(codes: Tensor, levels: int, x: Tensor) -> CodeSums:
    """Of inputs x [B, groups, K], float64."""
    chosen = torch.stack([codes == code for code in range(levels)], 1).double()  # [N, M, K]
    products = torch.einsum("bgk,gnmk->gnmb", x, chosen.view(x.shape[1], -1, levels, x.shape[2])).flatten(0, 1)
    mean = products.mean(2)
    off = products - mean[..., None]
    return CodeSums(mean, off @ off.transpose(1, 2) / len(x))


@pytest.mark.parametrize("books", (1, 4), ids=("tensor", "channel"))
@pytest.mark.parametrize("levels", (2, 3, 5, 16))
@pytest.mark.parametrize("columns", (9, 700))
def test_levels_are_the_best_integers_of_the_smallest_limit(columns: int, levels: int, books: int) -> None:
    torch.manual_seed(levels + columns)
    table = torch.randn(books, levels)
    codes = torch.randint(0, levels, (4, columns), dtype=torch.uint8)
    weights = coded(table, codes)
    counts = weights.counts
    assert counts.tolist() == [[float((row == code).sum()) for code in range(levels)] for row in codes]
    integers, steps, shifts = weights.integers()
    assert not shifts.any()
    assert (integers.dtype, steps.dtype, len(steps)) == (torch.int8, torch.float64, 4)
    rows, numbers = table.double().numpy(), counts.long().numpy()
    for limit in LIMITS:
        best = [best_of(row, numbers if books == 1 else numbers[n : n + 1], limit) for n, row in enumerate(rows)]
        if np.mean([share for share, _ in best]) <= TOLERANCE**2:
            break
    assert int(integers.abs().max()) <= limit
    assert integers.tolist() == [found.tolist() for _, found in best]


@pytest.mark.parametrize("levels", (3, 8, 16))
@pytest.mark.parametrize("groups", (1, 2))
def test_outputs_of_many_positive_inputs_stay_near(groups: int, levels: int) -> None:
    torch.manual_seed(levels)
    for books in (1, 32):
        table = torch.randn(books, levels).sort(1).values.contiguous()
        codes = torch.randint(0, levels, (32, 4608), dtype=torch.uint8)
        x = torch.randn(200, groups, 4608, dtype=torch.float64).relu() * torch.arange(1, 3)[:groups, None]
        integers, steps, shifts = coded(table, codes, sums_of(codes, levels, x)).integers()
        weight = table.double().expand(32, -1).gather(1, codes.long())
        rounded = integers.double().expand(32, -1).gather(1, codes.long()) * steps[:, None]
        y, z = (torch.einsum("bgk,gnk->bgn", x, w.view(groups, -1, 4608)).flatten(1) for w in (weight, rounded))
        assert (z + shifts - y).norm() < 0.02 * (y - y.mean(0)).norm()
        assert (z + shifts - y).mean(0).norm() < 1e-4 * y.mean(0).norm()


@pytest.mark.parametrize("groups", (1, 2))
def test_what_is_known_of_inputs_is_what_sums_of_products_are(groups: int) -> None:
    """Borders, strides and batches included."""
    torch.manual_seed(groups)
    codes = torch.randint(0, 3, (4, 9 * 4 // groups), dtype=torch.uint8)
    options = {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 0, 0, 2), "dilation": (1, 1), "groups": groups}
    tensors = {"codes": pack_codes(codes, 3), "levels": torch.randn(1, 3)}
    node = Node("conv2d", ("x",), "y", options, tensors)
    x = torch.randn(6, 4, 9, 10).relu()
    observer = CodeSumsObserver(node, codes.shape[1], 4 * 10)
    for batch in x.split(2):
        observer.add(batch)
    found = observer.found()
    weight = tensors["levels"][0][codes.long()].view(4, -1, 3, 3)
    padded = torch.nn.functional.pad(x, (0, 2, 1, 0))
    y = torch.nn.functional.conv2d(padded, weight, stride=(2, 1), groups=groups).transpose(0, 1).flatten(1).double()
    levels = tensors["levels"][0].double()
    torch.testing.assert_close(found.mean @ levels, y.mean(1), rtol=1e-4, atol=1e-5)
    variances = torch.einsum("m,nmk,k->n", levels, found.covariance, levels)
    torch.testing.assert_close(variances, y.var(1, correction=0), rtol=1e-4, atol=1e-5)


def test_a_codebook_a_channel_keeps_outputs_that_nearly_cancel() -> None:
    """Inputs of a common size, as GELU and whitened patches have them: what levels are off by adds up over columns."""
    torch.manual_seed(5)
    codes = torch.randint(0, 3, (16, 2304), dtype=torch.uint8)
    table = torch.tensor([[-0.9, 0.013, 1.1]]) * (1 + 0.1 * torch.randn(16, 3))
    x = torch.rand(500, 1, 1, dtype=torch.float64) * 3 + 0.3 * torch.randn(500, 1, 2304, dtype=torch.float64)
    weight = table.double().gather(1, codes.long())
    y = torch.einsum("bgk,nk->bn", x, weight)
    errors = []
    for sums in (None, sums_of(codes, 3, x)):
        integers, steps, shifts = coded(table, codes, sums).integers()
        rounded = integers.double().gather(1, codes.long()) * steps[:, None]
        z = torch.einsum("bgk,nk->bn", x, rounded) + shifts
        off = (z - z.mean(0)) - (y - y.mean(0))
        errors.append(float(off.norm() / (y - y.mean(0)).norm()))
    assert errors[1] < 0.25 * errors[0] and errors[1] < 0.01


def test_even_levels_have_small_integers() -> None:
    codes = torch.arange(15, dtype=torch.uint8).view(1, -1)
    assert coded(torch.tensor([[-0.3, 0.0, 0.3]]), codes % 3).integers()[0].tolist() == [[-1, 0, 1]]
    integers, steps, _ = coded(torch.zeros(1, 3), codes % 3).integers()
    assert integers.tolist() == [[0, 0, 0]] and steps.tolist() == [0.0]
    assert int(coded(torch.linspace(-1, 1, 16)[None], codes).integers()[0].abs().max()) == 15


def test_dense_rows() -> None:
    weight, mean = torch.randn(4, 50), torch.rand(2, 50, dtype=torch.float64)
    weight[2] = 0
    integers, steps, shifts = integer_rows(weight, mean)
    assert integers.abs().amax(1).tolist() == [64, 64, 0, 64]
    lost = weight - integers * steps[:, None]
    assert (lost.abs() <= steps[:, None] * (0.5 + 1e-9)).all()
    torch.testing.assert_close(shifts, (lost * mean.repeat_interleave(2, 0)).sum(1))


@pytest.mark.parametrize("dense", (False, True), ids=("coded", "dense"))
def test_biases_make_up_for_what_rounding_does_to_the_mean(dense: bool) -> None:
    torch.manual_seed(3)
    table = torch.tensor([[-0.51, 0.07, 0.93]])
    weight = torch.randn(6, 36) if dense else None
    tensors = (
        {"weight": weight}
        if weight is not None
        else {
            "codes": pack_codes(torch.randint(0, 3, (6, 36), dtype=torch.uint8), 3),
            "levels": table,
        }
    )
    graph = (
        Net().add("conv2d", "x", "a", **CONV | {"padding": (0, 0, 0, 0)}, **tensors, scale=torch.randn(6)).graph("a")
    )
    x = torch.rand(64, *graph.values["x"].shape) * 3
    exact = run(graph, (x,))[0].mean((0, 2, 3))
    with_means, without = (
        run(quantize(graph, *(calibrate(graph, [x])[:count])), (x,))[0].mean((0, 2, 3)) for count in (3, 1)
    )
    assert (with_means - exact).norm() < 0.2 * (without - exact).norm()


def test_the_scale_of_a_layer_takes_over_those_of_levels_and_input() -> None:
    codes = pack_codes(torch.randint(0, 3, (4, 36), dtype=torch.uint8), 3)
    tensors = {
        "codes": codes,
        "levels": torch.tensor([[-0.5, 0.0, 1.0]]),
        "scale": torch.randn(4),
        "bias": torch.randn(4),
    }
    net = Net().add("conv2d", "x", "a", **CONV, **tensors)
    found = quantized(net.graph("a"), x=(0.0, 3.0)).nodes[1].tensors
    assert found["integers"].tolist() == [[-1, 0, 2]] and found["codes"] is codes and found["bias"] is tensors["bias"]
    expected = tensors["scale"].double() * 0.5 * float(np.float32(3 / 255))
    torch.testing.assert_close(found["scale"], expected.float())


# ---- how near ----


def test_a_quantized_graph_stays_near_its_float32_one() -> None:
    errors = []
    for seed in range(120):
        graph, inputs = draw_graph(seed)
        graph = optimize(graph)
        found = quantize(graph, measured(graph, inputs))
        found.check()
        for y, expected in zip(run(found, inputs), run(graph, inputs)):
            errors.append(float((y - expected).norm() / expected.norm().clamp(min=1e-6)))
    # A value's rounding is 0.1 to 0.3% of its largest number; graphs of fifteen nodes add some up.
    assert np.median(errors) < 0.005
    assert np.quantile(errors, 0.9) < 0.03
    assert max(errors) < 0.3
