"""packed_linear, M = 3 and 16, against PyTorch and ONNX Runtime on two shapes of claim.

A large layer against everything that runs few-bit weights on a CPU, and odd shapes against torch fp32 alone: a packed
layer is never slower. Each variant is timed as users have it, a module under inference_mode; only the two int4 and
int2 rivals, which have no module, are called directly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rivals
from bench.packed import PRECISIONS, Expected, Weight, check_rival, random_weight
from bench.summary import Medians, Verdict, times_faster
from bqnn import PackedLinear
from bqnn.ops.packed_linear import packed_linear

LARGE, LARGE_BATCHES = (4096, 4096), (1, 8, 64, 512)
ODD = ((1000, 1001), (120, 400), (10, 84), (11008, 4096))
"""(outputs, inputs): two layers are of LeNet-5, and one is of a language model."""
ODD_BATCHES = (1, 3, 8, 33, 128, 1024)
BUDGET = {LARGE: 6.0}
ODD_BUDGET = 2.0

ASKED = {
    "fp32": dict(zip(LARGE_BATCHES, (10.0, 4.0, 1.0, 1.0))),
    "bf16": dict(zip(LARGE_BATCHES, (10.0, 10.0, 7.0, 8.0))),
    "int8": dict(zip(LARGE_BATCHES, (14.0, 15.0, 10.0, 12.0))),
}
"""How many times faster than torch fp32 the large layer shall be at M = 3, by batch."""
ASKED_OVER_RIVALS = 1.5
"""How many times faster than the best rival the best precision shall be at M = 3, at every batch."""
ASKED_AT_M16 = 0.6
"""The share of all these that is asked at M = 16."""
ASKED_ODD = 1.0
"""How many times faster than torch fp32 the other layers shall be."""

BASELINES = ("torch fp32",)


def ours(levels: int, executions: tuple[str, ...], precisions: tuple[str, ...] = PRECISIONS) -> list[str]:
    return [f"M{levels} {precision} {execution}" for execution in executions for precision in precisions]


OURS = ours(3, ("packed", "auto"))
OURS_LARGE = OURS + ours(16, ("packed", "auto"))
RIVALS = ["torch fp32", "torch fp32 compiled", "torch bf16", "torch dynamic int8", "aten int4"]
RIVALS += [f"ORT int{bits} level {level}" for bits in (4, 2) for level in (0, 4)]


def group_name(shape: tuple[int, int], batch: int) -> str:
    return f"packed_linear {shape[0]}x{shape[1]}, batch {batch}"


@lru_cache(maxsize=2)
def weight(shape: tuple[int, int], num_levels: int) -> Weight:
    return random_weight(shape, num_levels)


@lru_cache(maxsize=1)
def plain(shape: tuple[int, int]) -> nn.Linear:
    """nn.Linear with the weight of M = 3, decoded."""
    layer = nn.Linear(shape[1], shape[0])
    layer.load_state_dict({"weight": weight(shape, 3).dense, "bias": weight(shape, 3).bias})
    return layer.eval()


class LinearGroup:
    """One shape (outputs, inputs) at one batch."""

    def __init__(self, shape: tuple[int, int], batch: int) -> None:
        self.name = group_name(shape, batch)
        self.budget = BUDGET.get(shape, ODD_BUDGET)
        self._shape, self._batch = shape, batch
        self._x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch))
        self._expected = {m: self._expect(weight(shape, m)) for m in ((3, 16) if shape == LARGE else (3,))}
        self._rival_expects: Tensor | None = None

    def call(self, variant: str) -> Callable[[], Tensor]:
        if variant in OURS_LARGE:
            num_levels, precision, execution = variant.split()
            codes, levels, bias, _ = weight(self._shape, int(num_levels[1:]))
            layer = PackedLinear(self._shape[1], codes, levels, bias, precision, execution)
            return lambda: layer(self._x)
        if variant.startswith("torch"):
            net, x = torch_layer(variant, plain(self._shape)), self._x.bfloat16() if "bf16" in variant else self._x
            return lambda: net(x)
        if variant == "aten int4":
            call, self._rival_expects = rivals.aten_int4(self._x, self._shape[0])
        else:
            bits, level = int(variant.split()[1][-1]), int(variant.split()[-1])
            call, self._rival_expects = rivals.onnxruntime_bits(self._x, self._shape[0], bits, level)
        return call

    def check(self, variant: str, output: Tensor) -> dict[str, Any]:
        if variant in OURS_LARGE:
            num_levels, precision, execution = variant.split()
            found = self._expected[int(num_levels[1:])].check(output, precision, execution)
            packed_bytes = weight(self._shape, int(num_levels[1:])).packed_bytes
            operations = 2 * self._batch * self._shape[0] * self._shape[1]
            return {**found, "packed_bytes": packed_bytes, "operations": operations, "precision": precision}
        if variant.startswith("torch"):
            allowed = 5e-2 if "int8" in variant else 1e-2 if "bf16" in variant else 1e-5
            return check_rival(variant, output, self._expected[3].exact, allowed)
        assert self._rival_expects is not None
        return check_rival(variant, output, self._rival_expects, 5e-2)

    def _expect(self, weight: Weight) -> Expected:
        def reference(x: Tensor) -> Tensor:
            return packed_linear(x, weight.codes, weight.levels, weight.bias, "int8", backend="reference")

        return Expected(F.linear, reference, self._x, weight)


def torch_layer(variant: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """PyTorch's own ways to run ``layer``."""
    if variant == "torch bf16":
        return copy.deepcopy(layer).bfloat16()
    if variant == "torch fp32 compiled":
        torch._dynamo.reset()
        return torch.compile(layer, dynamic=False)
    if variant == "torch dynamic int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated; its kernels are what torch has
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)
    return layer


