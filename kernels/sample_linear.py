"""sample_linear: the product with a weight that is sampled and quantized tile by tile, in registers.

Shapes: x [M, K], weight [N, K], y [M, N]. Every block of rows samples the whole weight again; see FUSED_ROWS.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.arguments import Noise, gradients_of
from bqnn.kernels.launch import (
    ALL_REGISTERS,
    architecture,
    fewer_stages,
    flags_of_product,
    grid_of,
    launch,
    rows_of,
    sum_of_splits,
)
from bqnn.kernels.quantizer import codebook_of, quantize
from bqnn.kernels.sample import sample_gradients, sampled_block, store_sample_gradients

# Up to here sampling in the product costs less than writing and reading the sampled weight. An estimate for an H200,
# not a measurement: a weight takes about 25 operations to sample, 8 bytes to read, and 4 to write and read in bfloat16.
FUSED_ROWS = 512


@triton.jit(do_not_specialize=["seed", "offset"])
def sample_linear_fwd_kernel(
    p_x,
    posterior,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    M,
    N,
    K,
    stride_x,
    span,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    noise = Noise(seed, offset)
    i_n, i_m, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    p_row = p_x + o_m.to(tl.int64)[:, None] * stride_x
    b_y = tl.zeros((BM, BN), tl.float32)
    for first in range(i_s * span, tl.minimum(K, (i_s + 1) * span), BK):
        o_k = first + tl.arange(0, BK)
        o_group = codebook_of(o_n, m_n, first, NUM_LEVELS, PER_CHANNEL)
        b_x = tl.load(p_row + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
        w, _ = sampled_block(posterior, noise, o_n, first, N, K, BK, ALIGNED)
        b_q = quantize(w, posterior, o_group, NUM_LEVELS).to(b_x.dtype)
        b_y = tl.dot(b_x, tl.trans(b_q), b_y, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = (i_s.to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    tl.store(p_y + o_y, b_y, mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["seed", "offset"])
def sample_linear_bwd_kernel_input(
    p_grad,
    posterior,
    seed: tl.int64,
    offset: tl.int64,
    p_grad_x,
    M,
    N,
    K,
    stride_grad,
    span,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    noise = Noise(seed, offset)
    i_k, i_m, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m, o_k = i_m * BM + tl.arange(0, BM), i_k * BK + tl.arange(0, BK)
    m_m = o_m < M
    p_row = p_grad + o_m.to(tl.int64)[:, None] * stride_grad
    b_grad_x = tl.zeros((BM, BK), tl.float32)
    for first in range(i_s * span, tl.minimum(N, (i_s + 1) * span), BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < N
        o_group = codebook_of(o_n, m_n, first, NUM_LEVELS, PER_CHANNEL)
        b_grad = tl.load(p_row + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        w, _ = sampled_block(posterior, noise, o_n, i_k * BK, N, K, BK, ALIGNED)
        b_q = quantize(w, posterior, o_group, NUM_LEVELS).to(b_grad.dtype)
        b_grad_x = tl.dot(b_grad, b_q, b_grad_x, input_precision=PRECISION)  # [BM, BN] @ [BN, BK]
    o_x = (i_s.to(tl.int64) * M + o_m)[:, None] * K + o_k[None, :]
    tl.store(p_grad_x + o_x, b_grad_x, mask=m_m[:, None] & (o_k < K)[None, :])


@triton.jit(do_not_specialize=["seed", "offset"])
def sample_linear_bwd_kernel_weight(
    p_grad,
    p_x,
    posterior,
    seed: tl.int64,
    offset: tl.int64,
    gradients,
    M,
    N,
    K,
    stride_grad,
    stride_x,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    noise = Noise(seed, offset)
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_n, m_k = o_n < N, o_k < K
    b_grad_weight = tl.zeros((BN, BK), tl.float32)
    for first in range(0, M, BM):
        o_m = first + tl.arange(0, BM)
        m_m, o_row = (o_m < M)[:, None], o_m.to(tl.int64)[:, None]
        b_grad = tl.load(p_grad + o_row * stride_grad + o_n[None, :], mask=m_m & m_n[None, :], other=0.0)
        b_x = tl.load(p_x + o_row * stride_x + o_k[None, :], mask=m_m & m_k[None, :], other=0.0)
        b_grad_weight = tl.dot(tl.trans(b_grad), b_x, b_grad_weight, input_precision=PRECISION)  # [BN, BM] @ [BM, BK]
    store_sample_gradients(b_grad_weight, posterior, noise, gradients, o_n, i_k, N, K, NUM_LEVELS, PER_CHANNEL, ALIGNED)


def _tiles(rows, dtype, columns):
    """Tile sizes and warps: the rows in as few blocks as registers allow, since each samples the weight anew."""
    if dtype == torch.float32:  # products of float32 take registers for their operands too
        return {"BM": min(_rows_of_block(rows), 64), "BN": 32, "BK": 32, "num_warps": 8}
    BM = min(_rows_of_block(rows), 256 if columns % 4 == 0 else 128)  # otherwise each weight takes a call of Philox
    stages = fewer_stages() if BM <= 32 else {}
    return {"BM": BM, "BN": 64, "BK": 32 if BM > 64 else 64, "num_warps": 8, **stages}


def _weight_tiles(dtype):
    """Those of the weight's gradient."""
    return {"BM": 32, "BN": 64, "BK": 32 if dtype == torch.float32 else 64, "num_warps": 8}


