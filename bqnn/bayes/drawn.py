"""Draws of the weight of a Bayes layer: one quantized weight out of its posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn import ops
from bqnn.bayes.estimator import EstimatedWeight
from bqnn.core.philox import Noise
from bqnn.core.posterior import Drawable
from bqnn.core.precision import wide
from bqnn.core.quantizer import look_up


class DrawnWeight(EstimatedWeight, Drawable):
    """A weight that can be drawn as a whole. The layer is deterministic afterwards, or has a posterior as before and
    computes with the draw."""

    drawn: Tensor | None = None
    """In evaluation mode the quantized weight, where a draw stands for that of the means; of replicas alone."""

    def codebook(self) -> tuple[Tensor, Tensor]:
        """Levels [G, M] and thresholds [G, M - 1], float32 at least: what the layer computes with."""
        raise NotImplementedError

    def check_parameters(self) -> None:
        """Raises ValueError for a parameter with NaN or infinity, or a log_sigma2 out of range; names it."""
        raise NotImplementedError

    @property
    def has_posterior(self) -> bool:
        return self.estimator != "deterministic"

    def posterior_tensor(self) -> Tensor:
        return self.mean

    def posterior_size(self) -> int:
        return self.mean.numel()

    @torch.no_grad()
    def draw(self, noise: Noise) -> Tensor:
        """The quantized weight, float32 at least, of a sample of the Gaussian.

        Raises:
            ValueError: a parameter is not finite or out of range.
        """
        self.check_parameters()
        mean, (levels, thresholds) = wide(self.mean), self.codebook()
        weight = mean + noise.normal(mean) * (0.5 * wide(self.log_sigma2)).exp()
        return look_up(levels, ops.assign_codes(weight, thresholds))

    @torch.no_grad()
    def keep(self, drawn: Tensor) -> None:
        self.mean.copy_(drawn)
        self.estimator = "deterministic"

    def show(self, drawn: Tensor) -> None:
        self.drawn = drawn