def cases(shapes: tuple[tuple[int, int], ...], batches: tuple[int, ...], variants: list[str]) -> list[Any]:
    return [
        pytest.param(shape, batch, variant, id=f"N{shape[0]}-K{shape[1]}-B{batch}-{variant}")
        for shape in shapes
        for batch in batches
        for variant in variants
    ]


CASES = cases((LARGE,), LARGE_BATCHES, RIVALS + OURS_LARGE) + cases(ODD, ODD_BATCHES, list(BASELINES) + OURS)


@pytest.mark.parametrize("shape, batch, variant", CASES)
def test_packed_linear(race: Any, shape: tuple[int, int], batch: int, variant: str) -> None:
    race(LinearGroup)


def claims(medians: Medians) -> Iterator[Verdict]:
    """The figures asked for, and what was measured; without the groups and variants that did not run."""

    def claim(text: str, asked: float, mine: list[str], theirs: list[str]) -> Iterator[Verdict]:
        measured = times_faster(medians.get(group, {}), mine, theirs)
        if measured is not None:
            yield Verdict(f"{group}: {text}", asked, measured)

    for num_levels, share in ((3, 1.0), (16, ASKED_AT_M16)):
        for batch in LARGE_BATCHES:
            group = group_name(LARGE, batch)
            for precision in PRECISIONS:
                mine = ours(num_levels, ("packed",), (precision,))
                yield from claim(f"M{num_levels} {precision}", share * ASKED[precision][batch], mine, ["torch fp32"])
            best = ours(num_levels, ("packed",))
            yield from claim(f"M{num_levels} best over best rival", share * ASKED_OVER_RIVALS, best, RIVALS)
    for shape in ODD:
        for batch in ODD_BATCHES:
            group = group_name(shape, batch)
            for execution in ("packed", "auto"):
                yield from claim(f"fp32 {execution}", ASKED_ODD, [f"M3 fp32 {execution}"], ["torch fp32"])
                yield from claim(f"best {execution}", ASKED_ODD, ours(3, (execution,)), ["torch fp32"])
