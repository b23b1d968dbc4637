"""mixture_kl: a bound on the divergence of a layer's posterior from a mixture of Gaussians, with its gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.check import (
    check_device,
    check_floating,
    check_levels,
    check_number,
    check_same_shape,
    check_weight,
)
from bqnn.core.precision import narrowed, wide, wide_dtype
from bqnn.core.quantizer import column, sum_to_groups
from bqnn.core.structure import Structure, only
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import serves
from bqnn.ops.backends.triton import kernels, other_dtype
from bqnn.ops.register import call, register_op

# Of the spikes' deviation, in gaps. Narrower ones than a thousandth hold no float32 number but the level itself.
LEAST_WIDTH, MOST_WIDTH = 1e-3, 1e3
# Of the slab's share, which has a logarithm, and so has what it leaves to the spikes.
LEAST_SHARE, MOST_SHARE = 1e-6, 1.0 - 1e-6


class MixturePrior(NamedTuple):
    """The arguments of the op: a weight's posterior, and the mixture that it is measured by."""

    weight: Tensor
    log_sigma2: Tensor
    levels: Tensor
    slab_sigma2: Tensor
    """S^2, a scalar."""
    spike_width: float
    """r: the deviation of a spike, in narrowest gaps."""
    slab_share: float
    """rho_0."""

    def wide(self) -> MixturePrior:
        """With float32 in place of float16 and bfloat16."""
        weight, log_sigma2, levels, slab_sigma2 = map(wide, self[:4])
        return MixturePrior(weight, log_sigma2, levels, slab_sigma2, *self[4:])

    def contiguous(self) -> MixturePrior:
        weight, log_sigma2, levels, slab_sigma2 = (each.contiguous() for each in self[:4])
        return MixturePrior(weight, log_sigma2, levels, slab_sigma2, *self[4:])


class MixturePriorBackward(NamedTuple):
    """The arguments of its backward op."""

    grad: Tensor
    prior: MixturePrior


class _Components(NamedTuple):
    """What the components of the mixture are to every weight."""

    distances: list[Tensor]  # mu - c_m
    sigma2: Tensor
    spike_sigma2: Tensor  # s^2, shaped to broadcast against the weight
    logs: list[Tensor]  # log rho_k - KL(q || component k), up to (1 + log sigma^2) / 2: the spikes', then the slab's
    total: Tensor  # the logarithm of the sum of their exponentials


def _components(prior: MixturePrior) -> _Components:
    weight, log_sigma2, levels, slab_sigma2, spike_width, slab_share = prior
    num_levels = levels.shape[1]
    narrowest = levels.diff(dim=1).amin(1, keepdim=True)
    spike_sigma2 = column((spike_width * narrowest).square(), 0, weight)
    sigma2 = log_sigma2.exp()
    distances = [weight - column(levels, m, weight) for m in range(num_levels)]
    spike = math.log((1.0 - slab_share) / num_levels) - 0.5 * spike_sigma2.log()
    logs = [spike - 0.5 * (sigma2 + distance.square()) / spike_sigma2 for distance in distances]
    slab = math.log(slab_share) - 0.5 * slab_sigma2.log()
    logs.append(slab - 0.5 * (sigma2 + weight.square()) / slab_sigma2)
    return _Components(distances, sigma2, spike_sigma2, logs, torch.logsumexp(torch.stack(logs), 0))


def mixture_kl_reference(prior: MixturePrior) -> Tensor:
    prior = prior.wide()
    return (-0.5 * (1.0 + prior.log_sigma2) - _components(prior).total).sum()


