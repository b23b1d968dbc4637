"""E and V, the mean and the variance of the weight that reaches the moment-matched product, and their gradients: blocks
of them, for the fused products, and whole tensors.

A weight is a matrix [N, K] here; a convolution's is one of N rows. A block of it is what o_w and m_w say: int64 offsets
[BN, BK], and which of them are in the weight; its rows are channels o_n [BN].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bqnn.kernels.arguments import gradients_of
from bqnn.kernels.conv2d import in_channels_last, parts_of, taps_of
from bqnn.kernels.launch import ALL_REGISTERS, blocks_of_matrix, flags_of_posterior, launch, level_sums
from bqnn.kernels.quantizer import codebook_of, level_at, partition, quantize, store_level_sums, threshold_at


class Moments(NamedTuple):
    """E and V of a weight, gradients for them, or parts [S, *weight.shape] of these."""

    mean: Tensor
    variance: Tensor


@triton.jit
def normal_distribution(z):
    """P(Z <= z), P(Z > z) and the density of a standard normal Z, |z| <= 9, each with its relative precision."""
    gauss = tl.exp2(-0.72134752 * z * z)
    a = tl.abs(z)
    # P(Z > a) exp(a^2 / 2) is t times this polynomial in u, a minimax fit with a relative error of 3.4e-8.
    t = 1.0 / (a + 3.375)
    u = (a - 3.375) * t
    c = -0.0021530592 + u * -0.0010025604
    c = -0.098394729 + u * (0.0087109096 + u * (0.0079034772 + u * c))
    tail = gauss * (t * (0.74108028 + u * (-0.55299188 + u * (0.29537618 + u * c))))
    rest = 1.0 - tail
    below = z < 0.0
    return tl.where(below, tail, rest), tl.where(below, rest, tail), 0.39894228 * gauss


@triton.jit
def standardised(mean, inverse_sigma, threshold):
    """z = (mu - t) / sigma within the limits of ``bqnn.core.quantizer``; NaN stays NaN."""
    return tl.clamp((mean - threshold) * inverse_sigma, -9.0, 9.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weight_moments(posterior, o_w, m_w, o_group, NUM_LEVELS: tl.constexpr, MODE: tl.constexpr):
    """E and V of a block in a mode of ``bqnn.ops.moment_product``: float32 [BN, BK], something finite outside the
    weight.

    ``o_group`` is ``codebook_of`` the block's channels.
    """
    mu = tl.load(posterior.weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    log_sigma2 = tl.load(posterior.log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32)
    if MODE == "gaussian":
        return mu, tl.exp(log_sigma2)
    elif MODE == "straight_through":
        return quantize(mu, posterior, o_group, NUM_LEVELS), tl.exp(log_sigma2)
    else:
        inverse_sigma = tl.exp(-0.5 * log_sigma2)
        lower = level_at(posterior, o_group, 0, NUM_LEVELS)
        mean = tl.broadcast_to(lower, mu.shape)
        variance = tl.zeros(mu.shape, tl.float32)
        twice_below = tl.zeros(mu.shape, tl.float32)
        # Unrolled, a product's loop around it can be pipelined. Not with a codebook a channel: Triton would make such a
        # block in every warp that multiplies it; nor with many levels, which would fill the registers.
        UNROLL: tl.constexpr = NUM_LEVELS - 1 if NUM_LEVELS <= 3 and len(o_group.shape) == 0 else 1
        for j in tl.range(0, NUM_LEVELS - 1, loop_unroll_factor=UNROLL):
            upper = level_at(posterior, o_group, j + 1, NUM_LEVELS)
            z = standardised(mu, inverse_sigma, threshold_at(posterior, o_group, j, NUM_LEVELS))
            below, above, _ = normal_distribution(z)
            gain, loss = (upper - lower) * below, (upper - lower) * above
            mean += gain
            variance += gain * (loss + twice_below)
            twice_below += 2.0 * loss
            lower = upper
        return mean, variance


@triton.jit
def store_moment_gradients(
    grad_mean,
    grad_variance,
    posterior,
    gradients,
    p_sums,
    o_n,
    m_n,
    o_w,
    m_w,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
):
    """From dL/dE and dL/dV of a block, float32 [BN, BK], 0 outside the weight: the gradients of mu and log_sigma2, and
    what the block adds to those of the codebook, to p_sums [N, ``codebook_sums``]: each row's sums for its levels, then
    for its thresholds ("categorical"); for its levels ("straight_through"); nothing ("gaussian")."""
    log_sigma2 = tl.load(posterior.log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32)
    if MODE == "categorical":
        mu = tl.load(posterior.weight + o_w, mask=m_w, other=0.0).to(tl.float32)
        o_group = codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL)
        inverse_sigma = tl.exp(-0.5 * log_sigma2)
        mean = tl.broadcast_to(level_at(posterior, o_group, 0, NUM_LEVELS), mu.shape)
        # Neither loop is unrolled: probabilities and densities of the first, kept for the second, would fill registers.
        for j in range(NUM_LEVELS - 1):
            lower = level_at(posterior, o_group, j, NUM_LEVELS)
            upper = level_at(posterior, o_group, j + 1, NUM_LEVELS)
            z = standardised(mu, inverse_sigma, threshold_at(posterior, o_group, j, NUM_LEVELS))
            below, _, _ = normal_distribution(z)
            mean += (upper - lower) * below
        grad_weight = tl.zeros(mu.shape, tl.float32)
        grad_log_sigma2 = tl.zeros(mu.shape, tl.float32)
        p_row = p_sums + o_n * (2 * NUM_LEVELS - 1)
        lower = level_at(posterior, o_group, 0, NUM_LEVELS)
        before = tl.full(mu.shape, 1.0, tl.float32)
        for j in range(NUM_LEVELS - 1):
            upper = level_at(posterior, o_group, j + 1, NUM_LEVELS)
            z = standardised(mu, inverse_sigma, threshold_at(posterior, o_group, j, NUM_LEVELS))
            below, _, density = normal_distribution(z)
            # E = sum_j D_j P_j and Var = E[Q^2] - E^2, so dVar/dP_j = D_j (c_j + c_{j-1} - 2 E).
            by_z = (grad_mean + grad_variance * ((lower + upper) - 2.0 * mean)) * ((upper - lower) * density)
            by_shift = by_z * inverse_sigma
            grad_weight += by_shift
            grad_log_sigma2 -= by_z * (0.5 * z)
            by_level = (before - below) * (grad_mean + 2.0 * grad_variance * (lower - mean))
            tl.store(p_row + j, tl.sum(by_level, axis=1), mask=m_n)
            tl.store(p_row + NUM_LEVELS + j, -tl.sum(by_shift, axis=1), mask=m_n)
            lower, before = upper, below
        by_level = before * (grad_mean + 2.0 * grad_variance * (lower - mean))
        tl.store(p_row + NUM_LEVELS - 1, tl.sum(by_level, axis=1), mask=m_n)
        tl.store(gradients.weight + o_w, grad_weight, mask=m_w)
        tl.store(gradients.log_sigma2 + o_w, grad_log_sigma2, mask=m_w)
    else:
        tl.store(gradients.weight + o_w, grad_mean, mask=m_w)
        tl.store(gradients.log_sigma2 + o_w, grad_variance * tl.exp(log_sigma2), mask=m_w)
        if MODE == "straight_through":
            mu = tl.load(posterior.weight + o_w, mask=m_w, other=0.0).to(tl.float32)
            code = partition(mu, posterior, codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL), NUM_LEVELS)
            store_level_sums(grad_mean, code, p_sums, o_n, m_n, NUM_LEVELS)


@triton.jit
def moment_fwd_kernel(
    posterior,
    moments,
    N,
    K,
    taps,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    m_w = m_n[:, None] & (o_k < K)[None, :]
    o_group = codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL)
    mean, variance = weight_moments(posterior, o_w, m_w, o_group, NUM_LEVELS, MODE)
    o_moment = o_n.to(tl.int64)[:, None] * K + in_channels_last(o_k, K, taps)[None, :]
    tl.store(moments.mean + o_moment, mean, mask=m_w)
    tl.store(moments.variance + o_moment, variance, mask=m_w)


@triton.jit
def moment_bwd_kernel(
    grad,
    posterior,
    gradients,
    N,
    K,
    taps,
    parts,
    sums,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    m_w = m_n[:, None] & (o_k < K)[None, :]
    o_moment = in_channels_last(o_k, K, taps)[None, :]
    grad_mean = tl.zeros((BN, BK), tl.float32)
    grad_variance = tl.zeros((BN, BK), tl.float32)
    for part in range(parts):
        o_grad = (part * N + o_n.to(tl.int64))[:, None] * K + o_moment
        grad_mean += tl.load(grad.mean + o_grad, mask=m_w, other=0.0).to(tl.float32)
        grad_variance += tl.load(grad.variance + o_grad, mask=m_w, other=0.0).to(tl.float32)
    p_sums = gradients.sums + i_k.to(tl.int64) * N * sums
    store_moment_gradients(
        grad_mean, grad_variance, posterior, gradients, p_sums, o_n, m_n, o_w, m_w, NUM_LEVELS, PER_CHANNEL, MODE
    )


def codebook_sums(num_levels, mode):
    """How many sums a row of a block has in ``mode``; see ``store_moment_gradients``."""
    return {"categorical": 2 * num_levels - 1, "straight_through": num_levels, "gaussian": 0}[mode]


def moment_gradients(gradients, posterior):
    """The gradients of weight, log_sigma2, levels and thresholds, from what a kernel has written of them."""
    _, _, levels, thresholds = posterior
    sums, M = gradients.sums, levels.shape[1]
    return (
        gradients.weight,
        gradients.log_sigma2,
        level_sums(sums[..., :M], levels) if sums.shape[2] else torch.zeros_like(levels),
        level_sums(sums[..., M:], thresholds) if sums.shape[2] > M else torch.zeros_like(thresholds),
    )


def moments(posterior, mode, dtype, memory_format=torch.contiguous_format):
    """E and V in ``dtype``, in the weight's shape and this memory format; the posterior is contiguous."""
    weight = posterior.weight
    made = Moments(
        *(torch.empty(weight.shape, device=weight.device, dtype=dtype, memory_format=memory_format) for _ in range(2))
    )
    N, K = weight.shape[0], weight.shape[1:].numel()
    grid, blocks = blocks_of_matrix(N, K)
    launch(
        moment_fwd_kernel, grid,
        posterior, made, N, K, taps_of(made.mean), **flags_of_posterior(posterior), MODE=mode, **blocks,
    )  # fmt: skip
    return made


def moments_backward(grad, posterior, mode):
    """The gradients of weight, log_sigma2, levels and thresholds.

    ``grad`` is the Moments of dL/dE and dL/dV in any dtype, or parts [S, *weight.shape] of them to be added up,
    contiguous or channels-last; the posterior is contiguous.
    """
    weight, levels = posterior.weight, posterior.levels
    N, K = weight.shape[0], weight.shape[1:].numel()
    grid, blocks = blocks_of_matrix(N, K)
    gradients = gradients_of(posterior, grid[1], codebook_sums(levels.shape[1], mode))
    parts, taps = parts_of(grad.mean, weight)
    launch(
        moment_bwd_kernel, grid,
        grad, posterior, gradients, N, K, taps, parts, gradients.sums.shape[2], **flags_of_posterior(posterior),
        MODE=mode, **blocks, **ALL_REGISTERS,
    )  # fmt: skip
    return moment_gradients(gradients, posterior)
