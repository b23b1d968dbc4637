"""What the backends "triton" of the ops share: the way to bqnn.kernels, which is imported in the first call."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def kernels(module: str) -> ModuleType:
    """The module of ``bqnn.kernels`` with this name."""
    return importlib.import_module(f"bqnn.kernels.{module}")


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors; the reference takes the others, float64 and empty ones."""
    return all(tensor is None or (tensor.dtype in SERVED and tensor.numel() > 0) for tensor in tensors)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def order_for(x: Tensor) -> torch.memory_format:
    """The memory format of a weight that torch multiplies x with: channels-last only if x is, since y follows both."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def number(seed: Tensor | None) -> int:
    """The seed as a kernel's argument; it is on the CPU, so that reading it waits for nothing."""
    return 0 if seed is None else int(seed)
