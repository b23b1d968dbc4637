"""mixture_kl, value and gradients through autograd, on a million weights: the CPU kernels against plain PyTorch.

Asked of one thread with tensor granularity: the kernels 10 times as fast as "eager", what a user would write, with
autograd's gradients; "reference" has its gradients by hand. Gradients and value are compared with the reference's in
float64 before any time is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.ops import mixture_kl

SHAPE = (1024, 1024)
BUDGET = 2.0
SPIKE_WIDTH, SLAB_SHARE = 0.25, 0.1

BASELINES = ("eager", "reference")


def eager(weight: Tensor, log_sigma2: Tensor, levels: Tensor, slab_sigma2: Tensor) -> Tensor:
    """The bound written plainly: the divergence from each component, and the logarithm of the sum."""
    spike_sigma2 = (SPIKE_WIDTH * levels.diff(dim=1).amin(1, keepdim=True)).square()
    sigma2 = log_sigma2.exp()
    share = math.log((1.0 - SLAB_SHARE) / levels.shape[1])
    ratio = sigma2 / spike_sigma2
    spread = 0.5 * (ratio - ratio.log() - 1.0)
    logs = [share - spread - 0.5 * (weight - level).square() / spike_sigma2 for level in levels.T.unsqueeze(-1)]
    ratio = sigma2 / slab_sigma2
    logs.append(math.log(SLAB_SHARE) - 0.5 * (weight.square() / slab_sigma2 + ratio - ratio.log() - 1.0))
    return -torch.logsumexp(torch.stack(logs), 0).sum()


class MixtureGroup:
    """The divergence of weights as in the middle of a training run."""

    def __init__(self, num_levels: int, granularity: str) -> None:
        self.name = f"mixture KL, M = {num_levels}, {granularity}"
        self.budget = BUDGET
        generator = torch.Generator().manual_seed(0)
        groups = SHAPE[0] if granularity == "channel" else 1
        levels = torch.linspace(-0.3, 0.3, num_levels) + 0.013
        # No two gaps are the same: equal ones would share the gradient, as rounding has it.
        levels = (levels + 1e-3 * torch.arange(num_levels).square() / num_levels**2).repeat(groups, 1)
        weight = 0.2 * torch.randn(SHAPE, generator=generator)
        log_sigma2 = torch.randn(SHAPE, generator=generator) - 7.0
        self._tensors = weight, log_sigma2, levels
        self._slab = torch.tensor(0.04)

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
        slab = self._slab.to(dtype)

        @torch.inference_mode(False)
        @torch.enable_grad()
        def step() -> tuple[Tensor, ...]:
            for leaf in leaves:
                leaf.grad = None
            if variant == "eager":
                value = eager(*leaves, slab)
            else:
                value = mixture_kl(*leaves, slab, SPIKE_WIDTH, SLAB_SHARE, variant)
            value.backward()
            return value.detach(), *(leaf.grad for leaf in leaves)

        return step


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [3, 16], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("variant", ["eager", "reference", "cpu"])
def test_mixture_kl(race: Any, variant: str, num_levels: int, granularity: str) -> None:
    race(MixtureGroup)
