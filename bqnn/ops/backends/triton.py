"""What the backends "triton" of the ops share: the way to the kernels, which are imported in the first call."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bqnn.core.philox import Noise
from bqnn.core.precision import refused_dtype
from bqnn.kernels import arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def kernels(module: str) -> ModuleType:
    """The module of ``bqnn.kernels`` with this name, kept: importlib would look for it in every call."""
    return importlib.import_module(f"bqnn.kernels.{module}")


def other_dtype(values: Iterable[Any]) -> str:
    """Why the kernels do not take these tensors, nested or not; empty where they do. A tensor that is no floating-point
    one is not looked at."""
    found = refused_dtype(values, DTYPES)
    return "" if found is None else f"it takes float32, bfloat16 and float16 tensors, got {found}"


def no_weights(weight: Tensor) -> str:
    """Why the kernels do not take this weight: there is nothing in it that a program could be for."""
    return "" if weight.numel() else "it takes a weight with elements, got none"


def order_for(x: Tensor) -> torch.memory_format:
    """The memory format of a weight that torch multiplies x with: channels-last only if x is, since y follows both."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def numbers(noise: Noise) -> arguments.Noise:
    """The noise as launchers take it. Reading a seed on the CPU waits for nothing; one on the GPU kernels read."""
    seed = noise.seed
    if seed is None:
        return arguments.Noise(0, noise.offset)
    return arguments.Noise(seed if kernels_read(seed) else int(seed), noise.offset)


def kernels_read(seed: Tensor) -> bool:
    """Whether the kernels read this seed themselves, in the GPU's memory."""
    return seed.is_cuda
