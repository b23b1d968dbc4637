"""Rows of bytes that a convolution finishes as it multiplies them, and the colors and paddings beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bqnn
from bqnn.core.codes import pack_codes
from bqnn.engine.graph import NO_ACTIVATION, Activation, Graph, Node, Value
from bqnn.engine.program import Program
from bqnn.engine.reference import run
from tests.support.helpers import digest, lower_isas, run_on_isa

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")

FUNCTIONS = (
    NO_ACTIVATION,
    Activation("clamp", 0.0, 6.0),
    Activation("clamp", 0.0, float("inf")),
    Activation("hardswish"),
)


def convolution(
    inputs: int, outputs: int, height: int, width: int, kernel: int, function: Activation, residual: bool
) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    """Bytes of floats, a convolution of them with a border where the kernel asks for one, and floats of its bytes."""
    generator = torch.Generator().manual_seed(1000 * outputs + width)
    integers = torch.randint(-8, 9, (1, 3), dtype=torch.int8, generator=generator)
    codes = torch.randint(3, (outputs, inputs * kernel * kernel), dtype=torch.uint8, generator=generator)
    scale = (0.5 + torch.rand(outputs, generator=generator)) / (inputs * kernel * kernel) ** 0.5
    weight = {"codes": pack_codes(codes, 3), "integers": integers, "scale": scale}
    weight["bias"] = torch.randn(outputs, generator=generator)
    window = {
        "stride": (1, 1),
        "padding": (kernel // 2,) * 4,
        "dilation": (1, 1),
        "groups": 1,
        "kernel": (kernel, kernel),
    }
    values = {"x": Value("x", (inputs, height, width)), "r": Value("r", (outputs, height, width))}
    values["q"] = replace(values["x"], name="q", dtype="uint8", scale=1 / 32, zero=120)
    values["s"] = replace(values["r"], name="s", dtype="uint8", scale=3 / 128, zero=130)
    values["y"] = replace(values["r"], name="y", dtype="uint8", scale=3 / 64, zero=40)
    values["z"] = replace(values["r"], name="z")
    ends = ("q", "s") if residual else ("q",)
    nodes = (
        Node("activation", ("x",), "q"),
        *((Node("activation", ("r",), "s"),) if residual else ()),
        Node("conv2d", ends, "y", window, weight, function),
        Node("activation", ("y",), "z"),
    )
    names = ("x", "r") if residual else ("x",)
    used = {name: value for name, value in values.items() if residual or name not in ("r", "s")}
    graph = Graph(names, ("z",), used, nodes)
    graph.check()
    given = tuple(torch.randn(3, *values[name].shape, generator=generator) for name in names)
    return graph, given


def check_rows(outputs: int) -> str:
    """A checksum of what convolutions of rows of every length gave, which is what the integer model gives."""
    found = []
    for width in (*range(1, 14), 31, 32, 33):
        for index, function in enumerate(FUNCTIONS):
            kernel, residual = (1, 3)[(width + index) % 2], index < 3 and width % 3 > 0
            graph, given = convolution((3, 16, 5)[width % 3], outputs, 1 + width % 4, width, kernel, function, residual)
            expected = run(graph, given, torch.float32)[0]
            for team in (0, 2**40):
                y = Program(graph, team=team)(given)[0]
                assert torch.equal(y, expected), (width, function, kernel, residual, team)
            found.append(expected)
    return digest(found)


@pytest.mark.parametrize("outputs", (1, 12, 16, 20, 32, 40, 64))
def test_rows_of_any_length_and_channels_have_the_bits_of_the_integer_model(outputs: int) -> None:
    check_rows(outputs)


@pytest.mark.parametrize("isa", lower_isas())
def test_rows_on_every_instruction_set(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_rows", "rows_of_20") == check_rows(20)


def rows_of_20() -> str:
    return check_rows(20)


@pytest.mark.parametrize("width", (1, 15, 16, 17, 48, 50))
@pytest.mark.parametrize("channels", (1, 2, 3, 4))
def test_images_of_a_few_channels_are_read_as_bytes(channels: int, width: int) -> None:
    values = {"x": Value("x", (channels, 3, width)), "y": Value("y", (channels, 3, width))}
    values["q"] = replace(values["x"], name="q", dtype="uint8", scale=0.5, zero=7)
    graph = Graph(("x",), ("y",), values, (Node("activation", ("x",), "q"), Node("activation", ("q",), "y")))
    x = torch.randn(2, channels, 3, width) * 60
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3).flip(3), x.expand(2, -1, -1, -1)):
        assert torch.equal(Program(graph)([given])[0], run(graph, (given,), torch.float32)[0])


@pytest.mark.parametrize("dtype", ("float32", "uint8"))
@pytest.mark.parametrize("low, high", [((8, 0, 0), (8, 0, 0)), ((0, 0, 0), (3, 0, 0)), ((5, 1, 0), (0, 0, 2))])
def test_padding_leaves_what_others_read(dtype: str, low: tuple[int, int, int], high: tuple[int, int, int]) -> None:
    """Of channels alone, its input lies between them from the beginning; with rows or columns it is copied there."""
    shape = (9, 4, 6)
    padded = tuple(n + a + b for n, a, b in zip(shape, low, high, strict=True))
    values = {"x": Value("x", (9, 8, 12))} | {name: Value(name, shape, dtype, 0.5, 3) for name in ("a", "b")}
    values["c"] = replace(values["x"], name="c", dtype=dtype, scale=0.5, zero=3)
    values["p"] = Value("p", padded, dtype, 0.5, 3)
    values |= {name: Value(name, size) for name, size in (("y", padded), ("z", shape))}
    if dtype == "float32":
        values = {name: replace(value, scale=1.0, zero=0) for name, value in values.items()}
    nodes = (
        Node("activation", ("x",), "c"),
        Node("slice", ("c",), "a", {"start": (0, 0, 0), "stop": (9, 8, 12), "step": (1, 2, 2)}),
        Node("pad", ("a",), "p", {"low": low, "high": high, "value": 0.0}),
        Node("activation", ("a",), "b", activation=Activation("clamp", 0.0, 5.0)),
        Node("activation", ("p",), "y"),
        Node("activation", ("b",), "z"),
    )
    graph = Graph(("x",), ("y", "z"), values, nodes)
    graph.check()
    x = torch.randn(5, 9, 8, 12) * 10
    for team in (0, 2**40):
        assert all(map(torch.equal, Program(graph, team=team)([x]), run(graph, (x,), torch.float32)))
