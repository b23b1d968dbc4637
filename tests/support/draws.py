"""Calls that are drawn: random choices, what draws valid arguments of each kind, and what a contract is."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.codes import pack_codes
from bqnn.ops.backends.cpu_layout import make_layout

LARGE = 0.05  # the share of calls of more than a vector's, or a block's, numbers


class Draw(random.Random):
    """The random choices of one call, and the sizes that its arguments share."""

    def __init__(self, seed: str, odd: bool = False) -> None:
        """``odd``: one of the sizes is one that a weight, or a codebook, does not have."""
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(self.getrandbits(62))
        self.large = self.random() < LARGE
        self._sizes: dict[str, int] = {self.choice("NKM"): self.choice((0, 0, 1, 17, 64))} if odd else {}
        self.facts: dict[str, Any] = {}
        """What is known of the valid arguments, for the answer: the weight in a layout."""

    def size(self, name: str) -> int:
        """The size of this name, the same for every argument of the call: "N" channels, "K" columns, "M" levels, "M-1"
        thresholds, "G" codebooks (1 or N), and others."""
        if name == "M-1":
            return self.size("M") - 1
        if name not in self._sizes:
            self._sizes[name] = self._new_size(name)
        return self._sizes[name]

    def _new_size(self, name: str) -> int:
        if name == "M":
            return self.choice((2, 3, 3, 4, 5, 8, 16))
        if name == "G":
            return self.choice((1, self.size("N")))
        if name in ("N", "K"):
            return self.randint(33, 300 if name == "K" else 70) if self.large else self.randint(1, 20)
        return self.randint(1, 5)

    def shape(self, *names: str) -> list[int]:
        return [self.size(name) for name in names]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.torch, dtype=torch.int64)


Maker = Callable[[Draw], Any]


class Contract(NamedTuple):
    """What can be called, and with what."""

    run: Callable[..., Any]
    arguments: Mapping[str, Maker]
    """By name, in order, what draws a valid one."""
    answer: Callable[[Draw, dict[str, Any], set[str]], Any]
    """(draw, arguments as they were before the call, the names of the broken ones) -> what the call has to give, as in
    :mod:`tests.support.answers`."""
    ours: bool = True
    """Whether it is an op of the extension."""
    written: tuple[str, ...] = ()
    """The arguments that hold the outputs of an op that returns nothing."""
    unread: tuple[str, ...] = ()
    """Those of them that the op does not read."""
    kept: frozenset[str] = frozenset()
    """Arguments that go to torch as they are, and are always valid."""
    costly: Mapping[str, tuple[float, float]] = {}
    """Arguments of which large values, between these two, are right, and take long or much memory."""
    also_named: frozenset[str] = frozenset()
    """What an error may name beside the arguments: what they are made of."""
    ways: Mapping[str, Callable[[Draw, Any, bool], Any]] = {}
    """By name, what breaks a valid argument as nothing else is broken, mostly in place of the ways for all: of (draw,
    value, alone), as :func:`tests.support.breaks.broken`."""


# --- what draws valid arguments ---------------------------------------------------------------------------------------


def numbers(*names: str) -> Maker:
    return lambda draw: draw.normal(*draw.shape(*names))


def variances(*names: str) -> Maker:
    """Logarithms of variances."""
    return lambda draw: draw.uniform(*draw.shape(*names)) * 4.0 - 5.0


def levels(draw: Draw) -> Tensor:
    """Increasing, at least 0.1 apart: [G, M]."""
    if "levels" not in draw.facts:
        steps = 0.1 + 0.5 * draw.uniform(*draw.shape("G", "M"))
        draw.facts["levels"] = steps.cumsum(1) - 0.5 * steps.sum(1, keepdim=True)
    return draw.facts["levels"].clone()


def chances(draw: Draw) -> Tensor:
    """Rows that sum to 1: [M, M]."""
    return draw.normal(*draw.shape("M", "M")).softmax(1)


def thresholds(draw: Draw) -> Tensor:
    """[G, M - 1], between levels."""
    c = levels(draw)
    return (c[:, :-1] + (0.2 + 0.6 * draw.uniform(*draw.shape("G", "M-1"))) * (c[:, 1:] - c[:, :-1])).contiguous()


def widths(draw: Draw) -> Tensor:
    """Of the prior's windows, [G, M]."""
    return 0.05 + 0.2 * draw.uniform(*draw.shape("G", "M"))


def seed(draw: Draw) -> Tensor:
    return torch.tensor(draw.randrange(-(2**63), 2**63))


def call_number(draw: Draw) -> int:
    return draw.choice((0, 1, draw.randrange(2**20), draw.randrange(2**40)))


def empty(*names: str, dtype: torch.dtype = torch.float32) -> Maker:
    """An output that has NaN, or the largest integer, in it."""
    fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return lambda draw: torch.full(draw.shape(*names), fill, dtype=dtype)


def optional(maker: Maker) -> Maker:
    return lambda draw: None if draw.random() < 0.3 else maker(draw)


def flag(draw: Draw) -> bool:
    return draw.random() < 0.5


