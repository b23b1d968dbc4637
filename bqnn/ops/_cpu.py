"""What the backends "cpu" of the ops share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bqnn.extension import cpu_isa

kernels = torch.ops.bqnn_cpu


def all_float32(*tensors: Tensor | None) -> bool:
    """Whether the kernels serve these tensors; the reference takes the others."""
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones: where there are tiles for them."""
    return cpu_isa() == "amx"


def dense(tensor: Tensor) -> Tensor:
    """The tensor, in an order of elements that the kernels know: row-major, or channels-last."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()
