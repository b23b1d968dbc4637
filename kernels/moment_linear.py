"""moment_linear: mean and variance of the outputs from one load of x and of the weight's parameters.

Shapes: x [M, K], weight [N, K], y [M, N]. Every block of rows makes the moments of the whole weight again; see
``is_fused``.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.launch import flags_of_product, leading, rows_of, splits_of, sum_of_splits
from bqnn.kernels.moment import (
    add_noise,
    codebook_gradients,
    codebook_sums,
    noisy,
    store_moment_gradients,
    weight_moments,
)
from bqnn.kernels.philox import normals_of_rows
from bqnn.kernels.quantizer import group_of

LARGEST_BM = 128
# Operations a weight that may be spent on making moments again, in all row blocks but the first, before it costs more
# than writing and reading them. An estimate for an H200, not a measurement: 8 bytes of two moments in bfloat16, written
# and read, take as long as 54 operations.
OPERATIONS_FUSED = 54
OPERATIONS_OF_THRESHOLD = 25
OPERATIONS_OF_GAUSSIAN = 8
WEIGHT_TILES = {"BM": 32, "BN": 64, "BK": 64, "num_warps": 8}  # of the weight's gradient


@triton.heuristics(
    {
        "ALIGNED": lambda args: args["N"] % 4 == 0,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_MEAN": lambda args: args["p_y"] is not None,
        "NOISY": lambda args: args["p_variance"] is None,
        "COARSE": lambda args: args["p_slope"] is not None,
    }
)
@triton.jit(do_not_specialize=["seed", "offset"])
def moment_linear_fwd_kernel(
    p_x,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    p_slope,
    p_variance,
    M,
    N,
    K,
    stride_x,
    span,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    NOISY: tl.constexpr,
    COARSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """NOISY: y, and the slope if COARSE. Otherwise parts of the variance, and of the mean, as y, if HAS_MEAN."""
    i_n, i_m, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    o_group = group_of(o_n, m_n, PER_CHANNEL)
    p_row = p_x + o_m.to(tl.int64)[:, None] * stride_x
    b_mean = tl.zeros((BM, BN), tl.float32)
    b_variance = tl.zeros((BM, BN), tl.float32)
    for first in range(i_s * span, tl.minimum(K, (i_s + 1) * span), BK):
        o_k = first + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        b_x = tl.load(p_row + o_k[None, :], mask=m_m[:, None] & m_k, other=0.0)
        o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        b_e, b_v = weight_moments(
            p_weight, p_log_sigma2, p_levels, p_thresholds, o_w, m_n[:, None] & m_k, o_group, NUM_LEVELS, MODE
        )
        # [BM, BK] @ [BK, BN]
        if HAS_MEAN:
            b_mean = tl.dot(b_x, tl.trans(b_e.to(b_x.dtype)), b_mean, input_precision=PRECISION)
        b_variance = tl.dot(b_x * b_x, tl.trans(b_v.to(b_x.dtype)), b_variance, input_precision=PRECISION)
    if HAS_BIAS:
        b_mean += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = (i_s.to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if NOISY:
        noise = normals_of_rows(seed, offset, o_m, i_n * BN, N, BN, ALIGNED)
        b_mean, b_slope = add_noise(b_mean, b_variance, noise, COARSE)
        if COARSE:
            tl.store(p_slope + o_y, b_slope, mask=m_y)
    else:
        tl.store(p_variance + o_y, b_variance, mask=m_y)
    if HAS_MEAN:
        tl.store(p_y + o_y, b_mean, mask=m_y)


@triton.jit
def moment_linear_bwd_kernel_input(
    p_grad,
    p_slope,
    p_x,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_grad_x,
    M,
    N,
    K,
    stride_grad,
    stride_x,
    span,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_k, i_m, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m, o_k = i_m * BM + tl.arange(0, BM), i_k * BK + tl.arange(0, BK)
    m_m, m_k = (o_m < M)[:, None], (o_k < K)[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    b_by_mean = tl.zeros((BM, BK), tl.float32)
    b_by_variance = tl.zeros((BM, BK), tl.float32)
    for first in range(i_s * span, tl.minimum(N, (i_s + 1) * span), BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < N
        m_grad = m_m & m_n[None, :]
        b_grad = tl.load(p_grad + o_row * stride_grad + o_n[None, :], mask=m_grad, other=0.0)
        b_slope = tl.load(p_slope + o_row * N + o_n[None, :], mask=m_grad, other=0.0)
        o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        o_group = group_of(o_n, m_n, PER_CHANNEL)
        b_e, b_v = weight_moments(
            p_weight, p_log_sigma2, p_levels, p_thresholds, o_w, m_n[:, None] & m_k, o_group, NUM_LEVELS, MODE
        )
        # [BM, BN] @ [BN, BK]
        b_by_mean = tl.dot(b_grad, b_e.to(b_grad.dtype), b_by_mean, input_precision=PRECISION)
        b_scaled = (b_grad.to(tl.float32) * b_slope.to(tl.float32)).to(b_grad.dtype)
        b_by_variance = tl.dot(b_scaled, b_v.to(b_grad.dtype), b_by_variance, input_precision=PRECISION)
    b_x = tl.load(p_x + o_row * stride_x + o_k[None, :], mask=m_m & m_k, other=0.0).to(tl.float32)
    o_grad_x = (i_s.to(tl.int64) * M + o_m)[:, None] * K + o_k[None, :]
    tl.store(p_grad_x + o_grad_x, b_by_mean + 2.0 * b_x * b_by_variance, mask=m_m & m_k)


@triton.jit
def moment_linear_bwd_kernel_weight(
    p_grad,
    p_slope,
    p_x,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_grad_weight,
    p_grad_log_sigma2,
    p_sums,
    M,
    N,
    K,
    stride_grad,
    stride_x,
    sums,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_n, m_k = o_n < N, (o_k < K)[None, :]
    b_grad_mean = tl.zeros((BN, BK), tl.float32)
    b_grad_variance = tl.zeros((BN, BK), tl.float32)
    for first in range(0, M, BM):
        o_m = first + tl.arange(0, BM)
        m_m, o_row = (o_m < M)[:, None], o_m.to(tl.int64)[:, None]
        m_grad = m_m & m_n[None, :]
        b_grad = tl.load(p_grad + o_row * stride_grad + o_n[None, :], mask=m_grad, other=0.0)
        b_slope = tl.load(p_slope + o_row * N + o_n[None, :], mask=m_grad, other=0.0)
        b_x = tl.load(p_x + o_row * stride_x + o_k[None, :], mask=m_m & m_k, other=0.0)
        b_scaled = (b_grad.to(tl.float32) * b_slope.to(tl.float32)).to(b_grad.dtype)
        # [BN, BM] @ [BM, BK]
        b_grad_mean = tl.dot(tl.trans(b_grad), b_x, b_grad_mean, input_precision=PRECISION)
        b_grad_variance = tl.dot(tl.trans(b_scaled), b_x * b_x, b_grad_variance, input_precision=PRECISION)
    o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    store_moment_gradients(
        b_grad_mean, b_grad_variance, p_weight, p_log_sigma2, p_levels, p_thresholds, p_grad_weight, p_grad_log_sigma2,
        p_sums + i_k.to(tl.int64) * N * sums, o_n, m_n, o_w, m_n[:, None] & m_k, NUM_LEVELS, PER_CHANNEL, MODE,
    )  # fmt: skip


def _tiles(rows, dtype):
    """Tile sizes and warps: the rows in as few blocks as registers allow, since each makes the moments anew."""
    BM = min(max(16, triton.next_power_of_2(rows)), LARGEST_BM)
    return {"BM": BM, "BN": 64, "BK": 32 if dtype == torch.float32 else 64, "num_warps": 8 if BM > 64 else 4}


def is_fused(x, weight, levels, mode):
    """Whether the products make the weight's moments; otherwise they are made once and torch multiplies."""
    cost = OPERATIONS_OF_THRESHOLD * (levels.shape[1] - 1) if mode == "categorical" else OPERATIONS_OF_GAUSSIAN
    return (triton.cdiv(leading(x), LARGEST_BM) - 1) * cost <= OPERATIONS_FUSED