def outputs_of_a_layer(draw: Draw) -> Tensor:
    """Images in either memory format, or rows; float32 or bfloat16."""
    if "plane" not in draw.facts:
        sizes = [draw.randint(0, 3), draw.randint(1, 40), draw.randint(1, 9), draw.randint(1, 20)]
        draw.facts["plane"] = draw.choice((sizes, sizes[:2], [sizes[0] * 100]))
    tensor = draw.normal(*draw.facts["plane"])
    if tensor.dim() == 4 and flag(draw):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.bfloat16() if flag(draw) else tensor


def floats_or_bfloat16(*names: str) -> Maker:
    return lambda draw: draw.normal(*draw.shape(*names)).to(draw.choice((torch.float32, torch.bfloat16)))


def variance_of_a_layer(draw: Draw) -> Tensor:
    return outputs_of_a_layer(draw).abs() + 0.1


def words(draw: Draw) -> Tensor:
    return torch.full([4 * draw.randint(0, 40)], -1, dtype=torch.int32)


def codes_out(draw: Draw) -> Tensor:
    digits, values = 1, max(draw.size("M"), 2)
    while draw.facts.get("packed") and values ** (digits + 1) <= 256:
        digits += 1
    return torch.full([draw.size("N"), -(-draw.size("K") // digits)], 255, dtype=torch.uint8)


def packed_or_not(draw: Draw) -> bool:
    draw.facts["packed"] = flag(draw)
    return draw.facts["packed"]


def mean_out(draw: Draw) -> Tensor | None:
    return None if draw.facts["mode"] == 1 and flag(draw) else empty("N", "K")(draw)


def mode(draw: Draw) -> int:
    draw.facts["mode"] = draw.randrange(3)
    return draw.facts["mode"]


def raw_thresholds(draw: Draw) -> Tensor | None:
    draw.facts["learned"] = flag(draw)
    return draw.normal(*draw.shape("G", "M-1")) if draw.facts["learned"] else None


def grad_raw_thresholds(draw: Draw) -> Tensor:
    return torch.full(draw.shape("G", "M-1") if draw.facts["learned"] else [0], float("nan"))


# --- packed weights ---------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Of a packed layer that is drawn; a linear one has no kernel."""

    kernel: list[int]
    dilation: list[int]
    groups: int
    inputs: int  # of a group
    precision: str

    @property
    def columns(self) -> int:
        return self.inputs * (self.kernel[0] * self.kernel[1] if self.kernel else 1)


def geometry(draw: Draw, linear: bool | None = None) -> Geometry:
    if "geometry" not in draw.facts:
        precision = draw.choice(("fp32", "fp32", "bf16", "int8"))
        if linear or (linear is None and flag(draw)):
            found = Geometry([], [1, 1], 1, draw.size("K"), precision)
        else:
            groups = draw.choice([each for each in (1, 1, 2, draw.size("N")) if draw.size("N") % each == 0])
            inputs = draw.randint(17, 40) if draw.large else draw.randint(1, 5)
            kernel, dilation = ([draw.choice((1, 2, 3)) for _ in range(2)] for _ in range(2))
            found = Geometry(kernel, dilation, groups, inputs, precision)
        draw.facts["geometry"] = found
    return draw.facts["geometry"]


def codes(draw: Draw) -> Tensor:
    """Packed, [N, bytes]."""
    unpacked = draw.integers(draw.size("M"), draw.size("N"), geometry(draw).columns).to(torch.uint8)
    draw.facts["codes"] = pack_codes(unpacked, draw.size("M"))
    return draw.facts["codes"].clone()


def int8_levels(draw: Draw) -> Tensor:
    return (draw.integers(255, *draw.shape("G", "M")) - 127).to(torch.int8)


def layout(linear: bool) -> Maker:
    def draw_layout(draw: Draw) -> Tensor:
        own = geometry(draw, linear)
        stored = codes(draw), levels(draw)
        return make_layout(*stored, own.columns, own.precision, own.kernel, own.dilation[1], own.groups)

    return draw_layout


def rows(draw: Draw) -> Tensor:
    own = geometry(draw, True)
    leading = draw.choice(([], [1], [draw.randint(0, 9)], [40], [2, 3]))
    return draw.normal(*leading, own.columns).to(draw.choice((torch.float32, torch.bfloat16)))


def images(draw: Draw) -> Tensor:
    own = geometry(draw, False)
    reach = [d * (k - 1) + 1 for d, k in zip(own.dilation, own.kernel)]
    sizes = [draw.randint(0, 3), own.inputs * own.groups, *(each + draw.randint(0, 9) for each in reach)]
    tensor = draw.normal(*sizes).to(draw.choice((torch.float32, torch.bfloat16)))
    return tensor.contiguous(memory_format=torch.channels_last) if flag(draw) else tensor


def strides(draw: Draw) -> list[int]:
    return [draw.choice((1, 1, 2, 3)) for _ in range(2)]


def paddings(draw: Draw) -> list[int]:
    return [draw.choice((0, 0, 1, 2)) for _ in range(2)]


def dilations(draw: Draw) -> list[int]:
    return list(geometry(draw, False).dilation)


def nothing(draw: Draw) -> None:
    return None
