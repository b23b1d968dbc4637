"""mixture_kl: a bound on a posterior's divergence from a mixture of Gaussians, and its gradients, in one pass.

The weight is a matrix [N, K], as weight_tiles.py cuts it. Logarithms of the mixture's components are to base 2, and
without what all components have in common: log2(rho / sqrt(v)) - log2(e) (sigma^2 + (mu - c)^2) / (2 v) for N(c, v).
"""

import math

import torch
import triton
import triton.language as tl

from bqnn.kernels.launch import cut, flags_of_codebook, launch, level_sums
from bqnn.kernels.weight_tiles import heuristics_of_tiles, log2, offsets_of, place_of, reciprocal

LOG2E, HALF_LOG2E, LN2 = tl.constexpr(1.44269504), tl.constexpr(0.72134752), tl.constexpr(0.69314718)


@triton.jit
def load_mixture(p_levels, p_slab_sigma2, spike_width, spike_share, slab_share, o_group, NUM_LEVELS: tl.constexpr):
    """The levels, and for the spikes and the slab log2(rho / sqrt(v)) and 1 / v; the shares are log2(rho)."""
    levels = ()
    narrowest = float("inf")
    for m in tl.static_range(NUM_LEVELS):
        levels += (tl.load(p_levels + o_group * NUM_LEVELS + m).to(tl.float32),)
        if m > 0:
            narrowest = tl.minimum(levels[m] - levels[m - 1], narrowest, propagate_nan=tl.PropagateNan.ALL)
    deviation = narrowest * spike_width
    slab_sigma2 = tl.load(p_slab_sigma2).to(tl.float32)
    spike = spike_share - tl.log2(deviation), 1.0 / (deviation * deviation)
    return levels, spike, (slab_share - 0.5 * tl.log2(slab_sigma2), 1.0 / slab_sigma2)


@triton.jit
def load_posterior(p_weight, p_log_sigma2, o_w, m_w):
    """mu and log sigma^2, float32."""
    weight = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    return weight, tl.load(p_log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32)


@triton.jit
def make_parts(weight, sigma2, levels, spike, slab, NUM_LEVELS: tl.constexpr):
    """The spikes, the nearest one being 1, and their sum; the larger logarithm of the nearest one and the slab; and
    what these two are, relative to it."""
    exponent = spike[1] * -HALF_LOG2E
    logs = ()
    for m in tl.static_range(NUM_LEVELS):
        distance = weight - levels[m]
        logs += (distance * distance * exponent,)
        nearest = logs[0] if m == 0 else tl.maximum(nearest, logs[m])  # noqa: F821
    spikes = ()
    for m in tl.static_range(NUM_LEVELS):
        spikes += (tl.exp2(logs[m] - nearest),)
        total = spikes[0] if m == 0 else total + spikes[m]  # noqa: F821
    of_spike = sigma2 * exponent + (nearest + spike[0])
    of_slab = (sigma2 + weight * weight) * (slab[1] * -HALF_LOG2E) + slab[0]
    rest = tl.exp2(-tl.abs(of_slab - of_spike))
    largest = tl.maximum(of_slab, of_spike, propagate_nan=tl.PropagateNan.ALL)
    is_slab = of_slab > of_spike
    return spikes, total, largest, tl.where(is_slab, rest, 1.0), tl.where(is_slab, 1.0, rest)