def _forward_kernel(rows, posterior, bias, seed, offset, y, slope, variance, span, mode, grid, tiles):
    (M, K), N = rows.shape, posterior[0].shape[0]
    moment_linear_fwd_kernel[grid](
        rows, *posterior, bias, seed, offset, y, slope, variance, M, N, K, rows.stride(0), span, MODE=mode,
        **flags_of_product(rows, posterior[2]), **tiles,
    )  # fmt: skip


def forward(x, weight, log_sigma2, levels, thresholds, bias, seed, offset, mode, coarse):
    """y [..., N] in x's dtype, of x [..., K], and dy/dvariance in bfloat16 if ``coarse``, else an empty tensor.

    Nothing is empty; the parameters are contiguous.
    """
    rows, posterior = rows_of(x), (weight, log_sigma2, levels, thresholds)
    (M, K), N = rows.shape, weight.shape[0]
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    slope = torch.empty((M, N), device=x.device, dtype=torch.bfloat16) if coarse else None
    tiles = _tiles(M, x.dtype)
    blocks = (triton.cdiv(N, tiles["BN"]), triton.cdiv(M, tiles["BM"]))
    splits, span = splits_of(blocks, K, tiles["BK"], x.device)
    grid = (*blocks, splits)
    if splits == 1:
        _forward_kernel(rows, posterior, bias, seed, offset, y, slope, None, span, mode, grid, tiles)
    else:
        mean, variance = torch.empty((2, splits, M, N), device=x.device)
        _forward_kernel(rows, posterior, None, seed, offset, mean, None, variance, span, mode, grid, tiles)
        noisy(mean, variance, seed, offset, y, slope, bias)
    shape = (*x.shape[:-1], N)
    return y.view(shape), y.new_empty(0) if slope is None else slope.view(shape)


