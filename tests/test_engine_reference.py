"""The reference of the engine: float values against torch's modules, uint8 values against plain loops in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.core.codes import pack_codes
from bqnn.engine.graph import RELU, Activation, Graph, Node, Value
from bqnn.engine.operators import output_shape
from bqnn.engine.reference import activate, run

F32 = np.float32
IN, IN2, OUT = ("uint8", 0.25, 128), ("uint8", 0.75, 0), ("uint8", float(F32(0.3)), 128)
FLOAT = ("float32", 1.0, 0)


def graph_of(node: Node, shapes: list[Any], kinds: list[Any], kind: Any = FLOAT) -> Graph:
    """One node, its inputs' shapes, and (dtype, scale, zero) of inputs and output; checked."""
    values = {name: Value(name, shape, *each) for name, shape, each in zip(node.inputs, shapes, kinds)}
    values[node.output] = Value(node.output, output_shape(node, shapes), *kind)
    graph = Graph(node.inputs, (node.output,), values, (node,))
    graph.check()
    return graph


def run_floats(node: Node, *inputs: Tensor) -> Tensor:
    shapes = [tuple(x.shape[1:]) for x in inputs]
    return run(graph_of(node, shapes, [FLOAT] * len(inputs)), inputs)[0]


def draw(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("books", (1, 6), ids=("tensor", "channel"))
@pytest.mark.parametrize("levels", (2, 3, 7, 16))
def test_conv2d_of_codes(levels: int, books: int, groups: int) -> None:
    torch.manual_seed(levels)
    codes = torch.randint(0, levels, (6, 4 // groups * 6), dtype=torch.uint8)
    table, scale, bias = torch.randn(books, levels), torch.randn(6), torch.randn(6)
    attributes = {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2), "groups": groups}
    tensors = {"codes": pack_codes(codes, levels), "levels": table, "scale": scale, "bias": bias}
    x, residual = draw(4, 7, 6), draw(6, 4, 5)
    weight = torch.stack([table[n % books][codes[n].long()] for n in range(6)]).view(6, 4 // groups, 2, 3).double()
    product = F.conv2d(F.pad(x, (2, 1, 1, 0)), weight, None, (2, 1), 0, (1, 2), groups)
    expected = product * scale.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    same(run_floats(Node("conv2d", ("x",), "y", attributes, tensors), x), expected)
    with_all = Node("conv2d", ("x", "r"), "y", attributes, tensors, RELU)
    same(run_floats(with_all, x, residual), (expected + residual).relu())


def test_linear_flattens_in_the_order_of_torch() -> None:
    weight, bias = torch.randn(5, 24), torch.randn(5)
    x = draw(2, 3, 4)
    node = Node("linear", ("x",), "y", {}, {"weight": weight, "bias": bias})
    same(run_floats(node, x), F.linear(x.flatten(1), weight.double(), bias.double()))
    assert run_floats(node, x[:0]).shape == (0, 5)


ACTIVATIONS = [
    (Activation(), nn.Identity()),
    (RELU, nn.ReLU()),
    (Activation("clamp", 0.0, 6.0), nn.ReLU6()),
    (Activation("clamp", -1.0, 1.0), nn.Hardtanh()),
    (Activation("leaky_relu", 0.1), nn.LeakyReLU(0.1)),
    (Activation("hardswish"), nn.Hardswish()),
    (Activation("hardsigmoid"), nn.Hardsigmoid()),
    (Activation("sigmoid"), nn.Sigmoid()),
    (Activation("silu"), nn.SiLU()),
    (Activation("gelu"), nn.GELU()),
    (Activation("gelu_tanh"), nn.GELU("tanh")),
    (Activation("tanh"), nn.Tanh()),
]


@pytest.mark.parametrize(("activation", "module"), ACTIVATIONS, ids=lambda each: getattr(each, "name", None))
def test_activations(activation: Activation, module: nn.Module) -> None:
    x = draw(4, 3, 5) * 4
    same(run_floats(Node("activation", ("x",), "y", activation=activation), x), module(x))


def test_activations_of_float32_are_the_stated_operations() -> None:
    y = np.linspace(-5, 5, 10_001, dtype=F32)
    inner = np.minimum(np.maximum(y + F32(3), F32(0)), F32(6))
    stated = {
        "hardsigmoid": inner * F32(1 / 6),
        "hardswish": y * inner * F32(1 / 6),
        "leaky_relu": np.where(y >= 0, y, y * F32(0.1)),
        "clamp": np.minimum(np.maximum(y, F32(0.1)), F32(1.7)),
    }
    for name, expected in stated.items():
        found = activate(Activation(name, 0.1, 1.7), torch.from_numpy(y))
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), expected), name


SIZES = {"kernel": (3, 2), "stride": (2, 3), "padding": (1, 1)}
NODES = [
    (Node("affine", ("x",), "y", {}, {"scale": torch.randn(4), "shift": torch.randn(4)}), None, [(4, 6, 5)]),
    (Node("add", ("a", "b"), "y"), lambda a, b: a + b, [(4, 6, 5), (4, 1, 1)]),
    (Node("sub", ("a", "b"), "y"), lambda a, b: a - b, [(4, 6, 5), (1, 6, 5)]),
    (Node("mul", ("a", "b"), "y"), lambda a, b: a * b, [(4, 6, 5), (4, 1, 1)]),
    (
        Node("max_pool2d", ("x",), "y", {**SIZES, "dilation": (2, 1), "ceil_mode": 1}),
        nn.MaxPool2d((3, 2), (2, 3), 1, (2, 1), ceil_mode=True),
        [(4, 6, 5)],
    ),
    *(
        (
            Node("avg_pool2d", ("x",), "y", {**SIZES, "ceil_mode": 1, "count_include_pad": count, "divisor": divisor}),
            nn.AvgPool2d((3, 2), (2, 3), 1, True, bool(count), divisor or None),
            [(4, 6, 5)],
        )
        for count, divisor in ((0, 0), (1, 0), (1, 7))
    ),
    (Node("adaptive_avg_pool2d", ("x",), "y", {"size": (4, 3)}), nn.AdaptiveAvgPool2d((4, 3)), [(4, 6, 5)]),
    (Node("adaptive_avg_pool2d", ("x",), "y", {"size": (1, 1)}), lambda x: x.mean((2, 3), True), [(4, 6, 5)]),
    (Node("cat", ("a", "b"), "y"), lambda a, b: torch.cat([a, b], 1), [(4, 6, 5), (1, 6, 5)]),
    (
        Node("pad", ("x",), "y", {"low": (1, 2, 0), "high": (0, 3, 1), "value": -2.5}),
        nn.ConstantPad3d((0, 1, 2, 3, 1, 0), -2.5),
        [(4, 6, 5)],
    ),
    (
        Node("slice", ("x",), "y", {"start": (1, 0, 2), "stop": (4, 6, 5), "step": (2, 5, 1)}),
        lambda x: x[:, 1:4:2, ::5, 2:],
        [(4, 6, 5)],
    ),
    (Node("reshape", ("x",), "y", {"shape": (120,)}), nn.Flatten(), [(4, 6, 5)]),
    (Node("softmax", ("x",), "y"), nn.Softmax(1), [(9,)]),
    (Node("log_softmax", ("x",), "y"), nn.LogSoftmax(1), [(9,)]),
]


@pytest.mark.parametrize(("node", "expected", "shapes"), NODES)
@pytest.mark.parametrize("batch", (3, 0))
def test_operators(node: Node, expected: Any, shapes: Any, batch: int) -> None:
    inputs = [draw(*shape)[:batch] for shape in shapes]
    if node.op == "affine":
        scale, shift = (node.tensors[name].double().view(-1, 1, 1) for name in ("scale", "shift"))
        expected = lambda x: x * scale + shift  # noqa: E731
    same(run_floats(node, *inputs), expected(*inputs))


def test_every_value_is_kept_where_it_is_asked_for() -> None:
    nodes = (Node("activation", ("x",), "y", activation=RELU), Node("add", ("x", "y"), "z"))
    graph = Graph(("x",), ("z", "x"), {name: Value(name, (3,)) for name in "xyz"}, nodes)
    x = draw(3)
    assert set(run(graph, (x,), keep=True)) == {"x", "y", "z"}
    z, again = run(graph, (x,), torch.float32)
    assert z.dtype == again.dtype == torch.float32
    torch.testing.assert_close(z, (x + x.relu()).float())


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), "inputs"),
        ((torch.zeros(2, 4),), "shape"),
        ((torch.zeros(3),), "shape"),
        ((torch.zeros(2, 3, dtype=torch.uint8),), "float32"),
        ((torch.zeros(2, 3, dtype=torch.int64),), "float32"),
    ],
)
def test_wrong_inputs_are_refused(inputs: Any, said: str) -> None:
    graph = graph_of(Node("activation", ("x",), "y"), [(3,)], [FLOAT])
    with pytest.raises(ValueError, match=said):
        run(graph, inputs)


