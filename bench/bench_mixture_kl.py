"""mixture_kl, value and gradients through autograd, on a million weights: the CPU kernels against plain PyTorch.

Asked of one thread with tensor granularity: the kernels 10 times as fast as "eager", what a user would write, with
autograd's gradients; "reference" has its gradients by hand. Gradients and value are compared with the reference's in
float64 before any time is taken.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bench_spike_slab_kl import KlGroup
from bqnn.ops import mixture_kl

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


class MixtureGroup(KlGroup):
    title = "mixture KL"

    def codebook(self, num_levels: int) -> Tensor:
        # No two gaps are the same: equal ones would share the gradient, as rounding has it.
        return super().codebook(num_levels) + 1e-3 * torch.arange(num_levels).square() / num_levels**2

    def prior(self, levels: Tensor) -> Tensor:
        return torch.tensor(0.04)

    def divergence(self, leaves: list[Tensor], prior: Tensor, variant: str) -> Tensor:
        if variant == "eager":
            return eager(*leaves, prior)
        return mixture_kl(*leaves, prior, SPIKE_WIDTH, SLAB_SHARE, variant)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [3, 16], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("variant", ["eager", "reference", "cpu"])
def test_mixture_kl(race: Any, variant: str, num_levels: int, granularity: str) -> None:
    race(MixtureGroup)
