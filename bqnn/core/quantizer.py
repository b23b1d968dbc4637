"""The mathematics of a quantized weight that all ops share: partition, levels, samples and moments, with gradients.

Shapes: ``weight`` [N, ...], ``levels`` [G, M], ``thresholds`` [G, M - 1]; G is 1 (one codebook for the tensor) or N
(one for each output channel).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bqnn.core.philox import Noise
from bqnn.core.precision import narrowed, wide

Z_LIMIT = 9.0  # Phi(-9) is 1e-19: nothing beside the 1 that it is added to


class Posterior(NamedTuple):
    """The parameters of a quantized weight; gradients for them, or which are wanted, are one too."""

    weight: Tensor
    """mu, [N, ...]."""
    log_sigma2: Tensor | None
    """The weight's shape; None where the weight is deterministic."""
    levels: Tensor
    """[G, M]."""
    thresholds: Tensor
    """[G, M - 1]."""

    @property
    def columns(self) -> int:
        """Weights of an output channel."""
        return math.prod(self.weight.shape[1:])

    def contiguous(self) -> Posterior:
        if all([tensor is None or tensor.is_contiguous() for tensor in self]):
            return self
        return Posterior(*(None if tensor is None else tensor.contiguous() for tensor in self))  # type: ignore[arg-type]

    def wide(self) -> Posterior:
        """With float32 in place of float16 and bfloat16."""
        return Posterior(*(None if tensor is None else wide(tensor) for tensor in self))  # type: ignore[arg-type]

    def in_dtypes_of(self, other: Posterior) -> Posterior:
        """Contiguous, each tensor in the dtype that ``other`` has in its place: gradients, as parameters want them."""
        pairs = zip(self, other, strict=True)
        return Posterior(*(None if a is None or b is None else narrowed(a, b.dtype).contiguous() for a, b in pairs))  # type: ignore[arg-type]

    def part(self, channels: slice) -> Posterior:
        """That of some output channels, in the same memory."""
        log_sigma2 = None if self.log_sigma2 is None else self.log_sigma2[channels]
        codebook = codebook_of(self.levels, channels), codebook_of(self.thresholds, channels)
        return Posterior(self.weight[channels], log_sigma2, *codebook)


def codebook_of(codebook: Tensor, channels: slice) -> Tensor:
    """The part [1 or N, ...] of levels or thresholds that belongs to some output channels."""
    return codebook[channels] if codebook.shape[0] > 1 else codebook


def column(codebook: Tensor, j: int, weight: Tensor) -> Tensor:
    """Entry j of each codebook, shaped to broadcast against ``weight``."""
    return codebook[:, j].view(-1, *[1] * (weight.dim() - 1))


def sum_to_groups(values: Tensor, groups: int) -> Tensor:
    """Sums values [N, ...] over the weights that share a codebook: [G]."""
    return values.sum().view(1) if groups == 1 else values.flatten(1).sum(1)


def assign(weight: Tensor, thresholds: Tensor) -> Tensor:
    """The partition: code = #{j : w > t_j}, uint8 in the weight's shape."""
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for j in range(thresholds.shape[1]):
        codes += weight > column(thresholds, j, weight)
    return codes


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """Q = c_code, in the codes' shape."""
    index = codes.long()
    if levels.shape[0] == 1:
        return levels[0][index]
    return levels.gather(1, index.flatten(1)).view(codes.shape)


