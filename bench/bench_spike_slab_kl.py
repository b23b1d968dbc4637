"""spike_slab_kl, value and gradients through autograd, on a million weights: the CPU kernels against the reference.

    pytest bench/bench_spike_slab_kl.py

Gradients and value are compared with the reference's in float64 before any time is taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.ops import spike_slab_kl

SHAPE = (1024, 1024)
ROUNDS, WARMUP = 15, 2


def _parameters(num_levels: int, granularity: str) -> tuple[list[Tensor], Tensor]:
    """weight, log_sigma2 and levels, leaves, as in the middle of a training run; and tau."""
    generator = torch.Generator().manual_seed(0)
    groups = SHAPE[0] if granularity == "channel" else 1
    gap = 0.6 / (num_levels - 1)
    levels = (torch.linspace(-0.3, 0.3, num_levels) + 0.013).repeat(groups, 1)
    weight = 0.2 * torch.randn(SHAPE, generator=generator)
    log_sigma2 = torch.randn(SHAPE, generator=generator) - 7.0
    return [leaf.requires_grad_() for leaf in (weight, log_sigma2, levels)], torch.full_like(levels, 0.375 * gap)


def _step(leaves: list[Tensor], tau: Tensor, backend: str) -> Tensor:
    for leaf in leaves:
        leaf.grad = None
    value = spike_slab_kl(*leaves, tau, backend)
    value.backward()
    return value


def _check(leaves: list[Tensor], tau: Tensor, backend: str) -> None:
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected, found = _step(exact, tau.double(), "reference"), _step(leaves, tau, backend)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, other in zip(leaves, exact, strict=True):
        difference = (leaf.grad - other.grad).square().mean().sqrt()
        assert difference <= 1e-4 * other.grad.square().mean().sqrt()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [3, 16], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_spike_slab_kl(benchmark: Any, variant: str, num_levels: int, granularity: str) -> None:
    leaves, tau = _parameters(num_levels, granularity)
    _check(leaves, tau, variant)
    benchmark.group = f"KL, M = {num_levels}, {granularity}"
    benchmark.pedantic(_step, (leaves, tau, variant), rounds=ROUNDS, warmup_rounds=WARMUP)
