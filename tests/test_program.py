"""Programs of the extension against the reference: drawn graphs, every plan, threads and instruction sets."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core.codes import pack_codes
from bqnn.engine.graph import NO_ACTIVATION, Activation, Graph, Node, Value
from bqnn.engine.program import Program
from bqnn.engine.reference import run
from tests.support.draw_graphs import draw_graph
from tests.support.helpers import digest, lower_isas, run_on_isa
from tests.support.programs import PLANS, SMOOTH, alone, check_near, check_quantized_nodes, of_batch

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")


@pytest.fixture(params=(1, 2, 3), ids="threads-{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("first", range(0, 240, 40))
def test_drawn_graphs(first: int, plan: str) -> None:
    for seed in range(first, first + 40):
        graph, inputs = draw_graph(seed)
        batch = (1, 2, 3, 7)[seed % 4]
        given = of_batch(inputs, batch)
        check_near(Program(graph, **PLANS[plan])(given), run(graph, given))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("first", range(0, 90, 30))
def test_quantized_nodes_have_the_bits_of_the_integer_model(first: int, plan: str) -> None:
    checked = 0
    for seed in range(first, first + 30):
        graph, inputs = draw_graph(seed, quantized=True)
        checked += check_quantized_nodes(graph, inputs, **PLANS[plan])
    assert checked > 60


@pytest.mark.parametrize("channels", (1, 5, 20, 37, 64))
@pytest.mark.parametrize("dtype", ("float32", "uint8"))
def test_elements_take_the_place_of_those_that_nobody_reads_any_more(channels: int, dtype: str) -> None:
    """Of channels that are no whole vectors each is computed once, and what is an output or read later stays."""
    generator = torch.Generator().manual_seed(channels)
    names = ("x", "a", "b", "c", "d", "e", "f")
    values = {name: Value(name, (channels, 3, 5), dtype if name in "bcd" else "float32") for name in names}
    values["gate"], values["g"] = Value("gate", (channels, 1, 1)), Value("g", (channels, 1, 1), dtype)
    affine = {"scale": torch.randn(channels, generator=generator), "shift": torch.randn(channels, generator=generator)}
    nodes = (
        Node("affine", ("x",), "a", {}, affine),
        Node("activation", ("gate",), "g"),
        Node("activation", ("a",), "b", activation=Activation("hardswish")),
        Node("mul", ("b", "g"), "c"),
        Node("add", ("c", "b"), "d", activation=Activation("clamp", -1.0, 2.0)),
        Node("sub", ("d", "a"), "e"),
        Node("activation", ("e",), "f", activation=Activation("clamp", -0.5, 0.5)),
    )
    graph = Graph(("x", "gate"), ("a", "f"), values, nodes)
    graph.check()
    given = torch.randn(4, channels, 3, 5, generator=generator), torch.rand(4, channels, 1, 1, generator=generator)
    expected = run(graph, given, torch.float32)
    for options in PLANS.values():
        for y, exact in zip(Program(graph, **options)(list(given)), expected):
            torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", (1, 16, 40, 100, 129))
@pytest.mark.parametrize("columns", (32, 96, 544, 41))
@pytest.mark.parametrize("largest", (None, 1, 13, 32, 64))
def test_fully_connected_layers(largest: int | None, columns: int, channels: int) -> None:
    """Of one image and of a few, with codes of every width, from panels that are kept and straight from the codes."""
    generator = torch.Generator().manual_seed(columns + channels)
    x = torch.rand(5, columns, generator=generator)
    for num_levels in (2, 3, 16):
        codes = torch.randint(num_levels, (channels, columns), dtype=torch.uint8, generator=generator)
        tensors = {"codes": pack_codes(codes, num_levels), "scale": torch.rand(channels, generator=generator)}
        values = {"x": Value("x", (columns,)), "y": Value("y", (channels,))}
        nodes = []
        if largest is None:
            tensors["levels"] = torch.randn(1, num_levels, generator=generator).sort().values
        else:
            integers = torch.randint(-largest, largest + 1, (1, num_levels), dtype=torch.int8, generator=generator)
            integers[0, 0] = largest
            tensors["integers"] = integers
            values["q"] = Value("q", (columns,), "uint8", float(torch.tensor(1 / 255)))
            nodes.append(Node("activation", ("x",), "q"))
        nodes.append(Node("linear", ("x" if largest is None else "q",), "y", {}, tensors))
        graph = Graph(("x",), ("y",), values, tuple(nodes))
        graph.check()
        expected = run(graph, (x,), torch.float64 if largest is None else torch.float32)[0]
        for options in PLANS.values():
            program = Program(graph, **options)
            whole, alone = program([x])[0], torch.cat([program([x[i : i + 1]])[0] for i in range(len(x))])
            assert torch.equal(whole, alone)
            if largest is None:
                check_near([whole], (expected,))
            else:
                assert torch.equal(whole, expected)


@pytest.mark.parametrize(
    ("residual", "activation"),
    ((None, "none"), (None, "clamp"), ("uint8", "none"), ("uint8", "clamp"), ("float32", "clamp")),
)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "dilation", "size"),
    (
        (1, 6, 5, 1, 1, (28, 28)),  # a few pixels of y are one
        (1, 3, 3, 1, 1, (9, 15)),
        (2, 5, 2, 1, 1, (7, 8)),
        (3, 16, 3, 1, 1, (12, 32)),  # short runs of K
        (3, 70, 7, 2, 1, (21, 19)),
        (6, 16, 5, 1, 1, (14, 14)),
        (16, 16, 3, 1, 1, (8, 32)),
        (36, 12, 3, 1, 1, (5, 18)),  # pixels that are longer than their channels
        (64, 64, 3, 1, 1, (8, 8)),  # tiles that go on from row to row
        (128, 40, 3, 2, 1, (9, 9)),
        (160, 33, 3, 1, 2, (6, 5)),
        (100, 24, 1, 1, 1, (7, 7)),
    ),
)
def test_convolutions_of_bytes(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    dilation: int,
    size: tuple[int, int],
    activation: str,
    residual: str | None,
) -> None:
    """The bits of the integer model, of one image and of a few, with what is added as bytes and as floats."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    padding = kernel // 2
    height, width = ((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size)
    codes = torch.randint(3, (outputs, inputs * kernel**2), dtype=torch.uint8, generator=generator)
    tensors = {
        "codes": pack_codes(codes, 3),
        "integers": torch.tensor([[-21, 3, 30]], dtype=torch.int8),
        "scale": (0.5 + torch.rand(outputs, generator=generator)) / (2000 * kernel * inputs**0.5),
        "bias": torch.randn(outputs, generator=generator),
    }
    shape = (outputs, height, width)
    values = {
        "x": Value("x", (inputs, *size)),
        "q": Value("q", (inputs, *size), "uint8", float(torch.tensor(1 / 200)), 3),
        "r": Value("r", shape),
        "added": Value("added", shape, "uint8", float(torch.tensor(1 / 90)), 100),
        "y": Value("y", shape, "uint8", float(torch.tensor(1 / 60)), 40),
        "z": Value("z", shape),
    }
    window = {
        "stride": (stride, stride),
        "padding": (padding,) * 4,
        "dilation": (dilation, dilation),
        "groups": 1,
        "kernel": (kernel, kernel),
    }
    read = {None: ("q",), "uint8": ("q", "added"), "float32": ("q", "r")}[residual]
    nodes = [Node("activation", ("x",), "q"), Node("activation", ("r",), "added")]
    act = NO_ACTIVATION if activation == "none" else Activation("clamp", -0.25, 2.0)
    nodes += [Node("conv2d", read, "y", window, tensors, act), Node("activation", ("y",), "z")]
    graph = Graph(("x", "r"), ("z",), values, tuple(nodes))
    graph.check()
    x = torch.rand(5, inputs, *size, generator=generator)
    r = torch.randn(5, *shape, generator=generator)
    expected = run(graph, (x, r), torch.float32)[0]
    assert len(expected.unique()) > 20
    for options in PLANS.values():
        program = Program(graph, **options)
        assert torch.equal(program([x, r])[0], expected)
        assert torch.equal(program([x[:1], r[:1]])[0], expected[:1])


def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    for seed in range(300, 330):
        graph, inputs = draw_graph(seed, quantized=seed % 2 == 0)
        program = Program(graph, **list(PLANS.values())[seed % len(PLANS)], cache=1 << (seed % 20))
        for batch in (1, 2, 5, 16):
            given = of_batch(inputs, batch)
            torch.set_num_threads(1)
            expected = program(given)
            torch.set_num_threads(threads)
            for _ in range(3):
                assert all(map(torch.equal, program(given), expected))


def test_a_batch_has_the_bits_of_its_images() -> None:
    for seed in range(340, 360):
        graph, inputs = draw_graph(seed)
        program = Program(graph)
        given = of_batch(inputs, 6)
        whole = program(given)
        for i in range(6):
            for y, one in zip(whole, program([x[i : i + 1] for x in given])):
                assert torch.equal(y[i : i + 1], one)


def test_an_empty_batch() -> None:
    graph, inputs = draw_graph(1)
    for y, name in zip(Program(graph)([x[:0] for x in inputs]), graph.outputs):
        assert y.shape == (0, *graph.values[name].shape)


def test_inputs_of_any_strides_and_of_bytes() -> None:
    for seed in range(360, 380):
        graph, inputs = draw_graph(seed)
        program = Program(graph)
        expected = program(list(inputs))
        strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
        last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
        for given in (strided, last, [x.flip(0) for x in inputs]):
            found = program(given)
            for y, z in zip(found, expected):
                assert torch.equal(y.flip(0) if given is not strided and given is not last else y, z)
        bytes_ = [(x * 20 + 100).clamp(0, 255).byte() for x in inputs]
        assert all(map(torch.equal, program(bytes_), program([x.float() for x in bytes_])))


@pytest.mark.parametrize("team", (0, 2**40))
def test_eight_callers_at_once_get_what_one_gets(team: int) -> None:
    graph, inputs = draw_graph(7, quantized=True)
    program = Program(graph, kept_panels=0, team=team)
    given = [of_batch(inputs, batch) for batch in range(1, 9)]
    expected = [program(x) for x in given]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            if not all(map(torch.equal, program(given[index]), expected[index])):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def outputs_of_quantized_graphs() -> str:
    """A checksum of what integers alone decide."""
    found: list[Tensor] = []
    for seed in range(40):
        graph, inputs = draw_graph(seed, quantized=True)
        values = run(graph, inputs, torch.float32, keep=True)
        for node in graph.nodes:
            dtypes = {graph.values[name].dtype for name in (*node.inputs, node.output)}
            if dtypes != {"uint8"} or node.activation.name in SMOOTH:
                continue
            single = alone(graph, node)
            read = [graph.values[name.removesuffix(".float32")] for name in single.inputs]
            found += Program(single)([(values[value.name].float() - value.zero) * value.scale for value in read])
    assert len(found) > 20
    return digest(found)


@pytest.mark.parametrize("isa", lower_isas())
def test_integers_are_equal_on_every_instruction_set(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_program", "outputs_of_quantized_graphs") == outputs_of_quantized_graphs()


def drawn_graphs() -> str:
    test_drawn_graphs(400, "made")
    return "near"


@pytest.mark.parametrize("isa", lower_isas())
def test_drawn_graphs_on_every_instruction_set(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_program", "drawn_graphs") == "near"


def test_times_name_the_nodes() -> None:
    graph, inputs = draw_graph(3)
    rows = Program(graph).instructions(list(inputs))
    assert {row.node for row in rows} - {-1} <= set(range(len(graph.nodes)))
    assert all(row.seconds >= 0 for row in rows) and any(row.products > 0 for row in rows)
