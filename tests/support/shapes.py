"""The sizes that tests and benches share: odd ones, so that no tile or vector divides them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels are interpreted: a step of one then takes milliseconds."""

EVERY_M = [pytest.param(m, id=f"M{m}") for m in range(2, 17)]
SOME_M = [pytest.param(m, id=f"M{m}") for m in (2, 3, 5, 16)]
GRANULARITIES = ("tensor", "channel")


class LinearShape(NamedTuple):
    """x [batch, columns] and weight [channels, columns]."""

    batch: int
    channels: int
    columns: int

    @property
    def id(self) -> str:
        return f"B{self.batch}-N{self.channels}-K{self.columns}"


class Conv2dShape(NamedTuple):
    """x [batch, inputs, height, width] and weight [channels, inputs / groups, *kernel]."""

    batch: int
    inputs: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def id(self) -> str:
        size = f"B{self.batch}-C{self.inputs}-N{self.channels}-{self.height}x{self.width}"
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        return "-".join([size, *(f"{name}{a}{b}" for name, (a, b) in zip("kspd", pairs)), f"g{self.groups}"])

    @property
    def geometry(self) -> dict[str, Any]:
        """The keyword arguments of the op."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


LINEAR_SHAPES = [
    LinearShape(1, 1, 1),
    LinearShape(63, 7, 129),
    LinearShape(5, 33, 101) if INTERPRETED else LinearShape(5, 129, 341),
    LinearShape(1, 101, 31) if INTERPRETED else LinearShape(1, 341, 63),
    LinearShape(2, 3, 231) if INTERPRETED else LinearShape(2, 3, 4231),
]
CONV2D_SHAPES = [
    Conv2dShape(1, 1, 1, 1, 1, (1, 1)),
    Conv2dShape(2, 3, 63, 9, 11, (3, 3), padding=(1, 1)),
    Conv2dShape(3, 6, 9, 13, 7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=3),
    Conv2dShape(1, 5, 5, 8, 8, (3, 3), padding=(1, 1), groups=5),
    Conv2dShape(1, 7, 129, 6, 5, (5, 1), stride=(1, 3), padding=(2, 4), dilation=(2, 1)),
]
# Between them they take every way through an implicit product: few channels on either side, groups, strides that leave
# pixels without a tap or share a divisor with the dilation, a linear layer of the pixels.
GATHERED_CONV2D = [
    pytest.param(shape, id=shape.id)
    for shape in (
        Conv2dShape(2, 20, 18, 5, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        Conv2dShape(1, 6, 34, 6, 5, (3, 3), padding=(1, 1), groups=2),
        Conv2dShape(2, 33, 3, 6, 5, (3, 3), padding=(1, 1), dilation=(1, 2)),
        Conv2dShape(1, 40, 32, 5, 4, (3, 3), padding=(1, 1), groups=2),
        Conv2dShape(2, 17, 5, 7, 8, (1, 2), stride=(3, 2)),
        Conv2dShape(1, 4, 7, 11, 9, (2, 3), stride=(2, 4), padding=(3, 1), dilation=(4, 2)),
        Conv2dShape(2, 5, 7, 3, 4, (1, 1)),
    )
]
SMALL_LINEAR = LinearShape(3, 7, 13)
SMALL_CONV2D = Conv2dShape(2, 4, 6, 5, 7, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)


def _grid(shapes: Sequence[LinearShape | Conv2dShape], small: LinearShape | Conv2dShape) -> list[Any]:
    """Every shape with few and many levels, and every number of levels on a small shape: (shape, num_levels)."""
    pairs = [(shape, m) for shape in shapes for m in ((3,) if INTERPRETED else (2, 3, 16))]
    pairs += [(small, m) for m in range(2, 17)]
    return [pytest.param(shape, m, id=f"M{m}-{shape.id}") for shape, m in pairs]


LINEAR_GRID = _grid(LINEAR_SHAPES, SMALL_LINEAR)
CONV2D_GRID = _grid(CONV2D_SHAPES, SMALL_CONV2D)
