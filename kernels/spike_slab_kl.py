"""spike_slab_kl: the divergence of a weight's posterior from the prior, and its gradients, in one pass over the weight.

A weight is a matrix [N, K] here, one row if its channels share a codebook. The kernels are bound by arithmetic: what
they cost is the number of instructions a weight and level, of which special functions count for eight others.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.launch import cut, flags_of_codebook, launch, level_sums
from bqnn.kernels.weight_tiles import heuristics_of_tiles, log2, offsets_of, place_of, reciprocal

# F of Molchanov et al., "Variational dropout sparsifies deep networks", eq. 14, as in bqnn.ops.spike_slab_kl. In terms
# of a = 1 / alpha it is K1 - K1 / (1 + e) + log(1 + a) / 2, e = exp(-K2) a^K3. Kernels take S + S e for 1 + e, since
# with S = 1 / (2 K1 K3) the derivative is dF/da = (S e / a / (S + S e)^2 + 1 / (1 + a)) / 2.
K1, S, K1_S = tl.constexpr(0.63576), tl.constexpr(0.528908369), tl.constexpr(0.63576 * 0.528908369)
LOWEST_RATIO, HIGHEST_RATIO = tl.constexpr(0.006737947), tl.constexpr(148.41316)  # exp of -5 and 5 clip log alpha
HALF_LN2, HALF_LOG2E = tl.constexpr(0.34657359), tl.constexpr(0.72134752)
ZERO_TO_TAU = tl.constexpr(1e-3)
# The greatest 1 / sigma is 2^63, whose square is finite.
GREATEST_INVERSE = tl.constexpr(63.0)
# A mean so far away gives no gradient to any level.
FAR = tl.constexpr(1e30)


@triton.jit
def load_codebook(p_levels, p_tau, o_group, NUM_LEVELS: tl.constexpr):
    """For each level its value, 1 / tau^2, and ends[m], up to where the slab is centred at level m.

    That is half-way to the next level, or, where a level is 0, minus infinity before it and infinity from it on.
    """
    levels, inverse_tau2, zeros = (), (), ()
    has_zero = False
    for m in tl.static_range(NUM_LEVELS):
        level = tl.load(p_levels + o_group * NUM_LEVELS + m).to(tl.float32)
        tau = tl.load(p_tau + o_group * NUM_LEVELS + m).to(tl.float32)
        zero = tl.abs(level) < tau * ZERO_TO_TAU
        levels, inverse_tau2, zeros = levels + (level,), inverse_tau2 + (1.0 / (tau * tau),), zeros + (zero,)
        has_zero = has_zero | zero
    ends = ()
    passed = False
    for m in tl.static_range(NUM_LEVELS - 1):
        passed = passed | zeros[m]
        beyond = tl.where(passed, float("inf"), float("-inf"))
        ends += (tl.where(has_zero, beyond, 0.5 * (levels[m] + levels[m + 1])),)
    return levels, inverse_tau2, ends


@triton.jit
def load_posterior(p_weight, p_log_sigma2, o_w, m_w):
    """mu and 1 / sigma, float32."""
    weight = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    exponent = tl.load(p_log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32) * -HALF_LOG2E
    return weight, tl.exp2(tl.minimum(exponent, GREATEST_INVERSE, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def make_windows(weight, levels, inverse_tau2, NUM_LEVELS: tl.constexpr):
    """Omega_m of every level, and their sum."""
    windows = ()
    total = tl.zeros_like(weight)
    for m in tl.static_range(NUM_LEVELS):
        distance = weight - levels[m]
        window = tl.exp2(distance * distance * (inverse_tau2[m] * -HALF_LOG2E))
        windows += (window,)
        total = window if m == 0 else total + window
    return windows, total


@triton.jit
def beyond(weight, ends, m: tl.constexpr, value, other):
    """``value`` where the weight lies beyond the slab of level m, elsewhere, and where it is NaN, ``other``."""
    if m == len(ends):
        return tl.zeros_like(weight) + other
    else:
        return tl.where(weight > ends[m], value, other)


@triton.jit
def clipped_ratio(distance, inverse_sigma):
    """r = |d| / sigma, and r where log alpha = -2 log r is clipped."""
    ratio = tl.abs(distance) * inverse_sigma
    clipped = tl.maximum(ratio, LOWEST_RATIO, propagate_nan=tl.PropagateNan.ALL)
    return ratio, tl.minimum(clipped, HIGHEST_RATIO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power_of(ratio, BY_EXP2: tl.constexpr):
    """S e / a for a = ratio^2: by exp2, or by a polynomial in place of a special function, with which F is off by at
    most 3.5e-7 of itself."""
    x = log2(ratio)
    if BY_EXP2:
        return tl.exp2(x * 0.9739 + -3.62136664)
    else:
        return ratio * ((x * 1.3505978e-05 + -0.0014702421) * x + 0.08125675)


@triton.jit
def divergences(weight, inverse_sigma, levels, inverse_tau2, ends, NUM_LEVELS: tl.constexpr):
    """The divergence of every weight."""
    windows, total = make_windows(weight, levels, inverse_tau2, NUM_LEVELS)
    slab, whole = tl.maximum(1.0 - total, 0.0), tl.maximum(total, 1.0)
    logs, gates = tl.zeros_like(weight), tl.zeros_like(weight)
    # The parts over 1 + e are summed over a common denominator, for four levels at most: e is up to 4e5.
    numerator, denominator, scale = gates, gates, gates
    for m in tl.static_range(NUM_LEVELS):
        slab_beyond = beyond(weight, ends, m, slab, 0.0)
        part = windows[m] + (slab - slab_beyond)
        slab = slab_beyond
        _, ratio = clipped_ratio(weight - levels[m], inverse_sigma)
        a = ratio * ratio
        above_e = a * power_of(ratio, False) + S
        numerator = part if m % 4 == 0 else numerator * above_e + part * denominator
        denominator = above_e if m % 4 == 0 else denominator * above_e
        logs += part * log2(a + 1.0)
        if m % 4 == 3 or m == NUM_LEVELS - 1:
            inverse = reciprocal(denominator * whole)
            gates = numerator * inverse if m < 4 else gates + numerator * inverse
            scale = denominator * inverse
    return scale * (logs * HALF_LN2) - (gates * K1_S - K1)


@triton.jit
def gradients(grad, weight, inverse_sigma, levels, inverse_tau2, ends, NUM_LEVELS: tl.constexpr):
    """``grad`` times the divergence's derivatives by the distance to every level, and by log_sigma2."""
    windows, total = make_windows(weight, levels, inverse_tau2, NUM_LEVELS)
    scale, slab = reciprocal(tl.maximum(total, 1.0)), tl.maximum(1.0 - total, 0.0)
    kl, slab_value, by_log_a = tl.zeros_like(weight), tl.zeros_like(weight), tl.zeros_like(weight)
    values, slopes = (), ()
    for m in tl.static_range(NUM_LEVELS):
        slab_beyond = beyond(weight, ends, m, slab, 0.0)
        part = windows[m] + (slab - slab_beyond)
        slab = slab_beyond
        raw, ratio = clipped_ratio(weight - levels[m], inverse_sigma)
        a, power = ratio * ratio, power_of(ratio, True)
        above_a, above_e = a + 1.0, a * power + S
        inverse = reciprocal(above_a * above_e)
        gate = inverse * above_a
        value = log2(above_a) * HALF_LN2 + (gate * -K1_S + K1)
        slope = tl.where(raw == ratio, part * (power * gate * gate + inverse * above_e), 0.0)  # 2 part dF/da
        kl += part * value
        slab_value = value if m == 0 else tl.where(weight > ends[m - 1], value, slab_value)
        by_log_a += slope * a
        values, slopes = values + (value,), slopes + (slope,)
    # A window that grows takes from the slab, or from the other windows where they overlap to more than 1.
    rest = tl.where(total > 1.0, scale * kl, slab_value)
    scale *= grad
    rest *= scale
    by_square = scale * inverse_sigma * inverse_sigma
    by_distances = ()
    for m in tl.static_range(NUM_LEVELS):
        by_window = windows[m] * (rest - scale * values[m])
        by_distance = (weight - levels[m]) * (slopes[m] * by_square + by_window * inverse_tau2[m])
        by_distances += (by_distance,)
    return by_distances, by_log_a * (scale * -0.5)


