"""What the backends "cpu" of the training ops share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from bqnn.core.native import cpu_isa
from bqnn.core.precision import refused_dtype

kernels = torch.ops.bqnn_cpu


def serves(call: Any) -> str:
    """The kernels take float32 alone."""
    return not_float32(call)


def not_float32(values: Iterable[Any]) -> str:
    """Why the kernels do not take these tensors, nested or not; empty where they do."""
    found = refused_dtype(values, (torch.float32,))
    return "" if found is None else f"it takes float32 tensors, got {found}"


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones: where there are instructions for them."""
    return cpu_isa() in ("avx512", "amx")
