"""Minimal filtering of convolutions of bytes: the very sums of the integer model, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core.codes import pack_codes
from bqnn.engine.graph import NO_ACTIVATION, Graph, Node, Value
from bqnn.engine.program import Program
from bqnn.engine.reference import run
from tests.support.helpers import digest, lower_isas, run_on_isa
from tests.support.programs import PLANS

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")


def convolution(x: str, y: str, padding: tuple[int, int, int, int], groups: int, weight: dict[str, Tensor]) -> Node:
    window = {"stride": (1, 1), "padding": padding, "dilation": (1, 1), "groups": groups, "kernel": (3, 3)}
    return Node("conv2d", (x,), y, window, weight, NO_ACTIVATION)


def coded(codes: Tensor, integers: Tensor) -> dict[str, Tensor]:
    """A weight whose sums are the outputs."""
    return {"codes": pack_codes(codes, integers.shape[1]), "integers": integers, "scale": torch.ones(len(codes))}


def drawn(seed: int) -> tuple[Graph, tuple[Tensor, Tensor]]:
    """Two convolutions: of values a, and of values that lie between others' channels, as cat puts them."""
    generator = torch.Generator().manual_seed(seed)

    def below(*ends: int) -> list[int]:
        return [int(torch.randint(end, (), generator=generator)) for end in ends]

    groups, num_levels, zero = below(2, 15, 4)
    groups, num_levels, zero = groups + 1, num_levels + 2, (0, 7, 128, 255)[zero]
    channels = [groups * (32 + 4 * n) for n in below(20, 8)]
    height, width = (n + 5 for n in below(13, 13))
    padding = tuple(below(3, 3, 3, 3))
    sides = height + padding[0] + padding[1] - 2, width + padding[2] + padding[3] - 2
    values = {name: Value(name, (c, height, width)) for name, c in zip("ab", channels)}
    nodes = []
    for name, c in zip(("p", "q", "pq"), (*channels, sum(channels))):
        values[name] = Value(name, (c, height, width), "uint8", 1.0, zero)
        inputs = ("p", "q") if name == "pq" else ("a" if name == "p" else "b",)
        nodes.append(Node("cat" if name == "pq" else "activation", inputs, name))
    for x, y in (("q", "y"), ("pq", "z")):
        outputs = groups * (below(60)[0] + 8)
        columns = 9 * values[x].shape[0] // groups
        codes = torch.randint(num_levels, (outputs, columns), dtype=torch.uint8, generator=generator)
        books = (1, outputs)[below(2)[0]]
        integers = torch.randint(-64, 65, (books, num_levels), dtype=torch.int8, generator=generator)
        values[y] = Value(y, (outputs, *sides))
        nodes.append(convolution(x, y, padding, groups, coded(codes, integers)))
    graph = Graph(("a", "b"), ("y", "z"), values, tuple(nodes))
    graph.check()
    images = below(4)[0] + 1
    a, b = (torch.randint(256, (images, c, height, width), generator=generator).float() - zero for c in channels)
    return graph, (a, b)


def filtered(program: Program, inputs: tuple[Tensor, ...]) -> int:
    return sum("Winograd" in row.kernel for row in program.instructions(list(inputs)))


def check_drawn(first: int, count: int) -> tuple[int, str]:
    """How many convolutions of bytes were filtered, and a checksum of what all gave."""
    chosen, found = 0, []
    for seed in range(first, first + count):
        graph, inputs = drawn(seed)
        program = Program(graph, **list(PLANS.values())[seed % len(PLANS)])
        outputs = program(inputs)
        assert all(map(torch.equal, outputs, run(graph, inputs, torch.float32))), seed
        chosen += filtered(program, inputs)
        found += outputs
    return chosen, digest(found)


def outputs_of_drawn() -> str:
    chosen, checksum = check_drawn(0, 20)
    assert chosen > 10
    return checksum


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_sums_are_those_of_the_integer_model(first: int) -> None:
    chosen, _ = check_drawn(first, 20)
    assert chosen > 10 or bqnn.cpu_isa() == "amx"  # where tiles multiply bytes they take less time


@pytest.mark.parametrize("isa", lower_isas())
def test_every_instruction_set_has_the_same_sums(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_winograd", "outputs_of_drawn") == check_drawn(0, 20)[1]


@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize(("inputs", "fits"), ((228, True), (232, False)))
def test_sums_of_26_bits_are_exact_and_larger_ones_are_not_filtered(inputs: int, fits: bool, sign: int) -> None:
    """All weights 64 and all inputs 255: the largest sum of 228 channels is just below 2^25."""
    codes = torch.zeros(16, 9 * inputs, dtype=torch.uint8)
    values = {
        "x": Value("x", (inputs, 16, 16)),
        "q": Value("q", (inputs, 16, 16), "uint8", 1.0, 0),
        "y": Value("y", (16, 16, 16)),
    }
    weight = coded(codes, torch.tensor([[64 * sign, 0]], dtype=torch.int8))
    graph = Graph(
        ("x",), ("y",), values, (Node("activation", ("x",), "q"), convolution("q", "y", (1, 1, 1, 1), 1, weight))
    )
    x = torch.full((2, inputs, 16, 16), 255.0)
    program = Program(graph)
    assert torch.equal(program([x])[0], run(graph, (x,), torch.float32)[0])
    assert bqnn.cpu_isa() == "amx" or filtered(program, (x,)) == fits


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "padding"),
    ((16, 16, (12, 12), (1, 1, 1, 1)), (33, 70, (9, 17), (0, 2, 1, 0)), (64, 24, (16, 7), (2, 0, 0, 2))),
)
def test_floats_are_as_near_as_plain_sums(
    inputs: int, outputs: int, size: tuple[int, int], padding: tuple[int, int, int, int], groups: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    inputs, outputs = inputs * groups, outputs * groups
    sides = tuple(n + sum(padding[i : i + 2]) - 2 for n, i in zip(size, (0, 2)))
    values = {"x": Value("x", (inputs, *size)), "y": Value("y", (outputs, *sides))}
    weight = {"weight": torch.randn(outputs, 9 * inputs // groups, generator=generator)}
    graph = Graph(("x",), ("y",), values, (convolution("x", "y", padding, groups, weight),))
    graph.check()
    x = torch.randn(5, inputs, *size, generator=generator)
    program = Program(graph)
    y, expected = program([x])[0], run(graph, (x,))[0]
    assert filtered(program, (x,)) == 1
    assert (y.double() - expected).norm() < 5e-7 * expected.norm()
    assert torch.equal(program([x[3:4]])[0], y[3:4]), "the choice is not by the number of images"
