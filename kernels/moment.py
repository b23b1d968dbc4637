"""E and V, the mean and the variance of the weight that reaches the moment-matched product, their gradients, and the
noise of its outputs: blocks of them, for the fused products, and whole tensors.

A weight is a matrix [N, K] here; a convolution's is one of N rows. A block of it is what o_w and m_w say: int64 offsets
[BN, BK], and which of them are in the weight; its rows are channels o_n [BN].
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.conv2d import in_channels_last, parts_of, taps_of
from bqnn.kernels.launch import ALL_REGISTERS, MATRIX_BLOCK, blocks_of_matrix, flags_of_codebook, level_sums
from bqnn.kernels.philox import normals_of_rows
from bqnn.kernels.quantizer import codebook_of, level_at, partition, quantize, store_level_sums, threshold_at


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
def weight_moments(
    p_weight, p_log_sigma2, p_levels, p_thresholds, o_w, m_w, o_group, NUM_LEVELS: tl.constexpr, MODE: tl.constexpr
):
    """E and V of a block in a mode of ``bqnn.ops.moment_product``: float32 [BN, BK], something finite outside the
    weight.

    ``o_group`` is ``codebook_of`` the block's channels.
    """
    mu = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    log_sigma2 = tl.load(p_log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32)
    if MODE == "gaussian":
        return mu, tl.exp(log_sigma2)
    elif MODE == "straight_through":
        return quantize(mu, p_levels, p_thresholds, o_group, NUM_LEVELS), tl.exp(log_sigma2)
    else:
        inverse_sigma = tl.exp(-0.5 * log_sigma2)
        lower = level_at(p_levels, o_group, 0, NUM_LEVELS)
        mean = tl.broadcast_to(lower, mu.shape)
        variance = tl.zeros(mu.shape, tl.float32)
        twice_below = tl.zeros(mu.shape, tl.float32)
        # Unrolled, a product's loop around it can be pipelined. Not with a codebook a channel: Triton would make such a
        # block in every warp that multiplies it; nor with many levels, which would fill the registers.
        UNROLL: tl.constexpr = NUM_LEVELS - 1 if NUM_LEVELS <= 3 and len(o_group.shape) == 0 else 1
        for j in tl.range(0, NUM_LEVELS - 1, loop_unroll_factor=UNROLL):
            upper = level_at(p_levels, o_group, j + 1, NUM_LEVELS)
            z = standardised(mu, inverse_sigma, threshold_at(p_thresholds, o_group, j, NUM_LEVELS))
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
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_grad_weight,
    p_grad_log_sigma2,
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
    log_sigma2 = tl.load(p_log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32)
    if MODE == "categorical":
        mu = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
        o_group = codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL)
        inverse_sigma = tl.exp(-0.5 * log_sigma2)
        mean = tl.broadcast_to(level_at(p_levels, o_group, 0, NUM_LEVELS), mu.shape)
        # Neither loop is unrolled: probabilities and densities of the first, kept for the second, would fill registers.
        for j in range(NUM_LEVELS - 1):
            lower = level_at(p_levels, o_group, j, NUM_LEVELS)
            upper = level_at(p_levels, o_group, j + 1, NUM_LEVELS)
            z = standardised(mu, inverse_sigma, threshold_at(p_thresholds, o_group, j, NUM_LEVELS))
            below, _, _ = normal_distribution(z)
            mean += (upper - lower) * below
        grad_weight = tl.zeros(mu.shape, tl.float32)
        grad_log_sigma2 = tl.zeros(mu.shape, tl.float32)
        p_row = p_sums + o_n * (2 * NUM_LEVELS - 1)
        lower = level_at(p_levels, o_group, 0, NUM_LEVELS)
        before = tl.full(mu.shape, 1.0, tl.float32)
        for j in range(NUM_LEVELS - 1):
            upper = level_at(p_levels, o_group, j + 1, NUM_LEVELS)
            z = standardised(mu, inverse_sigma, threshold_at(p_thresholds, o_group, j, NUM_LEVELS))
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
        tl.store(p_grad_weight + o_w, grad_weight, mask=m_w)
        tl.store(p_grad_log_sigma2 + o_w, grad_log_sigma2, mask=m_w)
    else:
        tl.store(p_grad_weight + o_w, grad_mean, mask=m_w)
        tl.store(p_grad_log_sigma2 + o_w, grad_variance * tl.exp(log_sigma2), mask=m_w)
        if MODE == "straight_through":
            mu = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
            code = partition(mu, p_thresholds, codebook_of(o_n, m_n, 0, NUM_LEVELS, PER_CHANNEL), NUM_LEVELS)
            store_level_sums(grad_mean, code, p_sums, o_n, m_n, NUM_LEVELS)


@triton.jit
def add_noise(mean, variance, noise, COARSE: tl.constexpr):
    """y = mean + sqrt(variance) noise and dy/dvariance; COARSE rounds the variance to bfloat16 first."""
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if COARSE:
        variance = variance.to(tl.bfloat16).to(tl.float32)
    inverse = tl.rsqrt(tl.maximum(variance, 1e-37))  # finite where there is no variance
    return mean + variance * inverse * noise, tl.where(variance > 0.0, 0.5 * inverse * noise, 0.0)


@triton.jit
def moment_fwd_kernel(
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_mean,
    p_variance,
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
    mean, variance = weight_moments(p_weight, p_log_sigma2, p_levels, p_thresholds, o_w, m_w, o_group, NUM_LEVELS, MODE)
    o_moment = o_n.to(tl.int64)[:, None] * K + in_channels_last(o_k, K, taps)[None, :]
    tl.store(p_mean + o_moment, mean, mask=m_w)
    tl.store(p_variance + o_moment, variance, mask=m_w)


@triton.jit
def moment_bwd_kernel(
    p_grad_mean,
    p_grad_variance,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_grad_weight,
    p_grad_log_sigma2,
    p_sums,
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
        grad_mean += tl.load(p_grad_mean + o_grad, mask=m_w, other=0.0).to(tl.float32)
        grad_variance += tl.load(p_grad_variance + o_grad, mask=m_w, other=0.0).to(tl.float32)
    store_moment_gradients(
        grad_mean, grad_variance, p_weight, p_log_sigma2, p_levels, p_thresholds, p_grad_weight, p_grad_log_sigma2,
        p_sums + i_k.to(tl.int64) * N * sums, o_n, m_n, o_w, m_w, NUM_LEVELS, PER_CHANNEL, MODE,
    )  # fmt: skip


@triton.heuristics(
    {
        "ALIGNED": lambda args: args["rows"] == 1 or args["columns"] % 4 == 0,
        "HAS_MEAN": lambda args: args["p_mean"] is not None,
        "HAS_SLOPE": lambda args: args["p_slope"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
    }
)
@triton.jit(do_not_specialize=["seed", "offset"])
def noise_kernel(
    p_mean,
    p_variance,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    p_slope,
    parts,
    part_size,
    rows,
    columns,
    channels,
    stride_image,
    stride_channel,
    stride_column,
    stride_slope_image,
    stride_slope_channel,
    stride_slope_column,
    biases,
    COARSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The outputs in logical order are a matrix [rows, columns], a row being a channel of an image."""
    blocks = tl.cdiv(columns, BC)
    i_r, i_c = tl.program_id(0) // blocks, (tl.program_id(0) % blocks).to(tl.int64)
    o_r, o_c = i_r.to(tl.int64) * BR + tl.arange(0, BR), i_c * BC + tl.arange(0, BC)
    m_y = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    image, channel = o_r // channels, o_r % channels
    o_y = (image * stride_image + channel * stride_channel)[:, None] + (o_c * stride_column)[None, :]
    mean = tl.zeros((BR, BC), tl.float32)
    variance = tl.zeros((BR, BC), tl.float32)
    o_part = o_y
    for _ in range(parts):
        variance += tl.load(p_variance + o_part, mask=m_y, other=0.0).to(tl.float32)
        if HAS_MEAN:
            mean += tl.load(p_mean + o_part, mask=m_y, other=0.0).to(tl.float32)
        o_part += part_size
    if HAS_BIAS:
        mean += tl.load(p_bias + channel[:, None] + (o_c % biases)[None, :]).to(tl.float32)
    noise = normals_of_rows(seed, offset, o_r, i_c * BC, columns, BC, ALIGNED)
    y, slope = add_noise(mean, variance, noise, COARSE)
    if HAS_MEAN:
        tl.store(p_y + o_y, y, mask=m_y)
    if HAS_SLOPE:
        o_slope = (image * stride_slope_image + channel * stride_slope_channel)[:, None]
        tl.store(p_slope + o_slope + (o_c * stride_slope_column)[None, :], slope, mask=m_y)