# ---- uint8 ----


def real(q: Any, kind: Any) -> Any:
    return q.astype(F32) if kind[0] == "float32" else (q.astype(np.int32) - kind[2]).astype(F32) * F32(kind[1])


def stored(y: Any, kind: Any) -> Any:
    assert y.dtype == F32
    if kind[0] == "float32":
        return y
    return np.clip(np.rint(y * F32(1 / F32(kind[1]))) + kind[2], 0, 255).astype(np.uint8)


def unit(kind: Any) -> float:
    return float(F32(kind[1]))


def folded(q: Any, scale: Any, bias: Any, other: Any = 0.0, ratio: float = 0.0, low: int = 0) -> Any:
    """Bytes of stored numbers: scale, bias and ratio are of float64, in units of the output, which its zero is in."""
    y = q.astype(F32) * np.asarray(scale).astype(F32) + np.asarray(bias).astype(F32)
    if ratio:
        y = y + other.astype(F32) * F32(ratio)
    assert y.dtype == F32
    return np.clip(np.rint(y), low, 255).astype(np.uint8)


def compare(node: Node, inputs: list[Any], kinds: list[Any], kind: Any, expected: Any, in_bytes: Any = None) -> None:
    """``run`` of one node against ``expected``, float32 before it is stored, or as bytes where it is folded."""
    graph = graph_of(node, [x.shape[1:] for x in inputs], kinds, kind)
    for dtype in (torch.float32, torch.float64):
        (found,) = run(graph, [torch.from_numpy(x) for x in inputs], dtype)
        assert found.dtype == (torch.uint8 if kind[0] == "uint8" else dtype)
        as_bytes = kind[0] == "uint8" and in_bytes is not None
        assert np.array_equal(found.numpy(), in_bytes if as_bytes else stored(expected, kind))