def _flags(x, posterior):
    """Those of a product. It takes all registers where each weight needs a call of Philox for itself, each channel has
    its own levels, or there are many levels in float32 or on targets other than sm_90."""
    codebooks, num_levels = posterior.levels.shape
    aligned = x.shape[-1] % 4 == 0
    costly = not aligned or codebooks > 1 or (x.dtype == torch.float32 and num_levels > 4)
    costly |= architecture() != 90 and num_levels > 3
    return {**flags_of_product(x, posterior), "ALIGNED": aligned, **(ALL_REGISTERS if costly else {})}


def _rows_of_block(rows):
    return max(16, 1 << (rows - 1).bit_length())  # the next power of two


def is_fused(x, posterior, product):
    """Whether the product, a LinearProduct, samples its weight; otherwise that is sampled once and torch multiplies."""
    return x.numel() <= FUSED_ROWS * x.shape[-1]


def forward(x, posterior, bias, noise, product):
    """y [..., N] in x's dtype, of x [..., K], neither empty; the posterior is contiguous, the product a
    LinearProduct."""
    rows = rows_of(x)
    (M, K), N = rows.shape, posterior.weight.shape[0]
    tiles = _tiles(M, x.dtype, K)
    grid, span = grid_of(N, tiles["BN"], M, tiles["BM"], K, tiles["BK"], x.device)
    whole = grid[2] == 1
    y = torch.empty((grid[2], M, N), device=x.device, dtype=x.dtype if whole else torch.float32)
    launch(
        sample_linear_fwd_kernel, grid,
        rows, posterior, bias if whole else None, noise.seed, noise.offset, y, M, N, K, rows.stride(0), span,
        **_flags(x, posterior), **tiles,
    )  # fmt: skip
    return sum_of_splits(y, bias, x.dtype).view(*x.shape[:-1], N)


def backward(grad, x, posterior, noise, input_gradient, product):
    """Gradients for x (empty if not asked for), weight, log_sigma2 (empty without it) and levels; grad [..., N]."""
    rows, grad = rows_of(x), rows_of(grad)
    (M, K), N = rows.shape, posterior.weight.shape[0]
    tiles, flags = _tiles(M, x.dtype, K), _flags(x, posterior)
    grad_x = x.new_empty(0)
    if input_gradient:
        grid, span = grid_of(K, tiles["BK"], M, tiles["BM"], N, tiles["BN"], x.device)
        grad_x = torch.empty((grid[2], M, K), device=x.device, dtype=x.dtype if grid[2] == 1 else torch.float32)
        launch(
            sample_linear_bwd_kernel_input, grid,
            grad, posterior, noise.seed, noise.offset, grad_x, M, N, K, grad.stride(0), span, **flags, **tiles,
        )  # fmt: skip
        grad_x = sum_of_splits(grad_x, None, x.dtype).view(x.shape)
    tiles = _weight_tiles(x.dtype)
    blocks = len(range(0, N, tiles["BN"])), len(range(0, K, tiles["BK"]))
    gradients = gradients_of(posterior, blocks[1], posterior.levels.shape[1])
    partitioned = posterior._replace(levels=None)  # an address that is not read costs registers on sm_100
    launch(
        sample_linear_bwd_kernel_weight, blocks,
        grad, rows, partitioned, noise.seed, noise.offset, gradients, M, N, K, grad.stride(0), rows.stride(0), **flags,
        **tiles,
    )  # fmt: skip
    return grad_x, *sample_gradients(gradients, posterior)