def codebook_sums(num_levels, mode):
    """How many sums a row of a block has in ``mode``; see ``store_moment_gradients``."""
    return {"categorical": 2 * num_levels - 1, "straight_through": num_levels, "gaussian": 0}[mode]


def codebook_gradients(sums, levels, thresholds):
    """The gradients of levels and thresholds, from the sums [blocks, N, codebook_sums]."""
    cuts, M = sums.shape[2] > levels.shape[1], levels.shape[1]
    return (
        level_sums(sums[..., :M], levels) if sums.shape[2] else torch.zeros_like(levels),
        level_sums(sums[..., M:], thresholds) if cuts else torch.zeros_like(thresholds),
    )


def moments(weight, log_sigma2, levels, thresholds, mode, dtype, memory_format=torch.contiguous_format):
    """E and V in ``dtype``, in the weight's shape and this memory format; the other tensors are contiguous."""
    mean, variance = (
        torch.empty(weight.shape, device=weight.device, dtype=dtype, memory_format=memory_format) for _ in range(2)
    )
    N, K = weight.shape[0], weight[0].numel()
    grid, blocks = blocks_of_matrix(N, K)
    moment_fwd_kernel[grid](
        weight, log_sigma2, levels, thresholds, mean, variance, N, K, taps_of(mean),
        **flags_of_codebook(levels), MODE=mode, **blocks,
    )  # fmt: skip
    return mean, variance


