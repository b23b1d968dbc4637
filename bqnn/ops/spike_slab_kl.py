"""spike_slab_kl: the divergence of a layer's posterior from the multiple spike-and-slab prior, with its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.check import check_levels, check_same_shape, check_weight
from bqnn.core.precision import narrowed, wide, wide_dtype
from bqnn.core.product import contiguous
from bqnn.core.quantizer import assign, column, look_up, midpoints, sum_to_groups
from bqnn.core.structure import Structure, only
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import serves
from bqnn.ops.backends.triton import kernels, other_dtype
from bqnn.ops.register import call, register_op

K1, K2, K3 = 0.63576, 1.87320, 1.48695  # Molchanov et al., "Variational dropout sparsifies deep networks", eq. 14
LOG_ALPHA_LIMIT = 10.0  # log alpha is clipped to +- this; outside, the approximation is flat and has no gradient
ZERO_TO_TAU = 1e-3  # a level is 0 where it is this close to it, in units of its window: parameters round
TINY = 1e-30  # keeps log(distance^2) finite where a mean lies on a level


class _Divergence:
    """F(d, sigma) of the log-uniform prior centred at a distance d from the mean, and its derivatives, in nats.

    F = k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1 / alpha) / 2 with alpha = sigma^2 / d^2 (Molchanov et al. 2017,
    eq. 14): KL(N(mu, sigma^2) || log-uniform) up to a constant, which is chosen so that F is 0 at d = 0.
    """

    def __init__(self, distance: Tensor, log_sigma2: Tensor) -> None:
        self.distance = distance
        self.square = torch.addcmul(torch.full_like(distance, TINY), distance, distance)
        self.raw_log_alpha = log_sigma2 - self.square.log()
        self.log_alpha = self.raw_log_alpha.clamp(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)
        self.inverse_alpha = (-self.log_alpha).exp()
        self.gate = torch.sigmoid(K2 + K3 * self.log_alpha)

    def value(self) -> Tensor:
        return (K1 - K1 * self.gate).add_(self.inverse_alpha.log1p(), alpha=0.5)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """dF/dd and dF/dlog_sigma2; both are 0 where log alpha is clipped."""
        slope = self.gate * (self.gate - 1.0) * (K1 * K3) - 0.5 * self.inverse_alpha / (1.0 + self.inverse_alpha)
        slope *= self.raw_log_alpha == self.log_alpha
        return slope * (-2.0 * self.distance / self.square), slope


class _Mixture(NamedTuple):
    """The parts of the divergence at every weight: M spikes and the slab, whose shares sum to 1."""

    windows: list[Tensor]  # Omega_m
    total: Tensor  # sum_m Omega_m
    spikes: list[_Divergence]
    slab: _Divergence
    slab_level: Tensor


def _mixture(weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor) -> _Mixture:
    distances = [weight - column(levels, m, weight) for m in range(levels.shape[1])]
    windows = [
        (distance.square() * (-0.5 / column(tau, m, weight).square())).exp() for m, distance in enumerate(distances)
    ]
    slab_level = _slab_level(weight, levels, tau)
    return _Mixture(
        windows,
        torch.stack(windows).sum(0),
        [_Divergence(distance, log_sigma2) for distance in distances],
        _Divergence(weight - look_up(levels, slab_level), log_sigma2),
        slab_level,
    )


def _slab_level(weight: Tensor, levels: Tensor, tau: Tensor) -> Tensor:
    """The code of the level that the slab is centred at: of the level 0, else of the nearest; uint8."""
    zero = levels.abs() < ZERO_TO_TAU * tau
    nearest = assign(weight, midpoints(levels))
    has_zero = column(zero.any(1, keepdim=True), 0, weight)
    level_zero = zero.to(torch.uint8).argmax(1, keepdim=True).to(torch.uint8)
    return torch.where(has_zero, column(level_zero, 0, weight), nearest)


def _values(mixture: _Mixture) -> tuple[Tensor, list[Tensor], Tensor]:
    """The divergence at every weight, F of every spike, and F of the slab."""
    share = mixture.total.clamp(min=1.0).reciprocal_()
    slab_value = mixture.slab.value()
    kl = (1.0 - share * mixture.total) * slab_value
    spike_values = [spike.value() for spike in mixture.spikes]
    for window, value in zip(mixture.windows, spike_values, strict=True):
        kl += share * window * value
    return kl, spike_values, slab_value


class Prior(NamedTuple):
    """The arguments of the op: a weight's posterior, and the spikes that it is measured by."""

    weight: Tensor
    log_sigma2: Tensor
    levels: Tensor
    tau: Tensor

    def wide(self) -> Prior:
        """With float32 in place of float16 and bfloat16: TINY is 0 to float16, and sums of many weights infinite."""
        return Prior(*map(wide, self))


class PriorBackward(NamedTuple):
    """The arguments of its backward op."""

    grad: Tensor
    prior: Prior


def spike_slab_kl_reference(prior: Prior) -> Tensor:
    return _values(_mixture(*prior.wide()))[0].sum()


