"""What programs of the extension refuse: inputs, limits, and graphs whose numbers would not fit 64 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.engine.graph import Graph, Node, Value
from bqnn.engine.program import Program, describe
from tests.support.draw_graphs import draw_graph
from tests.support.programs import check_near

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x[0], x[0]], r"inputs must be as many tensors as the program has, got 2"),
        (lambda x: [x[0].double()], r"inputs must be float32 or uint8 on the CPU"),
        (lambda x: [x[0][:, :-1]], r"inputs must be float32 or uint8 on the CPU of one batch, \[any"),
        (lambda x: [x[0][0]], r"inputs must be float32 or uint8"),
    ],
)
def test_inputs_that_do_not_fit(change: object, message: str) -> None:
    seed = next(seed for seed in range(99) if len(draw_graph(seed)[0].inputs) == 1)
    graph, inputs = draw_graph(seed)
    with pytest.raises(ValueError, match=message):
        Program(graph)(change(inputs))  # type: ignore[operator]


def test_descriptions_that_are_damaged_are_refused_or_run() -> None:
    """Whatever stands in a description, the extension reads and writes within the memory of its tensors."""
    generator = torch.Generator().manual_seed(0)
    refused = ran = 0
    for seed in range(150):
        graph, inputs = draw_graph(seed % 30, quantized=seed % 2 == 0)
        words, numbers, tensors = describe(graph)
        for _ in range(8):
            damaged = copy.copy(words)
            for _ in range(int(torch.randint(1, 3, (), generator=generator))):
                at = int(torch.randint(len(words), (), generator=generator))
                choices = (-1, 0, 1, 2, 3, 5, 255, 2**31, 2**62, -(2**63), damaged[at] + 1, damaged[at] - 1)
                damaged[at] = choices[int(torch.randint(len(choices), (), generator=generator))]
            try:
                handle = torch.ops.bqnn_cpu.engine_program(torch.tensor(damaged), torch.tensor(numbers), tensors)
            except ValueError:
                refused += 1
                continue
            try:
                torch.ops.bqnn_cpu.engine_run(handle, list(inputs))
                ran += 1
            except ValueError:
                refused += 1
            torch.ops.bqnn_cpu.engine_free(handle)
    assert refused > 100 and ran > 20


def test_a_program_that_is_gone() -> None:
    for call in (lambda: torch.ops.bqnn_cpu.engine_run(0, [torch.zeros(1)]), lambda: torch.ops.bqnn_cpu.engine_free(0)):
        with pytest.raises(ValueError, match="program must be what engine_program made, got 0"):
            call()


def shrunken(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes // 2)
    return x


def misaligned(x: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(x.nbytes + 1), dtype=x.dtype, offset=1).view(x.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda x: [], "tensors on the CPU, got none", id="none"),
        pytest.param(lambda x: [x.to("meta")], "tensors on the CPU, got others", id="meta"),
        pytest.param(lambda x: [shrunken(x)], "within its storage", id="shrunken"),
        pytest.param(lambda x: [misaligned(x)], "aligned to its elements of 4 bytes", id="misaligned"),
        pytest.param(lambda x: [x[:1].expand(2**45, -1, -1, -1)], "a batch that memory holds", id="huge"),
    ],
)
def test_inputs_whose_memory_does_not_fit(change: Callable[[Tensor], list[Tensor]], message: str) -> None:
    values = {name: Value(name, (2, 3, 4)) for name in ("x", "y")}
    program = Program(Graph(("x",), ("y",), values, (Node("activation", ("x",), "y"),)))
    with pytest.raises(ValueError, match=f"inputs must be {message}"):
        program(change(torch.zeros(2, 2, 3, 4)))


@pytest.mark.parametrize("name", ("cache", "kept_panels", "wide_layer", "team"))
def test_limits_are_any_numbers_from_0_on(name: str) -> None:
    graph, inputs = draw_graph(3)
    expected = Program(graph)(inputs)
    for limit in (0, 2**63 - 1):
        check_near(Program(graph, **{name: limit})(inputs), tuple(y.double() for y in expected))
    for limit in (-1, -(2**63)):
        with pytest.raises(ValueError, match=f"{name} must be a number of .*, got {limit}"):
            Program(graph, **{name: limit})


def test_a_convolution_whose_border_is_huge_is_refused() -> None:
    size, reach = (1, 2**31 - 1, 500), 2**20 - 1
    sizes = {"kernel": (1, 1), "stride": (reach, reach), "padding": (reach,) * 4, "dilation": (1, 1), "groups": 1}
    values = {"x": Value("x", size), "y": Value("y", (1, *((each + 2 * reach - 1) // reach + 1 for each in size[1:])))}
    node = Node("conv2d", ("x",), "y", sizes, {"weight": torch.ones(1, 1)})
    with pytest.raises(ValueError, match="words must be those of a sound graph, got .* an image must take less than"):
        Program(Graph(("x",), ("y",), values, (node,)))


def test_values_that_are_huge_together_are_refused() -> None:
    names = [f"y{i}" for i in range(6)]
    values = {name: Value(name, (1, 2**20, 2**19)) for name in ("x", *names)}
    nodes = tuple(Node("activation", ("x",), name) for name in names)
    Program(Graph(("x",), ("y0",), {name: values[name] for name in ("x", "y0")}, nodes[:1]))
    values = {name: Value(name, (1, 2**20, 2**20)) for name in values}
    with pytest.raises(ValueError, match="an image must take less than"):
        Program(Graph(("x",), tuple(names), values, nodes))


def test_a_mean_of_bytes_is_not_taken_over_more_than_32_bits_hold() -> None:
    for height, fits in ((2**11, True), (2**12, False)):
        values = {name: Value(name, (1, height, 2**12)) for name in "xq"}
        values["q"] = Value("q", (1, height, 2**12), "uint8", 1.0)
        values["y"] = Value("y", (1, 1, 1))
        mean = Node("adaptive_avg_pool2d", ("q",), "y", {"size": (1, 1)})
        graph = Graph(("x",), ("y",), values, (Node("activation", ("x",), "q"), mean))
        if fits:
            assert Program(graph)([torch.full((1, 1, height, 2**12), 255.0)])[0].item() == 255.0
            continue
        with pytest.raises(ValueError, match="must have sums that fit 32 bits"):
            Program(graph)
