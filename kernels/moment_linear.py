"""moment_linear: mean and variance of the outputs from one load of x and of the weight's parameters.

Shapes: x [M, K], weight [N, K], y [M, N]. Every block of rows makes the moments of the whole weight again; see
``is_fused``. The rows may be the pixels of images, ``pixels`` of each: noise counts outputs [images, N, pixels] then.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.arguments import gradients_of
from bqnn.kernels.launch import (
    architecture,
    fewer_stages,
    flags_of_product,
    grid_of,
    launch,
    registers_of_product,
    rows_of,
    sum_of_splits,
)
from bqnn.kernels.moment import (
    codebook_sums,
    moment_gradients,
    store_moment_gradients,
    weight_moments,
)
from bqnn.kernels.noise import add_noise, noisy
from bqnn.kernels.philox import normals_of_outputs, normals_of_rows
from bqnn.kernels.quantizer import codebook_of

# A tile of the outputs, or of the gradient of x, has so many warps.
WARPS = 8
# Operations a weight that may be spent on making moments again, in all row blocks but the first, before it costs more
# than writing and reading them. An estimate for an H200, not a measurement: 8 bytes of two moments in bfloat16, written
# and read, take as long as 54 operations.
OPERATIONS_FUSED = 54
OPERATIONS_OF_THRESHOLD = 25
OPERATIONS_OF_GAUSSIAN = 8


@triton.jit(do_not_specialize=["seed", "offset"])
def moment_linear_fwd_kernel(
    p_x,
    posterior,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    p_slope,
    p_variance,
    M,
    N,
    K,
    pixels,
    stride_x,
    span,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    IMAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Without p_variance: y, and with p_slope the slope. Otherwise parts of the variance, and with p_y of the mean."""
    i_n, i_m, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    p_row = p_x + o_m.to(tl.int64)[:, None] * stride_x
    b_mean = tl.zeros((BM, BN), tl.float32)
    b_variance = tl.zeros((BM, BN), tl.float32)
    for first in range(i_s * span, tl.minimum(K, (i_s + 1) * span), BK):
        o_k = first + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_group = codebook_of(o_n, m_n, first, NUM_LEVELS, PER_CHANNEL)
        b_x = tl.load(p_row + o_k[None, :], mask=m_m[:, None] & m_k, other=0.0)
        o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        b_e, b_v = weight_moments(posterior, o_w, m_n[:, None] & m_k, o_group, NUM_LEVELS, MODE)
        # [BM, BK] @ [BK, BN]
        if p_y is not None:
            b_mean = tl.dot(b_x, tl.trans(b_e.to(b_x.dtype)), b_mean, input_precision=PRECISION)
        b_variance = tl.dot(b_x * b_x, tl.trans(b_v.to(b_x.dtype)), b_variance, input_precision=PRECISION)
    if p_bias is not None:
        b_mean += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = (i_s.to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if p_variance is None:
        if IMAGES:
            normals = normals_of_outputs(seed, offset, i_m, o_n, N, pixels, BM, ALIGNED)
        else:
            normals = normals_of_rows(seed, offset, o_m, i_n * BN, N, BN, ALIGNED)
        b_mean, b_slope = add_noise(b_mean, b_variance, normals, p_slope is not None)
        if p_slope is not None:
            tl.store(p_slope + o_y, b_slope, mask=m_y)
    else:
        tl.store(p_variance + o_y, b_variance, mask=m_y)
    if p_y is not None:
        tl.store(p_y + o_y, b_mean, mask=m_y)


@triton.jit
def moment_linear_bwd_kernel_input(
    p_grad,
    p_slope,
    p_x,
    posterior,
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
        o_group = codebook_of(o_n, m_n, first, NUM_LEVELS, PER_CHANNEL)
        b_e, b_v = weight_moments(posterior, o_w, m_n[:, None] & m_k, o_group, NUM_LEVELS, MODE)
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
    posterior,
    gradients,
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
    BR: tl.constexpr,
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
    # The sums go through the outputs, a few rows at a time: registers hold the two of them, but not what gradients need
    # beside.
    o_tile = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    m_tile = m_n[:, None] & m_k
    tl.store(gradients.weight + o_tile, b_grad_mean, mask=m_tile)
    tl.store(gradients.log_sigma2 + o_tile, b_grad_variance, mask=m_tile)
    tl.debug_barrier()
    for first in range(i_n * BN, tl.minimum(N, (i_n + 1) * BN), BR):
        o_r = first + tl.arange(0, BR)
        m_r = o_r < N
        o_w = o_r.to(tl.int64)[:, None] * K + o_k[None, :]
        m_w = m_r[:, None] & m_k
        grad_mean = tl.load(gradients.weight + o_w, mask=m_w, other=0.0).to(tl.float32)
        grad_variance = tl.load(gradients.log_sigma2 + o_w, mask=m_w, other=0.0).to(tl.float32)
        p_sums = gradients.sums + i_k.to(tl.int64) * N * sums
        store_moment_gradients(
            grad_mean, grad_variance, posterior, gradients, p_sums, o_r, m_r, o_w, m_w, NUM_LEVELS, PER_CHANNEL, MODE
        )


def _rows_of_block(rows, dtype):
    """The rows in as few blocks as registers have two accumulators for, since each makes the moments anew."""
    return min(max(16, 1 << (rows - 1).bit_length()), 64 if dtype == torch.float32 else 128)


def _width(dtype):
    """Columns of a tile of the outputs, or of the gradient of x; before sm_90 operands take registers too, and those of
    float32 always do."""
    return 32 if dtype == torch.float32 or architecture() < 90 else 64


def _step(dtype):
    """Contracted indices that such a tile takes at once."""
    return 16 if dtype == torch.float32 else 32


def _limits(dtype):
    """On sm_100 ptxas spills where Triton prefetches operands of float32."""
    stages = {"num_stages": 1} if dtype == torch.float32 and architecture() >= 100 else {}
    return {**stages, **registers_of_product(dtype)}


def _weight_tiles(dtype, columns):
    """Those of the weight's gradient; BR is the rows at its end that are finished at once."""
    if dtype == torch.float32:  # products of float32 take registers for their operands too
        return {"BM": 16, "BN": 32, "BK": 64, "BR": 8, "num_warps": 4, **fewer_stages()}
    warps = 4 if columns % 4 == 0 else 8  # otherwise each weight takes a call of Philox, and 4 would spill
    return {"BM": 32, "BN": 64, "BK": 128, "BR": 8, "num_warps": warps}


def _grid(x, columns, length):
    """Grid, and a part's share of the contraction, of a product [rows of x, length] @ [length, columns]."""
    BM, BN, BK = _rows_of_block(len(x), x.dtype), _width(x.dtype), _step(x.dtype)
    return grid_of(columns, BN, len(x), BM, length, BK, x.device)


def is_fused(x, posterior, mode, product):
    """Whether the product, a LinearProduct, makes the weight's moments; otherwise they are made once and torch
    multiplies."""
    thresholds = posterior.thresholds.shape[1]
    cost = OPERATIONS_OF_THRESHOLD * thresholds if mode == "categorical" else OPERATIONS_OF_GAUSSIAN
    rows = x.numel() // x.shape[-1]
    blocks_again = (rows - 1) // _rows_of_block(rows, x.dtype)
    return blocks_again * cost <= OPERATIONS_FUSED


def _write_outputs(x, posterior, bias, noise, mode, y, slope, pixels):
    """Writes y [M, N] and dy/dvariance, or one of them, as ``noisy`` does."""
    (M, K), N = x.shape, posterior.weight.shape[0]
    grid, span = _grid(x, N, K)

    def multiply(bias, y, slope, variance):
        launch(
            moment_linear_fwd_kernel, grid,
            x, posterior, bias, noise.seed, noise.offset, y, slope, variance, M, N, K, pixels, x.stride(0), span,
            MODE=mode, IMAGES=pixels > 1, ALIGNED=(N if pixels == 1 else pixels) % 4 == 0,
            **flags_of_product(x, posterior), BM=_rows_of_block(M, x.dtype), BN=_width(x.dtype), BK=_step(x.dtype),
            num_warps=WARPS, **_limits(x.dtype),
        )  # fmt: skip

    if grid[2] == 1 and y is not None:
        multiply(bias, y, slope, None)
        return
    variance = torch.empty((grid[2], M, N), device=x.device)
    mean = None if y is None else torch.empty_like(variance)
    multiply(None, mean, None, variance)
    mean, variance, y, slope = (_as_images(outputs, pixels) for outputs in (mean, variance, y, slope))
    noisy(mean, variance, noise, y, slope, bias)


def _as_images(outputs, pixels):
    """Outputs [..., M, N] as images [..., B, N, pixels, 1], which they are in channels-last order."""
    if outputs is None or pixels == 1:
        return outputs
    return outputs.unflatten(-2, (-1, pixels)).mT.unsqueeze(-1)


def forward(x, posterior, bias, noise, mode, coarse, product, pixels=1):
    """y [..., N] in x's dtype, of x [..., K], and dy/dvariance in bfloat16 if ``coarse``, else an empty tensor.

    Nothing is empty; the posterior is contiguous, the product a LinearProduct.
    """
    y = torch.empty((*x.shape[:-1], posterior.weight.shape[0]), device=x.device, dtype=x.dtype)
    slope = torch.empty_like(y, dtype=torch.bfloat16) if coarse else None
    outputs = (None if tensor is None else tensor.view(-1, tensor.shape[-1]) for tensor in (y, slope))
    _write_outputs(rows_of(x), posterior, bias, noise, mode, *outputs, pixels)
    return y, y.new_empty(0) if slope is None else slope


def backward(grad, slope, x, posterior, noise, mode, input_gradient, product, pixels=1):
    """Gradients for x (empty if not asked for), weight, log_sigma2, levels and thresholds; grad [..., N].

    Without ``slope``, dy/dvariance [..., N], it is made again.
    """
    rows, grad = rows_of(x), rows_of(grad)
    (M, K), N = rows.shape, posterior.weight.shape[0]
    if slope is None:
        slope = torch.empty((M, N), device=x.device, dtype=x.dtype)
        _write_outputs(rows, posterior, None, noise, mode, None, slope, pixels)
    slope, flags = slope.contiguous(), {**flags_of_product(x, posterior), "MODE": mode}
    grad_x = x.new_empty(0)
    if input_gradient:
        grid, span = _grid(rows, K, N)
        grad_x = torch.empty((grid[2], M, K), device=x.device, dtype=x.dtype if grid[2] == 1 else torch.float32)
        launch(
            moment_linear_bwd_kernel_input, grid,
            grad, slope, rows, posterior, grad_x, M, N, K, grad.stride(0), rows.stride(0), span, **flags,
            BM=_rows_of_block(M, x.dtype), BN=_step(x.dtype), BK=_width(x.dtype), num_warps=WARPS,
            **_limits(x.dtype),
        )  # fmt: skip
        grad_x = sum_of_splits(grad_x, None, x.dtype).view(x.shape)
    tiles = _weight_tiles(x.dtype, K)
    blocks = len(range(0, N, tiles["BN"])), len(range(0, K, tiles["BK"]))
    gradients = gradients_of(posterior, blocks[1], codebook_sums(posterior.levels.shape[1], mode))
    launch(
        moment_linear_bwd_kernel_weight, blocks,
        grad, slope, rows, posterior, gradients, M, N, K, grad.stride(0), rows.stride(0), gradients.sums.shape[2],
        **flags, **tiles,
    )  # fmt: skip
    return grad_x, *moment_gradients(gradients, posterior)