def integers(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).integers(0, 256, (3, *shape), dtype=np.uint8)


@pytest.mark.parametrize("kind", (OUT, FLOAT), ids=("uint8", "float32"))
@pytest.mark.parametrize("op", ("conv2d", "linear"))
def test_products_of_integers(op: str, kind: Any) -> None:
    torch.manual_seed(0)
    x, zero = integers(4, 5, 5), IN[2]
    columns = 18 if op == "conv2d" else 100
    codes = torch.randint(0, 5, (6, columns), dtype=torch.uint8)
    table = torch.randint(-64, 65, (6, 5), dtype=torch.int8)
    scale, bias = torch.rand(6) * 1e-3, torch.randn(6)
    weight = table.gather(1, codes.long()).numpy().astype(np.int64)
    centered = x.astype(np.int64) - zero
    attributes: dict[str, Any] = {}
    if op == "conv2d":
        attributes = {"kernel": (3, 3), "stride": (1, 2), "padding": (1, 0, 0, 1), "dilation": (1, 1), "groups": 2}
        padded = np.pad(centered, ((0, 0), (0, 0), (1, 0), (0, 1)))
        total = np.zeros((3, 6, 4, 2), np.int64)
        for n in range(6):
            window = weight[n].reshape(2, 3, 3)
            for i in range(4):
                for j in range(2):
                    rows = padded[:, n // 3 * 2 : n // 3 * 2 + 2, i : i + 3, 2 * j : 2 * j + 3]
                    total[:, n, i, j] = (rows * window).sum((1, 2, 3))
    else:
        total = centered.reshape(3, -1) @ weight.T
    residual = integers(*total.shape[1:])
    channels = (-1, *[1] * (total.ndim - 2))
    y = total.astype(F32) * scale.numpy().reshape(channels)
    assert y.dtype == F32
    tensors = {"codes": pack_codes(codes, 5), "integers": table, "scale": scale}
    # What the sums of stored numbers have beyond those of centered ones.
    beyond = (zero * weight.sum(1)).reshape(channels)
    s = scale.double().numpy().reshape(channels) / unit(OUT)
    b = bias.double().numpy().reshape(channels) / unit(OUT) + OUT[2]
    in_bytes = folded(total + beyond, s, OUT[2] - s * beyond)
    compare(Node(op, ("x",), "y", attributes, tensors), [x], [IN], kind, y, in_bytes)
    y = y + bias.numpy().reshape(channels)
    tensors["bias"] = bias
    in_bytes = folded(total + beyond, s, b - s * beyond, low=OUT[2])
    compare(Node(op, ("x",), "y", attributes, tensors, RELU), [x], [IN], kind, np.maximum(y, F32(0)), in_bytes)
    dense = {"weight": torch.from_numpy(weight.astype(np.int8)), "scale": scale, "bias": bias}
    y = np.maximum(y + real(residual, IN2), F32(0))
    ratio = unit(IN2) / unit(OUT)
    in_bytes = folded(total + beyond, s, (b - s * beyond) - ratio * IN2[2], residual, ratio, low=OUT[2])
    compare(Node(op, ("x", "r"), "y", attributes, dense, RELU), [x, residual], [IN, IN2], kind, y, in_bytes)


@pytest.mark.parametrize("kind", (OUT, FLOAT), ids=("uint8", "float32"))
def test_elementwise_of_integers(kind: Any) -> None:
    a, b, f = integers(4, 5, 6), integers(4, 1, 1), np.random.default_rng(3).normal(size=(3, 4, 5, 6)).astype(F32)
    x, y = real(a, IN), real(b, IN2)
    of_a, of_b = unit(IN) / unit(OUT), unit(IN2) / unit(OUT)
    in_bytes = folded(a, of_a, (OUT[2] - of_a * IN[2]) - of_b * IN2[2], b, of_b)
    compare(Node("add", ("a", "b"), "y"), [a, b], [IN, IN2], kind, x + y, in_bytes)
    in_bytes = folded(a, of_a, (OUT[2] - of_a * IN[2]) + of_b * IN2[2], b, -of_b)
    compare(Node("sub", ("a", "b"), "y"), [a, b], [IN, IN2], kind, x - y, in_bytes)
    compare(Node("mul", ("a", "b"), "y", activation=RELU), [a, b], [IN, IN2], kind, np.maximum(x * y, F32(0)))
    compare(Node("add", ("a", "b"), "y"), [f, a], [FLOAT, IN], kind, f + x)
    compare(Node("activation", ("a",), "y"), [a], [IN], kind, x, folded(a, of_a, OUT[2] - of_a * IN[2]))
    scale, shift = torch.randn(4), torch.randn(4)
    expected = x * scale.numpy().reshape(-1, 1, 1) + shift.numpy().reshape(-1, 1, 1)
    s = scale.double().numpy().reshape(-1, 1, 1) * unit(IN) / unit(OUT)
    in_bytes = folded(a, s, shift.double().numpy().reshape(-1, 1, 1) / unit(OUT) + OUT[2] - s * IN[2])
    compare(Node("affine", ("a",), "y", {}, {"scale": scale, "shift": shift}), [a], [IN], kind, expected, in_bytes)


def test_storing_rounds_ties_to_even_and_clamps() -> None:
    kind = ("uint8", 0.5, 128)
    y = np.array([[0.25, 0.75, -0.25, 1e9, -1e9, np.inf, -np.inf, 63.5]], F32)
    graph = graph_of(Node("activation", ("x",), "y"), [(8,)], [FLOAT], kind)
    assert run(graph, (torch.from_numpy(y),))[0].tolist() == [[128, 130, 128, 255, 0, 255, 0, 255]]


@pytest.mark.parametrize("kind", (OUT, FLOAT), ids=("uint8", "float32"))
@pytest.mark.parametrize(("count_pad", "divisor"), ((0, 0), (1, 0), (1, 7)))
def test_averages_of_integers(count_pad: int, divisor: int, kind: Any) -> None:
    x = integers(4, 6, 5)
    centered = x.astype(np.int64) - IN[2]
    # A kernel of 3 x 2, strides 2 x 3, padding 1 x 1: where each window begins and ends, padding counted.
    rows, columns = [(-1, 2), (1, 4), (3, 6), (5, 7)], [(-1, 1), (2, 4)]
    expected = np.zeros((3, 4, len(rows), len(columns)), F32)
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            window = centered[:, :, max(top, 0) : bottom, max(left, 0) : right]
            counted = (bottom - top) * (right - left) if count_pad else window.shape[2] * window.shape[3]
            expected[:, :, i, j] = window.sum((2, 3)).astype(F32) * F32(IN[1]) / F32(divisor or counted)
    attributes = {**SIZES, "ceil_mode": 1, "count_include_pad": count_pad, "divisor": divisor}
    compare(Node("avg_pool2d", ("x",), "y", attributes), [x], [IN], kind, expected)
    if not divisor:
        mean = centered.sum((2, 3), keepdims=True).astype(F32) * F32(IN[1]) / F32(30)
        compare(Node("adaptive_avg_pool2d", ("x",), "y", {"size": (1, 1)}), [x], [IN], kind, mean)
        whole = run_floats(Node("adaptive_avg_pool2d", ("x",), "y", {"size": (4, 3)}), torch.from_numpy(real(x, IN)))
        graph = graph_of(Node("adaptive_avg_pool2d", ("x",), "y", {"size": (4, 3)}), [(4, 6, 5)], [IN])
        torch.testing.assert_close(run(graph, [torch.from_numpy(x)])[0], whole, rtol=1e-6, atol=1e-6)


def test_moves_keep_integers() -> None:
    for node, expected, shapes in NODES:
        if node.op in ("max_pool2d", "cat", "slice", "reshape"):
            inputs = [torch.from_numpy(integers(*shape)) for shape in shapes]
            (found,) = run(graph_of(node, shapes, [IN] * len(inputs), IN), inputs)
            assert found.dtype == torch.uint8
            assert torch.equal(found.double(), expected(*(x.double() for x in inputs)))
    node = Node("pad", ("x",), "y", {"low": (0, 1, 0), "high": (1, 0, 2), "value": -1.0})
    (found,) = run(graph_of(node, [(2, 2, 2)], [IN], IN), [torch.full((1, 2, 2, 2), 9, dtype=torch.uint8)])
    assert found.shape == (1, 3, 3, 4)
    assert found.unique().tolist() == [9, 124] and int((found == 9).sum()) == 8


def test_softmax_of_integers_is_of_their_numbers() -> None:
    x = integers(9)
    graph = graph_of(Node("softmax", ("x",), "y"), [(9,)], [IN])
    expected = torch.from_numpy(real(x, IN)).double().softmax(1)
    torch.testing.assert_close(run(graph, [torch.from_numpy(x)])[0], expected, rtol=1e-6, atol=1e-7)


def test_a_float_product_is_stored_too() -> None:
    node = Node("linear", ("x",), "y", {}, {"weight": torch.eye(3)})
    graph = graph_of(node, [(3,)], [FLOAT], ("uint8", 0.5, 0))
    assert run(graph, [torch.tensor([[1.0, -1.0, 0.8]])])[0].tolist() == [[2, 0, 2]]
