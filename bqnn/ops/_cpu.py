"""What the backends "cpu" of the ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def all_float32(*tensors: Tensor) -> bool:
    """Whether the kernels serve these tensors; the reference takes the others."""
    return all(tensor.dtype == torch.float32 for tensor in tensors)