def moments_backward(grad_mean, grad_variance, weight, log_sigma2, levels, thresholds, mode):
    """The gradients of weight, log_sigma2, levels and thresholds, from dL/dE and dL/dV in any dtype, or parts
    [S, *weight.shape] of them to be added up, contiguous or channels-last; the other tensors are contiguous."""
    N, K = weight.shape[0], weight[0].numel()
    grad_weight, grad_log_sigma2 = torch.empty_like(weight), torch.empty_like(weight)
    grid, blocks = blocks_of_matrix(N, K)
    sums = torch.empty((grid[1], N, codebook_sums(levels.shape[1], mode)), device=weight.device)
    parts, taps = parts_of(grad_mean, weight)
    moment_bwd_kernel[grid](
        grad_mean, grad_variance, weight, log_sigma2, levels, thresholds, grad_weight, grad_log_sigma2, sums, N, K,
        taps, parts, sums.shape[2], **flags_of_codebook(levels), MODE=mode, **blocks, **ALL_REGISTERS,
    )  # fmt: skip
    return grad_weight, grad_log_sigma2, *codebook_gradients(sums, levels, thresholds)


def noisy(mean, variance, seed, offset, y, slope, bias=None):
    """Writes y = mean + bias + sqrt(variance) eps and slope = dy/dvariance, or one of the two.

    If it writes both, it rounds the variance to bfloat16 first.

    Args:
        mean, variance: with the strides of y (without it, of slope), or contiguous parts [S, *y.shape] to be added up;
            mean may be y itself, and is None without y.
        y, slope: what is written, or None; contiguous or, an image's, channels-last.
        bias: [N] for y [..., N], or where y is an image that is not contiguous, for its channels; or None.
    """
    output = slope if y is None else y
    parts = variance.shape[0] if variance.dim() > output.dim() else 1
    flat = output.is_contiguous() and (slope is None or slope.is_contiguous())
    # A matrix in logical order: a single row, or a row for each channel of each image.
    rows, columns, channels = 1, output.numel(), 1
    strides = slope_strides = (0, 0, 1)
    if not flat:
        (B, channels, H, W) = output.shape
        rows, columns = B * channels, H * W
        strides = _image_strides(output)
        slope_strides = strides if slope is None else _image_strides(slope)
    BC = min(triton.next_power_of_2(max(columns, 4)), MATRIX_BLOCK if flat else 32)
    BR = 1 if flat else MATRIX_BLOCK // BC
    noise_kernel[(triton.cdiv(rows, BR) * triton.cdiv(columns, BC),)](
        mean, variance, bias, seed, offset, y, slope, parts, output.numel(), rows, columns, channels,
        *strides, *slope_strides, 1 if bias is None or not flat else bias.shape[0],
        COARSE=y is not None and slope is not None, BR=BR, BC=BC,
    )  # fmt: skip


def _image_strides(y):
    """Strides of images, channels and pixels of y [B, C, H, W] in either memory format."""
    _, C, H, W = y.shape
    return (C * H * W, H * W, 1) if y.is_contiguous() else (C * H * W, 1, C)
