"""assign_codes, plain and packed, on a million weights: the CPU kernels against the reference.

Codes are compared with the reference's before any time is taken: they have to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.ops import assign_codes

SHAPE = (1024, 1024)
BUDGET = 0.5

BASELINES = ("reference",)


class CodesGroup:
    """Codes of one number of levels, a byte each or packed."""

    def __init__(self, num_levels: int, packed: bool) -> None:
        self.name = f"{'packed' if packed else 'codes'}, M = {num_levels}"
        self.budget = BUDGET
        self._packed = packed
        self._weight = 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        self._thresholds = torch.linspace(-0.3, 0.3, num_levels - 1)[None]

    def call(self, variant: str) -> Callable[[], Tensor]:
        return lambda: assign_codes(self._weight, self._thresholds, self._packed, variant)

    def check(self, variant: str, output: Tensor) -> dict[str, Any]:
        assert torch.equal(output, assign_codes(self._weight, self._thresholds, self._packed, "reference"))
        return {}


@pytest.mark.parametrize("packed", [False, True], ids=["codes", "packed"])
@pytest.mark.parametrize("num_levels", [3, 16], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_assign_codes(race: Any, variant: str, num_levels: int, packed: bool) -> None:
    race(CodesGroup)
