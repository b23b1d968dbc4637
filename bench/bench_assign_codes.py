"""assign_codes, plain and packed, on a million weights: the CPU kernels against the reference.

    pytest bench/bench_assign_codes.py

Codes are compared with the reference's before any time is taken: they have to be the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bqnn.ops import assign_codes

SHAPE = (1024, 1024)
ROUNDS, WARMUP = 30, 5


@pytest.mark.parametrize("packed", [False, True], ids=["codes", "packed"])
@pytest.mark.parametrize("num_levels", [3, 16], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_assign_codes(benchmark: Any, variant: str, num_levels: int, packed: bool) -> None:
    weight = 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    thresholds = torch.linspace(-0.3, 0.3, num_levels - 1)[None]
    expected = assign_codes(weight, thresholds, packed, "reference")
    assert torch.equal(assign_codes(weight, thresholds, packed, variant), expected)
    benchmark.group = f"{'packed' if packed else 'codes'}, M = {num_levels}"
    benchmark.pedantic(assign_codes, (weight, thresholds, packed, variant), rounds=ROUNDS, warmup_rounds=WARMUP)
