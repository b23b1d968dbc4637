"""Test time of LeNet-5: packed, M = 3, against the full-precision network, eager, in bf16 and compiled.

    make bench

Weights are random, inputs too; the packed network's logits are compared with the unpacked quantized one's before any
time is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.models import lenet5

BATCHES = (1, 8, 64, 512)
ROUNDS, WARMUP = 30, 5


def _fpnn() -> nn.Module:
    torch.manual_seed(0)
    return lenet5().eval()


def _packed(execution: str) -> nn.Module:
    bayes = bqnn.convert(_fpnn(), 3).eval()
    small = bqnn.pack(bayes, execution=execution)
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(small(x), bayes(x), rtol=1e-4, atol=1e-4)
    return small


def _compiled() -> Callable[[Tensor], Tensor]:
    return torch.compile(_fpnn())


VARIANTS: dict[str, Callable[[], Any]] = {
    "fpnn fp32": _fpnn,
    "fpnn bf16": lambda: _fpnn().bfloat16(),
    "fpnn compiled": _compiled,
    "quantized, unpacked": lambda: bqnn.convert(_fpnn(), 3).eval(),
    "packed auto": lambda: _packed("auto"),
    "packed, codes only": lambda: _packed("packed"),
}


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_lenet5(benchmark: Any, variant: str, batch: int) -> None:
    net = VARIANTS[variant]()
    x = torch.randn(batch, 1, 28, 28, dtype=torch.bfloat16 if "bf16" in variant else torch.float32)
    benchmark.group = f"lenet5, batch {batch}"
    with torch.inference_mode():
        benchmark.pedantic(net, (x,), rounds=ROUNDS, warmup_rounds=WARMUP, iterations=max(1, 64 // batch))
