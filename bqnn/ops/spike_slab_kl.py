"""spike_slab_kl: the divergence of a layer's posterior from the multiple spike-and-slab prior, with its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.ops._check import check_codebook, check_floating, check_same_shape
from bqnn.ops._register import register_op
from bqnn.ops.quantizer import assign, column, look_up, midpoints, sum_to_groups

K1, K2, K3 = 0.63576, 1.87320, 1.48695  # Molchanov et al., "Variational dropout sparsifies deep networks", eq. 14
LOG_ALPHA_LIMIT = 10.0  # log alpha is clipped to +- this; outside, the approximation is flat and has no gradient
TINY = 1e-30  # keeps log(distance^2) finite where a mean lies on a level


class _Divergence(NamedTuple):
    """F(d, sigma) of the log-uniform prior centred d away from the mean, and its two derivatives."""

    value: Tensor
    by_distance: Tensor
    by_log_sigma2: Tensor


def log_uniform_kl(distance: Tensor, log_sigma2: Tensor) -> _Divergence:
    """KL(N(mu, sigma^2) || log-uniform around c), up to a constant, with d = mu - c and alpha = sigma^2 / d^2, in nats.

    F = k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1 / alpha) / 2 (Molchanov et al. 2017, eq. 14): 0 at d = 0.
    """
    square = distance * distance + TINY
    raw = log_sigma2 - square.log()
    log_alpha = raw.clamp(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)
    gate = torch.sigmoid(K2 + K3 * log_alpha)
    value = K1 - K1 * gate + 0.5 * F.softplus(-log_alpha)
    slope = -K1 * K3 * gate * (1.0 - gate) - 0.5 * torch.sigmoid(-log_alpha)
    slope = torch.where(raw == log_alpha, slope, 0.0)
    return _Divergence(value, slope * (-2.0 * distance / square), slope)


class _Mixture(NamedTuple):
    """The parts of the divergence at every weight: M spikes and the slab, whose weights sum to 1."""

    windows: list[Tensor]
    spikes: list[_Divergence]
    total: Tensor
    slab: _Divergence
    slab_level: Tensor
    kl: Tensor


def _slab_level(weight: Tensor, levels: Tensor) -> Tensor:
    """The code of the level that the slab is centred at: of the level 0, else of the nearest; uint8."""
    zero = levels == 0.0
    nearest = assign(weight, midpoints(levels))
    has_zero = column(zero.any(1, keepdim=True), 0, weight)
    return torch.where(has_zero, column(zero.to(torch.uint8).argmax(1, keepdim=True), 0, weight), nearest)


def _mixture(weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor) -> _Mixture:
    distances = [weight - column(levels, m, weight) for m in range(levels.shape[1])]
    windows = [(-0.5 * (distance / column(tau, m, weight)) ** 2).exp() for m, distance in enumerate(distances)]
    spikes = [log_uniform_kl(distance, log_sigma2) for distance in distances]
    total = torch.stack(windows).sum(0)
    share = 1.0 / total.clamp(min=1.0)
    slab_level = _slab_level(weight, levels)
    slab = log_uniform_kl(weight - look_up(levels, slab_level), log_sigma2)
    kl = (1.0 - share * total) * slab.value
    for window, spike in zip(windows, spikes, strict=True):
        kl = kl + share * window * spike.value
    return _Mixture(windows, spikes, total, slab, slab_level, kl)


def spike_slab_kl_reference(weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor) -> Tensor:
    return _mixture(weight, log_sigma2, levels, tau).kl.sum()


def spike_slab_kl_backward_reference(
    grad: Tensor, weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups, num_levels = levels.shape
    windows, spikes, total, slab, slab_level, kl = _mixture(weight, log_sigma2, levels, tau)
    share = 1.0 / total.clamp(min=1.0)
    slab_share = 1.0 - share * total
    grad_log_sigma2 = slab_share * slab.by_log_sigma2
    by_distance = []
    for m, (window, spike) in enumerate(zip(windows, spikes, strict=True)):
        distance = weight - column(levels, m, weight)
        # Where the windows overlap to more than 1 they are shared out, and the slab has no part.
        by_window = torch.where(total > 1.0, (spike.value - kl) * share, spike.value - slab.value)
        by_distance.append(
            share * window * spike.by_distance
            - by_window * window * distance / column(tau, m, weight) ** 2
            + torch.where(slab_level == m, slab_share * slab.by_distance, 0.0)
        )
        grad_log_sigma2 = grad_log_sigma2 + share * window * spike.by_log_sigma2
    grad_levels = torch.stack([-sum_to_groups(by_distance[m], groups) for m in range(num_levels)], dim=1)
    return grad * torch.stack(by_distance).sum(0), grad * grad_log_sigma2, grad * grad_levels


def _fake(weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor, backend: str | None = None) -> Tensor:
    return weight.new_empty(())


def _fake_backward(
    grad: Tensor, weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(levels)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *torch.ops.bqnn.spike_slab_kl_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


register_op(
    "spike_slab_kl_backward",
    "(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, str? backend=None)"
    " -> (Tensor, Tensor, Tensor)",
    spike_slab_kl_backward_reference,
    _fake_backward,
)
register_op(
    "spike_slab_kl",
    "(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, str? backend=None) -> Tensor",
    spike_slab_kl_reference,
    _fake,
    _setup_context,
    _backward,
)


def spike_slab_kl(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor, backend: str | None = None
) -> Tensor:
    """The divergence from the multiple spike-and-slab prior, summed over the weights, in nats.

    Per weight sum_m Omega_m F(mu - c_m, sigma) + (1 - sum_m Omega_m) F(mu - c_slab, sigma), with the Gaussian windows
    Omega_m = exp(-(mu - c_m)^2 / (2 tau_m^2)), scaled down where they sum to more than 1, and F the log-uniform
    divergence of Molchanov et al. 2017 (Achterhold et al. 2018, section 3; Chien and Chang 2023). The slab is centred at
    the level 0 where a codebook has one, else at the level nearest to the mean.

    Differentiable in weight, log_sigma2 and levels; tau is a constant.

    Args:
        weight, log_sigma2: mu and log of the posterior variance, [N, ...].
        levels: [1 or N, M], increasing.
        tau: width of each level's window, in the weight's unit, positive, the shape of ``levels``.

    Returns:
        scalar in the weight's dtype, up to a constant for each weight.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_floating("weight", weight)
    check_same_shape("log_sigma2", log_sigma2, weight)
    check_codebook("levels", levels, weight, levels.shape[-1], levels.shape[-1])
    check_codebook("tau", tau, weight, levels.shape[-1], levels.shape[-1])
    if tau.shape != levels.shape:
        raise ValueError(f"tau must have the shape of levels {list(levels.shape)}, got {list(tau.shape)}")
    return torch.ops.bqnn.spike_slab_kl(weight, log_sigma2, levels, tau, backend)