def level_gradient(grad: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """dL/dc_m = the sum of dL/dQ over cell m: [G, M]."""
    sums = [sum_to_groups(grad * (codes == m), levels.shape[0]) for m in range(levels.shape[1])]
    return torch.stack(sums, dim=1)


def midpoints(levels: Tensor) -> Tensor:
    """The nearest-level thresholds (c_{j-1} + c_j) / 2: [G, M] -> [G, M - 1]."""
    return 0.5 * (levels[:, 1:] + levels[:, :-1])


def sample(posterior: Posterior, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """Codes of w = mu + sigma * eps, and sigma * eps; of a deterministic weight, of mu itself and None."""
    weight, log_sigma2, _, thresholds = posterior
    if log_sigma2 is None:
        return assign(weight, thresholds), None
    shift = noise.normal(weight) * (0.5 * log_sigma2).exp()
    return assign(weight + shift, thresholds), shift


def standardised(weight: Tensor, inv_sigma: Tensor, threshold: Tensor) -> Tensor:
    """z = (mu - t) / sigma, kept where Phi and phi are no denormal numbers, which would slow the products down."""
    return ((weight - threshold) * inv_sigma).clamp_(-Z_LIMIT, Z_LIMIT)


def cdf(z: Tensor) -> Tensor:
    """Phi, the standard normal distribution function, with full relative precision in the lower tail."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def pdf(z: Tensor) -> Tensor:
    """phi, the standard normal density."""
    return (-0.5 * z * z).exp() * (1.0 / math.sqrt(2.0 * math.pi))


def moments(weight: Tensor, log_sigma2: Tensor, levels: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """E[Q(w)] and Var[Q(w)] of w ~ N(mu, sigma^2), both in the weight's shape.

    With P_j = P(w > t_j) and D_j = c_j - c_{j-1}: E = c_0 + sum_j D_j P_j, and the variance is the sum of the
    covariances of the events w > t_j, D_j D_k P_max(j,k) (1 - P_min(j,k)): no term is negative, so nothing cancels.
    """
    inv_sigma = (-0.5 * log_sigma2).exp()
    mean = column(levels, 0, weight).expand_as(weight)
    variance, below = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in range(thresholds.shape[1]):
        step = column(levels, j + 1, weight) - column(levels, j, weight)
        z = standardised(weight, inv_sigma, column(thresholds, j, weight))
        p, q = cdf(z), cdf(-z)
        mean = mean + step * p
        variance = variance + step * p * (step * q + 2.0 * below)
        below = below + step * q
    return mean, variance


def moments_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`moments` for weight, log_sigma2, levels and thresholds."""
    groups, num_levels = levels.shape
    inv_sigma = (-0.5 * log_sigma2).exp()
    z = [standardised(weight, inv_sigma, column(thresholds, j, weight)) for j in range(num_levels - 1)]
    p = [cdf(z_j) for z_j in z]
    mean = column(levels, 0, weight) + sum(
        (column(levels, j + 1, weight) - column(levels, j, weight)) * p[j] for j in range(num_levels - 1)
    )
    grad_weight, grad_log_sigma2 = torch.zeros_like(weight), torch.zeros_like(weight)
    grad_thresholds = []
    for j in range(num_levels - 1):
        lower, upper = column(levels, j, weight), column(levels, j + 1, weight)
        # E = sum_j D_j P_j and Var = E[Q^2] - E^2, so dVar/dP_j = D_j (c_j + c_{j-1} - 2 E).
        grad_z = (grad_mean + grad_variance * (lower + upper - 2.0 * mean)) * (upper - lower) * pdf(z[j])
        grad_weight += grad_z * inv_sigma
        grad_log_sigma2 -= grad_z * (0.5 * z[j])
        grad_thresholds.append(-sum_to_groups(grad_z * inv_sigma, groups))
    grad_levels = []
    for m in range(num_levels):
        above = p[m - 1] if m > 0 else 1.0
        probability = above - (p[m] if m < num_levels - 1 else 0.0)
        dmean_plus_dvar = grad_mean + 2.0 * grad_variance * (column(levels, m, weight) - mean)
        grad_levels.append(sum_to_groups(probability * dmean_plus_dvar, groups))
    return grad_weight, grad_log_sigma2, torch.stack(grad_levels, 1), torch.stack(grad_thresholds, 1)


MODES = ("categorical", "gaussian", "straight_through")