@heuristics_of_tiles
@triton.jit(do_not_specialize=["tiles"])
def mixture_kl_fwd_kernel(
    p_weight,
    p_log_sigma2,
    p_levels,
    p_slab_sigma2,
    p_sums,
    spike_width,
    spike_share,
    slab_share,
    N,
    K,
    tiles,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    o_n, _, first, count = place_of(N, K, tiles, BN, BK)
    o_group = tl.where(o_n < N, o_n, 0)[:, None] * PER_CHANNEL
    levels, spike, slab = load_mixture(
        p_levels, p_slab_sigma2, spike_width, spike_share, slab_share, o_group, NUM_LEVELS
    )
    sums = tl.zeros((BN, BK), tl.float32)
    for i in range(count):
        o_w, m_w = offsets_of(o_n, first + i * BK, N, K, BK, WHOLE)
        weight, log_sigma2 = load_posterior(p_weight, p_log_sigma2, o_w, m_w)
        sigma2 = tl.exp2(log_sigma2 * LOG2E)
        spikes, total, largest, scale, rest = make_parts(weight, sigma2, levels, spike, slab, NUM_LEVELS)
        kl = (largest + log2(scale * total + rest)) * -LN2 - (0.5 * log_sigma2 + 0.5)
        sums += tl.where(m_w, kl, 0.0)
    tl.store(p_sums + tl.program_id(0), tl.sum(sums))


@heuristics_of_tiles
@triton.jit(do_not_specialize=["tiles"])
def mixture_kl_bwd_kernel(
    p_grad,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_slab_sigma2,
    p_grad_weight,
    p_grad_log_sigma2,
    p_sums,
    spike_width,
    spike_share,
    slab_share,
    N,
    K,
    tiles,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    o_n, i_k, first, count = place_of(N, K, tiles, BN, BK)
    o_group = tl.where(o_n < N, o_n, 0)[:, None] * PER_CHANNEL
    levels, spike, slab = load_mixture(
        p_levels, p_slab_sigma2, spike_width, spike_share, slab_share, o_group, NUM_LEVELS
    )
    grad = tl.load(p_grad).to(tl.float32)
    sums = ()  # by the distances to the levels, then by the logarithm of the spikes' variance
    for _ in tl.static_range(NUM_LEVELS + 1):
        sums += (tl.zeros((BN, BK), tl.float32),)
    for i in range(count):
        o_w, m_w = offsets_of(o_n, first + i * BK, N, K, BK, WHOLE)
        weight, log_sigma2 = load_posterior(p_weight, p_log_sigma2, o_w, m_w)
        sigma2 = tl.exp2(log_sigma2 * LOG2E)
        spikes, total, largest, scale, rest = make_parts(weight, sigma2, levels, spike, slab, NUM_LEVELS)
        inverse = grad * reciprocal(scale * total + rest)
        share, by_slab = scale * inverse, rest * inverse * slab[1]
        by_distance = share * spike[1]
        by_weight, squares = by_slab * weight, tl.zeros_like(weight)
        before = sums
        sums = ()
        for m in tl.static_range(NUM_LEVELS):
            distance = weight - levels[m]
            part = by_distance * spikes[m] * distance
            by_weight += part
            squares += part * distance
            sums += (before[m] + tl.where(m_w, part, 0.0),)
        by_sigma2 = by_distance * total
        by_log_variance = 0.5 * (share * total - (by_sigma2 * sigma2 + squares))
        sums += (before[NUM_LEVELS] + tl.where(m_w, by_log_variance, 0.0),)
        tl.store(p_grad_weight + o_w, by_weight, mask=m_w)
        tl.store(p_grad_log_sigma2 + o_w, 0.5 * (sigma2 * (by_sigma2 + by_slab) - grad), mask=m_w)
    p_row = p_sums + (i_k * N + o_n) * (NUM_LEVELS + 1)
    for m in tl.static_range(NUM_LEVELS):
        tl.store(p_row + m, -tl.sum(sums[m], axis=1), mask=o_n < N)
    tl.store(p_row + NUM_LEVELS, tl.sum(sums[NUM_LEVELS], axis=1), mask=o_n < N)


def _shares(spike_width, slab_share, num_levels):
    """r, and the logarithms of the shares of a spike and of the slab."""
    return spike_width, math.log2((1.0 - slab_share) / num_levels), math.log2(slab_share)


def forward(weight, log_sigma2, levels, slab_sigma2, spike_width, slab_share):
    """The bound, a float32 scalar; tensors are contiguous and not empty."""
    sizes, programs, blocks = cut(weight, levels)
    grid = (programs[0] * programs[1],)
    sums = torch.empty(grid, device=weight.device)
    launch(
        mixture_kl_fwd_kernel, grid,
        weight, log_sigma2, levels, slab_sigma2, sums, *_shares(spike_width, slab_share, levels.shape[1]), *sizes,
        **flags_of_codebook(levels), **blocks,
    )  # fmt: skip
    return sums.sum()


def backward(grad, weight, log_sigma2, levels, slab_sigma2, spike_width, slab_share):
    """From ``grad``, a scalar: the gradients of weight and log_sigma2, in their dtypes; and, in float32, those of
    levels [G, M] by the distances to them, and of the logarithm of the spikes' variance [G]."""
    sizes, programs, blocks = cut(weight, levels)
    grad_weight, grad_log_sigma2 = torch.empty_like(weight), torch.empty_like(log_sigma2)
    sums = torch.empty((programs[1], sizes[0], levels.shape[1] + 1), device=weight.device)
    launch(
        mixture_kl_bwd_kernel, (programs[0] * programs[1],),
        grad, weight, log_sigma2, levels, slab_sigma2, grad_weight, grad_log_sigma2, sums,
        *_shares(spike_width, slab_share, levels.shape[1]), *sizes, **flags_of_codebook(levels), **blocks,
    )  # fmt: skip
    by_codebook = level_sums(sums, levels.float())
    return grad_weight, grad_log_sigma2, by_codebook[:, :-1], by_codebook[:, -1]
