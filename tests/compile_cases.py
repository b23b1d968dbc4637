"""Launches that between them choose every kernel and every configuration of bqnn.kernels: what is compiled in tests.

A case is a function without arguments that runs launchers on CPU tensors, whose values do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bqnn.kernels import sample, sample_linear

SEED, OFFSET = 2**62, 2**33
PRODUCT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Cases = dict[str, Callable[[], Any]]


def posterior(shape: tuple[int, ...], num_levels: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, log_sigma2, levels, thresholds."""
    tensors = (
        torch.zeros(shape),
        torch.zeros(shape),
        torch.zeros(groups, num_levels),
        torch.zeros(groups, num_levels - 1),
    )
    return tensors


def _sample_linear(
    batch: int, dtype: torch.dtype, columns: int = 512, num_levels: int = 3, groups: int = 1, stochastic: bool = True
) -> None:
    channels = 256
    x, grad = torch.zeros(batch, columns, dtype=dtype), torch.zeros(batch, channels, dtype=dtype)
    weight, log_sigma2, *codebook = posterior((channels, columns), num_levels, groups)
    variance = log_sigma2 if stochastic else None
    sample_linear.forward(x, weight, variance, *codebook, torch.zeros(channels), SEED, OFFSET)
    sample_linear.backward(grad, x, weight, variance, *codebook, SEED, OFFSET, True)


def _sample(columns: int, num_levels: int, groups: int) -> None:
    weight, log_sigma2, levels, thresholds = posterior((64, columns), num_levels, groups)
    for dtype in PRODUCT_DTYPES:
        sample.sample(weight, log_sigma2, levels, thresholds, SEED, OFFSET, dtype)
        sample.sample_backward(weight.to(dtype), weight, log_sigma2, levels, thresholds, SEED, OFFSET)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SAMPLE_LINEAR: Cases = {
    **{
        f"sample_linear-bfloat16-B{batch}": partial(_sample_linear, batch, torch.bfloat16) for batch in (1, 32, 64, 128)
    },
    **{f"sample_linear-float32-B{batch}": partial(_sample_linear, batch, torch.float32) for batch in (1, 32, 64)},
    **{f"sample_linear-{_name(dtype)}-B256": partial(_sample_linear, 256, dtype) for dtype in PRODUCT_DTYPES},
    "sample_linear-bfloat16-B256-M16": partial(_sample_linear, 256, torch.bfloat16, 512, 16),
    "sample_linear-bfloat16-B256-M16-K511-channel": partial(_sample_linear, 256, torch.bfloat16, 511, 16, 256),
    "sample_linear-float32-B256-M16-K511-channel": partial(_sample_linear, 256, torch.float32, 511, 16, 256),
    "sample_linear-bfloat16-B256-M16-deterministic": partial(
        _sample_linear, 256, torch.bfloat16, 512, 16, stochastic=False
    ),
    "sample-M3": partial(_sample, 512, 3, 1),
    "sample-M16-K25-channel": partial(_sample, 25, 16, 64),
}

CASES: Cases = {**SAMPLE_LINEAR}