def mixture_kl_backward_reference(call: MixturePriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    grad, prior = call.grad, call.prior.wide()
    distances, sigma2, spike_sigma2, logs, total = _components(prior)
    # The share of each component in the mixture's density, as the posterior sees it: they sum to 1.
    *spikes, slab = ((each - total).exp() for each in logs)
    by_weight = slab * prior.weight / prior.slab_sigma2
    by_log_sigma2 = 0.5 * (slab * sigma2 / prior.slab_sigma2 - 1.0)
    by_log_spike_sigma2 = torch.zeros_like(by_weight)
    by_levels = []
    for spike, distance in zip(spikes, distances, strict=True):
        by_distance = spike * distance / spike_sigma2
        by_weight += by_distance
        by_log_sigma2 += 0.5 * spike * sigma2 / spike_sigma2
        by_log_spike_sigma2 += 0.5 * spike * (1.0 - (sigma2 + distance.square()) / spike_sigma2)
        by_levels.append(-sum_to_groups(by_distance, prior.levels.shape[0]))
    by_width = sum_to_groups(by_log_spike_sigma2, prior.levels.shape[0])
    levels = torch.stack(by_levels, dim=1) + through_narrowest_gap(prior.levels, by_width)
    gradients = (grad * by_weight, grad * by_log_sigma2, grad * levels)
    return _in_dtypes_of(gradients, call.prior)


def through_narrowest_gap(levels: Tensor, by_log_spike_sigma2: Tensor) -> Tensor:
    """What the levels [G, M] get of the gradient of log s^2 [G], s = r * (narrowest gap): [G, M].

    Only the two levels at the narrowest gap do. Where several gaps are the narrowest one the divergence has a kink, and
    each of them gets an equal part, as from torch.amin: the middle one of the subgradients.
    """
    steps = levels.diff(dim=1)
    narrowest = steps.amin(1, keepdim=True)
    tied = (steps == narrowest).to(levels)
    by_step = (2.0 * by_log_spike_sigma2.view(-1, 1) / narrowest) * tied / tied.sum(1, keepdim=True)
    return torch.nn.functional.pad(by_step, (1, 0)) - torch.nn.functional.pad(by_step, (0, 1))


def _in_dtypes_of(gradients: tuple[Tensor, ...], prior: MixturePrior) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as the parameters want them, and contiguous."""
    by_weight, by_log_sigma2, by_levels = (
        narrowed(gradient, parameter.dtype).contiguous()
        for gradient, parameter in zip(gradients, (prior.weight, prior.log_sigma2, prior.levels))
    )
    return by_weight, by_log_sigma2, by_levels


def _cpu(prior: MixturePrior) -> Tensor:
    out = prior.weight.new_empty(())
    torch.ops.bqnn_cpu.mixture_kl(*prior.contiguous(), out)
    return out


def _cpu_backward(call: MixturePriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(call)
    torch.ops.bqnn_cpu.mixture_kl_backward(call.grad.contiguous(), *call.prior.contiguous(), *gradients)
    return gradients


def _triton(prior: MixturePrior) -> Tensor:
    if prior.weight.numel() == 0:
        return torch.zeros_like(_fake(prior))
    return kernels("mixture_kl").forward(*prior.contiguous())


def _triton_backward(call: MixturePriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    if call.prior.weight.numel() == 0:
        by_weight, by_log_sigma2, by_levels = map(torch.zeros_like, _fake_backward(call))
        return by_weight, by_log_sigma2, by_levels
    launched = kernels("mixture_kl").backward(call.grad.contiguous(), *call.prior.contiguous())
    by_weight, by_log_sigma2, by_levels, by_log_spike_sigma2 = launched
    by_levels = by_levels + through_narrowest_gap(wide(call.prior.levels), by_log_spike_sigma2)
    return _in_dtypes_of((by_weight, by_log_sigma2, by_levels), call.prior)


def _fake(prior: MixturePrior) -> Tensor:
    return prior.weight.new_empty((), dtype=wide_dtype(prior.weight.dtype))


def _fake_backward(call: MixturePriorBackward) -> tuple[Tensor, Tensor, Tensor]:
    weight, log_sigma2, levels = call.prior[:3]
    return weight.new_empty(weight.shape), log_sigma2.new_empty(weight.shape), levels.new_empty(levels.shape)


def _save(ctx: Any, prior: MixturePrior, output: Tensor) -> None:
    ctx.save_for_backward(*prior[:4])
    ctx.numbers = prior[4:]


def _backward(ctx: Any, grad: Tensor) -> Any:
    arguments = MixturePriorBackward(grad, MixturePrior(*ctx.saved_tensors, *ctx.numbers))
    by_weight, by_log_sigma2, by_levels = call("mixture_kl_backward", arguments, ctx.backend)
    return only(MixturePrior, weight=by_weight, log_sigma2=by_log_sigma2, levels=by_levels)


register_op(
    "mixture_kl_backward",
    "(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor slab_sigma2, float spike_width,"
    " float slab_share, str? backend=None) -> (Tensor, Tensor, Tensor)",
    Structure(MixturePriorBackward),
    mixture_kl_backward_reference,
    _fake_backward,
)
register_op(
    "mixture_kl",
    "(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor slab_sigma2, float spike_width, float slab_share,"
    " str? backend=None) -> Tensor",
    Structure(MixturePrior),
    mixture_kl_reference,
    _fake,
    _save,
    _backward,
)
dispatch.register("mixture_kl", "triton", _triton, other_dtype)
dispatch.register("mixture_kl_backward", "triton", _triton_backward, other_dtype)
dispatch.register("mixture_kl", "cpu", _cpu, serves)
dispatch.register("mixture_kl_backward", "cpu", _cpu_backward, serves)


def check_mixture(spike_width: float, slab_share: float) -> None:
    """Raises unless both are numbers, in their ranges.

    Raises:
        TypeError, ValueError: names the one that is not.
    """
    ranges = {"spike_width": (LEAST_WIDTH, MOST_WIDTH), "slab_share": (LEAST_SHARE, MOST_SHARE)}
    for (name, (least, most)), value in zip(ranges.items(), (spike_width, slab_share)):
        check_number(name, value)
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least:g} to {most:.6f}, got {value}")


def mixture_kl(
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    slab_sigma2: Tensor,
    spike_width: float = 0.25,
    slab_share: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """The divergence from a mixture of spikes and a slab that are all Gaussian, summed over the weights, in nats.

    The prior of a weight is p(w) = sum_m rho_m N(w; c_m, s^2) + rho_0 N(w; 0, S^2), with s = r * (narrowest gap between
    two levels of the codebook) and rho_m = (1 - rho_0) / M. Per weight the value is

        -log(rho_0 exp(-KL(q || slab)) + sum_m rho_m exp(-KL(q || spike m))) >= KL(q || p) >= 0,

    which is the variational bound of Hershey and Olsen ("Approximating the Kullback Leibler divergence between Gaussian
    mixture models", ICASSP 2007) for a posterior of one component. The prior is proper, so that the value has a minimum
    in sigma too, unlike that of log-uniform spikes.

    Differentiable in weight, log_sigma2 and levels, which s goes with; slab_sigma2 is a constant. Where several gaps of
    a codebook are the narrowest one, the value has a kink in the levels, and each of these gaps gets an equal part of
    the gradient by s.

    Args:
        weight, log_sigma2: mu and log of the posterior variance, [N, ...].
        levels: [1 or N, M], increasing.
        slab_sigma2: S^2, a positive scalar tensor in the square of the weight's unit.
        spike_width: r, from 0.001 to 1000.
        slab_share: rho_0, from 1e-6 to 1 - 1e-6.

    Returns:
        scalar in the weight's dtype, float32 for float16 and bfloat16.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or out of its range.
    """
    check_weight(weight)
    check_same_shape("log_sigma2", log_sigma2, weight)
    check_levels("levels", levels, weight)
    check_floating("slab_sigma2", slab_sigma2)
    if slab_sigma2.dim() != 0:
        raise ValueError(f"slab_sigma2 must be a scalar tensor, got the shape {list(slab_sigma2.shape)}")
    check_device("slab_sigma2", slab_sigma2, weight)
    check_mixture(spike_width, slab_share)
    prior = MixturePrior(weight, log_sigma2, levels, slab_sigma2, float(spike_width), float(slab_share))
    return call("mixture_kl", prior, backend)