@heuristics_of_tiles
@triton.jit(do_not_specialize=["tiles"])
def spike_slab_kl_fwd_kernel(
    p_weight,
    p_log_sigma2,
    p_levels,
    p_tau,
    p_sums,
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
    levels, inverse_tau2, ends = load_codebook(p_levels, p_tau, o_group, NUM_LEVELS)
    sums = tl.zeros((BN, BK), tl.float32)
    for i in range(count):
        o_w, m_w = offsets_of(o_n, first + i * BK, N, K, BK, WHOLE)
        weight, inverse_sigma = load_posterior(p_weight, p_log_sigma2, o_w, m_w)
        kl = divergences(weight, inverse_sigma, levels, inverse_tau2, ends, NUM_LEVELS)
        sums += tl.where(m_w, kl, 0.0)
    tl.store(p_sums + tl.program_id(0), tl.sum(sums))


@heuristics_of_tiles
@triton.jit(do_not_specialize=["tiles"])
def spike_slab_kl_bwd_kernel(
    p_grad,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_tau,
    p_grad_weight,
    p_grad_log_sigma2,
    p_sums,
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
    levels, inverse_tau2, ends = load_codebook(p_levels, p_tau, o_group, NUM_LEVELS)
    grad = tl.load(p_grad).to(tl.float32)
    sums = ()
    for _ in tl.static_range(NUM_LEVELS):
        sums += (tl.zeros((BN, BK), tl.float32),)
    for i in range(count):
        o_w, m_w = offsets_of(o_n, first + i * BK, N, K, BK, WHOLE)
        weight, inverse_sigma = load_posterior(p_weight, p_log_sigma2, o_w, m_w)
        weight = tl.where(m_w, weight, FAR)
        by_distances, by_log_sigma2 = gradients(grad, weight, inverse_sigma, levels, inverse_tau2, ends, NUM_LEVELS)
        grad_weight, before = weight, sums
        sums = ()
        for m in tl.static_range(NUM_LEVELS):
            grad_weight = by_distances[m] if m == 0 else grad_weight + by_distances[m]
            sums += (before[m] + by_distances[m],)
        tl.store(p_grad_weight + o_w, grad_weight, mask=m_w)
        tl.store(p_grad_log_sigma2 + o_w, by_log_sigma2, mask=m_w)
    p_row = p_sums + (i_k * N + o_n) * NUM_LEVELS
    for m in tl.static_range(NUM_LEVELS):
        tl.store(p_row + m, -tl.sum(sums[m], axis=1), mask=o_n < N)


def forward(weight, log_sigma2, levels, tau):
    """The divergence, a float32 scalar; tensors are contiguous and not empty."""
    sizes, programs, blocks = cut(weight, levels)
    grid = (programs[0] * programs[1],)
    sums = torch.empty(grid, device=weight.device)
    launch(
        spike_slab_kl_fwd_kernel, grid,
        weight, log_sigma2, levels, tau, sums, *sizes,
        **flags_of_codebook(levels), **blocks,
    )  # fmt: skip
    return sums.sum()


def backward(grad, weight, log_sigma2, levels, tau):
    """The gradients of weight and log_sigma2, in the weight's dtype, and of levels, from ``grad``, a scalar."""
    sizes, programs, blocks = cut(weight, levels)
    grad_weight, grad_log_sigma2 = torch.empty_like(weight), torch.empty_like(weight)
    sums = torch.empty((programs[1], sizes[0], levels.shape[1]), device=weight.device)
    launch(
        spike_slab_kl_bwd_kernel, (programs[0] * programs[1],),
        grad, weight, log_sigma2, levels, tau, grad_weight, grad_log_sigma2, sums, *sizes,
        **flags_of_codebook(levels), **blocks,
    )  # fmt: skip
    return grad_weight, grad_log_sigma2, level_sums(sums, levels)
