"""packed_conv2d, M = 3, against PyTorch on layers of image networks: wide ones and ones with few output channels.

Each is given what its rival gets: float32, contiguous or channels-last, against torch fp32, of which the faster counts;
bfloat16, channels-last, against torch bf16. The names of variants end with what the input is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.packed import PRECISIONS, Expected, Weight, check_rival, random_weight
from bench.summary import Medians, Verdict, fastest, times_faster
from bqnn import PackedConv2d
from bqnn.ops.packed_conv2d import packed_conv2d

NUM_LEVELS = 3


class ConvShape(NamedTuple):
    """A square image and a square kernel, stride 1."""

    inputs: int
    outputs: int
    kernel: int
    size: int
    padding: int

    @property
    def id(self) -> str:
        return f"{self.inputs}-{self.outputs}-k{self.kernel}-{self.size}x{self.size}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.outputs, self.inputs, self.kernel, self.kernel

    @property
    def positions(self) -> int:
        """Of one image's output."""
        return (self.size + 2 * self.padding - self.kernel + 1) ** 2


WIDE = (ConvShape(128, 128, 3, 32, 1), ConvShape(256, 512, 3, 8, 1))
NARROW = (ConvShape(160, 12, 3, 32, 1), ConvShape(16, 16, 3, 32, 1), ConvShape(6, 16, 5, 14, 0))
BATCHES = (1, 32, 256)
BUDGET = 3.0

ASKED_FP32 = 1.0
"""How many times faster than torch fp32 "fp32" shall be, at every batch."""
ASKED_BEST = {**dict.fromkeys(WIDE, 5.0), **dict.fromkeys(NARROW, 3.0)}
"""How many times faster than torch fp32 the better of "bf16" and "int8" shall be, at every batch."""
ASKED_BEST_OVER_BF16 = 1.3
"""How many times faster than torch bf16 the better of "bf16" and "int8" shall be, at every batch."""

BASELINES = ("torch fp32 nchw", "torch fp32 nhwc")
TORCH_BF16 = "torch bf16 bf16-nhwc"
RIVALS = [*BASELINES, TORCH_BF16]


def ours(precisions: tuple[str, ...], *inputs: str) -> list[str]:
    return [f"{precision} packed {given}" for given in inputs for precision in precisions]


OURS = ours(PRECISIONS, "nchw", "nhwc") + ours(PRECISIONS[1:], "bf16-nhwc")
OURS += [f"{precision} auto nchw" for precision in PRECISIONS]


def group_name(shape: ConvShape, batch: int) -> str:
    return f"packed_conv2d {shape.id}, batch {batch}"


@lru_cache(maxsize=1)
def weight(shape: ConvShape) -> Weight:
    return random_weight(shape.weight_shape, NUM_LEVELS)


@lru_cache(maxsize=1)
def plain(shape: ConvShape) -> nn.Conv2d:
    """nn.Conv2d with the decoded weight."""
    layer = nn.Conv2d(shape.inputs, shape.outputs, shape.kernel, padding=shape.padding)
    layer.load_state_dict({"weight": weight(shape).dense, "bias": weight(shape).bias})
    return layer.eval()


class Conv2dGroup:
    """One layer at one batch."""

    def __init__(self, shape: ConvShape, batch: int) -> None:
        self.name = group_name(shape, batch)
        self.budget = BUDGET
        self._shape, self._batch = shape, batch
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, shape.inputs, shape.size, shape.size, generator=generator)
        nhwc = x.contiguous(memory_format=torch.channels_last)
        self._inputs = {"nchw": x, "nhwc": nhwc, "bf16-nhwc": nhwc.bfloat16()}
        exact = self._expect(x)
        self._expected = {"nchw": exact, "nhwc": exact, "bf16-nhwc": self._expect(self._inputs["bf16-nhwc"])}

    def call(self, variant: str) -> Callable[[], Tensor]:
        precision, execution, given = variant.split()
        x = self._inputs[given]
        layer: nn.Module
        if precision == "torch":
            layer = copy.deepcopy(plain(self._shape)).to(x.dtype)
            if given != "nchw":
                layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            codes, levels, bias, _ = weight(self._shape)
            options = {"padding": self._shape.padding, "precision": precision, "execution": execution}
            layer = PackedConv2d(self._shape.inputs, self._shape.kernel, codes, levels, bias, **options)
        return lambda: layer(x)

    def check(self, variant: str, output: Tensor) -> dict[str, Any]:
        precision, execution, given = variant.split()
        if precision == "torch":
            return check_rival(variant, output, self._expected[given].exact, 1e-2 if execution == "bf16" else 1e-5)
        return {
            **self._expected[given].check(output, precision, execution),
            "packed_bytes": weight(self._shape).packed_bytes,
            "operations": 2 * self._batch * self._shape.positions * weight(self._shape).dense.numel(),
            "precision": precision,
        }

    def _expect(self, x: Tensor) -> Expected:
        packed, padding, kernel = weight(self._shape), self._shape.padding, self._shape.kernel

        def reference(x: Tensor) -> Tensor:
            options = {"padding": padding, "precision": "int8", "backend": "reference"}
            return packed_conv2d(x, packed.codes, packed.levels, packed.bias, kernel, **options)

        def product(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
            return F.conv2d(x, dense, bias, padding=padding)

        return Expected(product, reference, x, packed)


CASES = [
    pytest.param(shape, batch, variant, id=f"{shape.id}-B{batch}-{variant}")
    for shape in WIDE + NARROW
    for batch in BATCHES
    for variant in RIVALS + OURS
]


@pytest.mark.parametrize("shape, batch, variant", CASES)
def test_packed_conv2d(race: Any, shape: ConvShape, batch: int, variant: str) -> None:
    race(Conv2dGroup)


def claims(medians: Medians) -> Iterator[Verdict]:
    """The figures asked for, and what was measured, with the variant that counted."""
    for shape, least in ASKED_BEST.items():
        for batch in BATCHES:
            group = group_name(shape, batch)
            floats, half = ours(PRECISIONS[1:], "nchw", "nhwc"), ours(PRECISIONS[1:], "bf16-nhwc")
            for text, asked, mine, theirs in (
                ("torch fp32", ASKED_FP32, ours(("fp32",), "nchw", "nhwc"), BASELINES),
                ("torch fp32", least, floats, BASELINES),
                ("torch bf16", ASKED_BEST_OVER_BF16, half, (TORCH_BF16,)),
                ("torch bf16", ASKED_BEST_OVER_BF16, floats, (TORCH_BF16,)),
            ):
                measured = times_faster(medians.get(group, {}), mine, theirs)
                if measured is not None:
                    yield Verdict(f"{group}: {fastest(medians[group], mine)} over {text}", asked, measured)