def spike_slab_kl_backward_reference(call: PriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    grad, (weight, log_sigma2, levels, tau) = call.grad, call.prior.wide()
    mixture = _mixture(weight, log_sigma2, levels, tau)
    windows, total, spikes, slab, slab_level = mixture
    kl, spike_values, slab_value = _values(mixture)
    share = total.clamp(min=1.0).reciprocal_()
    slab_share = 1.0 - share * total
    slab_by_distance, slab_by_log_sigma2 = slab.slopes()
    # Where the windows overlap to more than 1 they are shared out, and the slab has no part.
    overlap, rest = total > 1.0, torch.where(total > 1.0, kl, slab_value)
    grad_weight, grad_log_sigma2 = torch.zeros_like(weight), slab_share * slab_by_log_sigma2
    grad_levels = []
    for m, (window, spike, value) in enumerate(zip(windows, spikes, spike_values, strict=True)):
        spike_by_distance, spike_by_log_sigma2 = spike.slopes()
        part = share * window
        by_window = torch.where(overlap, share, 1.0) * (value - rest)
        by_distance = part * spike_by_distance
        by_distance -= by_window * window * spike.distance / column(tau, m, weight).square()
        by_distance += (slab_level == m) * (slab_share * slab_by_distance)
        grad_log_sigma2 += part * spike_by_log_sigma2
        grad_weight += by_distance
        grad_levels.append(-sum_to_groups(by_distance, levels.shape[0]))
    gradients = (grad_weight, grad_log_sigma2, torch.stack(grad_levels, dim=1))
    by_weight, by_log_sigma2, by_levels = (
        narrowed(grad * gradient, parameter.dtype).contiguous() for gradient, parameter in zip(gradients, call.prior)
    )
    return by_weight, by_log_sigma2, by_levels


def _cpu(prior: Prior) -> Tensor:
    out = prior.weight.new_empty(())
    torch.ops.bqnn_cpu.spike_slab_kl(*contiguous(*prior), out)
    return out


def _cpu_backward(call: PriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(call)
    torch.ops.bqnn_cpu.spike_slab_kl_backward(*contiguous(call.grad, *call.prior), *gradients)
    return gradients


def _triton(prior: Prior) -> Tensor:
    if prior.weight.numel() == 0:
        return torch.zeros_like(_fake(prior))
    return kernels("spike_slab_kl").forward(*contiguous(*prior))


def _triton_backward(call: PriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    if call.prior.weight.numel() == 0:
        by_weight, by_log_sigma2, by_levels = map(torch.zeros_like, _fake_backward(call))
        return by_weight, by_log_sigma2, by_levels
    return kernels("spike_slab_kl").backward(*contiguous(call.grad, *call.prior))


def _fake(prior: Prior) -> Tensor:
    return prior.weight.new_empty((), dtype=wide_dtype(prior.weight.dtype))


def _fake_backward(call: PriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    weight, _, levels, _ = call.prior
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape), levels.new_empty(levels.shape)


def _save(ctx: Any, prior: Prior, output: Tensor) -> None:
    ctx.save_for_backward(*prior)


def _backward(ctx: Any, grad: Tensor) -> Any:
    arguments = PriorBackward(grad, Prior(*ctx.saved_tensors))
    by_weight, by_log_sigma2, by_levels = call("spike_slab_kl_backward", arguments, ctx.backend)
    return only(Prior, weight=by_weight, log_sigma2=by_log_sigma2, levels=by_levels)


register_op(
    "spike_slab_kl_backward",
    "(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, str? backend=None)"
    " -> (Tensor, Tensor, Tensor)",
    Structure(PriorBackward),
    spike_slab_kl_backward_reference,
    _fake_backward,
)
register_op(
    "spike_slab_kl",
    "(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, str? backend=None) -> Tensor",
    Structure(Prior),
    spike_slab_kl_reference,
    _fake,
    _save,
    _backward,
)
dispatch.register("spike_slab_kl", "triton", _triton, other_dtype)
dispatch.register("spike_slab_kl_backward", "triton", _triton_backward, other_dtype)
dispatch.register("spike_slab_kl", "cpu", _cpu, serves)
dispatch.register("spike_slab_kl_backward", "cpu", _cpu_backward, serves)


def spike_slab_kl(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor, backend: str | None = None
) -> Tensor:
    """The divergence from the multiple spike-and-slab prior, summed over the weights, in nats.

    Per weight sum_m Omega_m F(mu - c_m, sigma) + (1 - sum_m Omega_m) F(mu - c_slab, sigma), with the Gaussian windows
    Omega_m = exp(-(mu - c_m)^2 / (2 tau_m^2)), scaled down where they sum to more than 1, and F the log-uniform
    divergence of Molchanov et al. 2017 (Achterhold et al. 2018; Chien and Chang 2023). The slab is centred
    at the level 0 where a codebook has one, else at the level nearest to the mean.

    Differentiable in weight, log_sigma2 and levels; tau is a constant.

    Args:
        weight, log_sigma2: mu and log of the posterior variance, [N, ...].
        levels: [1 or N, M], increasing.
        tau: width of each level's window, in the weight's unit, positive, the shape of ``levels``.

    Returns:
        scalar in the weight's dtype, float32 for float16 and bfloat16; up to a constant for each weight.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_weight(weight)
    check_same_shape("log_sigma2", log_sigma2, weight)
    check_levels("levels", levels, weight)
    check_levels("tau", tau, weight)
    if tau.shape != levels.shape:
        raise ValueError(f"tau must have the shape of levels {list(levels.shape)}, got {list(tau.shape)}")
    return call("spike_slab_kl", Prior(weight, log_sigma2, levels, tau), backend)
