"""spike_slab_kl, value and gradients through autograd, on a million weights: the CPU kernels against the reference.

Gradients and value are compared with the reference's in float64 before any time is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.ops import spike_slab_kl

SHAPE = (1024, 1024)
BUDGET = 2.0

BASELINES = ("reference",)


class KlGroup:
    """The divergence of weights as in the middle of a training run; another prior is a class that derives from this."""

    title = "KL"

    def __init__(self, num_levels: int, granularity: str) -> None:
        self.name = f"{self.title}, M = {num_levels}, {granularity}"
        self.budget = BUDGET
        generator = torch.Generator().manual_seed(0)
        groups = SHAPE[0] if granularity == "channel" else 1
        levels = self.codebook(num_levels).repeat(groups, 1)
        weight = 0.2 * torch.randn(SHAPE, generator=generator)
        log_sigma2 = torch.randn(SHAPE, generator=generator) - 7.0
        self._tensors = weight, log_sigma2, levels
        self._prior = self.prior(levels)

    def codebook(self, num_levels: int) -> Tensor:
        return torch.linspace(-0.3, 0.3, num_levels) + 0.013

    def prior(self, levels: Tensor) -> Tensor:
        """What the divergence takes beside the posterior and the levels."""
        return torch.full_like(levels, 0.375 * 0.6 / (levels.shape[1] - 1))

    def divergence(self, leaves: list[Tensor], prior: Tensor, variant: str) -> Tensor:
        return spike_slab_kl(*leaves, prior, variant)

    def call(self, variant: str) -> Callable[[], tuple[Tensor, ...]]:
        """Value and gradients."""
        return self._step(variant, torch.float32)

    def check(self, variant: str, output: tuple[Tensor, ...]) -> dict[str, Any]:
        value, *gradients = output
        expected, *exact = self._step("reference", torch.float64)()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        for found, gradient in zip(gradients, exact, strict=True):
            difference = (found - gradient).square().mean().sqrt()
            assert difference <= 1e-4 * gradient.square().mean().sqrt()
        return {}

    def _step(self, variant: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in self._tensors]
        prior = self._prior.to(dtype)

        @torch.inference_mode(False)
        @torch.enable_grad()
        def step() -> tuple[Tensor, ...]:
            for leaf in leaves:
                leaf.grad = None
            value = self.divergence(leaves, prior, variant)
            value.backward()
            return value.detach(), *(leaf.grad for leaf in leaves)

        return step


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [3, 16], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_spike_slab_kl(race: Any, variant: str, num_levels: int, granularity: str) -> None:
    race(KlGroup)
