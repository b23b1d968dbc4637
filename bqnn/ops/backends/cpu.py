"""What the backends "cpu" of the ops share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bqnn.core.native import cpu_isa

kernels = torch.ops.bqnn_cpu


def all_float32(*tensors: Tensor | None) -> bool:
    """Whether the kernels serve these tensors; the reference takes the others."""
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones: where there are instructions for them."""
    return cpu_isa() in ("avx512", "amx")