def _slope(rows, posterior, seed, offset, mode):
    """dy/dvariance [M, N], made again, in the dtype of ``rows``."""
    (M, K), N = rows.shape, posterior[0].shape[0]
    tiles = _tiles(M, rows.dtype)
    blocks = (triton.cdiv(N, tiles["BN"]), triton.cdiv(M, tiles["BM"]))
    splits, span = splits_of(blocks, K, tiles["BK"], rows.device)
    variance = torch.empty((splits, M, N), device=rows.device)
    _forward_kernel(rows, posterior, None, seed, offset, None, None, variance, span, mode, (*blocks, splits), tiles)
    slope = torch.empty((M, N), device=rows.device, dtype=rows.dtype)
    noisy(None, variance, seed, offset, None, slope)
    return slope


def backward(grad, slope, x, weight, log_sigma2, levels, thresholds, seed, offset, mode, input_gradient):
    """Gradients for x (empty if not asked for), weight, log_sigma2, levels and thresholds; grad [..., N].

    Without ``slope``, dy/dvariance [..., N], it is made again.
    """
    rows, grad, posterior = rows_of(x), rows_of(grad), (weight, log_sigma2, levels, thresholds)
    (M, K), N = rows.shape, weight.shape[0]
    slope = _slope(rows, posterior, seed, offset, mode) if slope is None else slope.reshape(M, N).contiguous()
    tiles, flags = _tiles(M, x.dtype), {**flags_of_product(x, levels), "MODE": mode}
    grad_x = x.new_empty(0)
    if input_gradient:
        blocks = (triton.cdiv(K, tiles["BK"]), triton.cdiv(M, tiles["BM"]))
        splits, span = splits_of(blocks, N, tiles["BN"], x.device)
        grad_x = torch.empty((splits, M, K), device=x.device, dtype=x.dtype if splits == 1 else torch.float32)
        moment_linear_bwd_kernel_input[(*blocks, splits)](
            grad, slope, rows, *posterior, grad_x, M, N, K, grad.stride(0), rows.stride(0), span, **flags, **tiles
        )
        grad_x = sum_of_splits(grad_x, None, x.dtype).view(x.shape)
    grad_weight, grad_log_sigma2 = torch.empty_like(weight), torch.empty_like(weight)
    blocks = (triton.cdiv(N, WEIGHT_TILES["BN"]), triton.cdiv(K, WEIGHT_TILES["BK"]))
    sums = torch.empty((blocks[1], N, codebook_sums(levels.shape[1], mode)), device=x.device)
    moment_linear_bwd_kernel_weight[blocks](
        grad, slope, rows, *posterior, grad_weight, grad_log_sigma2, sums, M, N, K, grad.stride(0), rows.stride(0),
        sums.shape[2], **flags, **WEIGHT_TILES,
    )  # fmt: skip
    return grad_x, grad_weight, grad_log_sigma2, *codebook_gradients(sums, levels, thresholds)
