"""Test time of LeNet-5: packed, M = 3, eager and compiled, against the full-precision network, also in bf16.

Weights are random, inputs too; a packed network's logits are compared with the unpacked quantized one's before any
time is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bench.packed import PRECISIONS, check_rival
from bqnn.models import lenet5

BATCHES = (1, 8, 64, 512)
BUDGET = 4.0

BASELINES = ("fpnn fp32",)
FPNN = ["fpnn fp32", "fpnn bf16", "fpnn compiled"]
COMPILED = "compiled"
"""Stands in the place of an execution: "auto", by torch.compile."""
PACKED = [f"{precision} {execution}" for execution in ("auto", "packed", COMPILED) for precision in PRECISIONS]
VARIANTS = [*FPNN, "quantized, unpacked", *PACKED]

ALLOWED = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}
"""Relative errors of the logits: rounding activations and weights of five layers costs percents."""


def fpnn() -> nn.Module:
    torch.manual_seed(0)
    return lenet5().eval()


def quantized() -> nn.Module:
    return bqnn.convert(fpnn(), 3).eval()


class LeNet5Group:
    """One batch of random images."""

    def __init__(self, batch: int) -> None:
        self.name = f"lenet5, batch {batch}"
        self.budget = BUDGET
        self._x = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        torch._dynamo.reset()

    def call(self, variant: str) -> Callable[[], Tensor]:
        x = self._x
        if variant == "fpnn bf16":
            net, x = fpnn().bfloat16(), x.bfloat16()
        elif variant == "fpnn compiled":
            net = torch.compile(fpnn(), dynamic=False)
        elif variant == "fpnn fp32":
            net = fpnn()
        elif variant in PACKED:
            precision, execution = variant.split()
            compiled = execution == COMPILED
            net = bqnn.pack(quantized(), precision=precision, execution="auto" if compiled else execution)
            net = torch.compile(net, dynamic=False) if compiled else net
        else:
            net = quantized()
        return lambda: net(x)

    def check(self, variant: str, output: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            expected = (fpnn() if variant in FPNN else quantized())(self._x)
        precision = next((name for name in ALLOWED if name in variant), "fp32")
        return check_rival(variant, output, expected.double(), ALLOWED[precision])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
def test_lenet5(race: Any, variant: str, batch: int) -> None:
    race(LeNet5Group)
