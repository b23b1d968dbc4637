"""What the packed products share: 8-bit integers of rows, the end of a product, the sum of a split one."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bqnn.kernels.launch import MATRIX_BLOCK, blocks_of_matrix, cdiv, power_of_2

CODE_BITS = {2: 1, 3: 2, 4: 2}  # more levels take 4, as in bqnn.ops.backends.gpu_layout


class Epilogue(NamedTuple):
    """What a kernel does with its sums, one argument of it."""

    scale: Tensor | None
    """float32 [1 or N], those of the codebooks, where the sums are of integers."""
    row_scale: Tensor | None
    """Likewise float32 [M], those of the rows."""
    bias: Tensor | None
    """[N]."""


@triton.jit
def quantize_rows_kernel(p_x, p_largest, p_q, p_scale, K, BK: tl.constexpr):
    """The rule of bqnn.core.int8.quantize_rows, each operation rounded as there."""
    i_m, i_k = tl.program_id(0), tl.program_id(1)
    o_k = i_k * BK + tl.arange(0, BK)
    o_x = i_m.to(tl.int64) * K + o_k
    m_k = o_k < K
    x = tl.load(p_x + o_x, mask=m_k, other=0.0).to(tl.float32)
    largest = tl.load(p_largest + i_m).to(tl.float32)
    finite = largest < float("inf")  # NaN is not below it either
    factor = tl.where(largest < 5.421010862427522e-20, 1.8446744073709552e19, 1.0)  # 2^-64, 2^64
    scaled = (x * factor) * tl.div_rn(largest * 0.0 + 127.0, largest * factor)
    q = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
    q = tl.where(finite & (largest > 0.0), tl.minimum(tl.maximum(q, -127.0), 127.0), 0.0)
    tl.store(p_q + o_x, q.to(tl.int8), mask=m_k)
    if i_k == 0:
        scale = tl.div_rn(largest, largest * 0.0 + 127.0)
        tl.store(p_scale + i_m, tl.where(finite, scale, float("nan")))


@triton.jit
def finish(b_y, epilogue, o_row, o_n, m_n, PER_CHANNEL: tl.constexpr, RELU: tl.constexpr):
    """The output of sums b_y [BM, BN]: times the codebooks' scales and those of rows o_row [BM], plus the bias, or the
    ReLU of it."""
    y = b_y.to(tl.float32)
    if epilogue.scale is not None:
        y = y * tl.load(epilogue.scale + o_n * PER_CHANNEL, mask=m_n, other=0.0)[None, :]
        y = y * tl.load(epilogue.row_scale + o_row)[:, None]
    if epilogue.bias is not None:
        y += tl.load(epilogue.bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN and -0.0 stay, as in torch
    return y


@triton.jit
def packed_sum_kernel(
    p_parts,
    epilogue,
    p_y,
    M,
    N,
    stride_part,
    rows_a_scale,
    SPLITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RELU: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    o_m, o_n = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    m_y = m_m[:, None] & m_n[None, :]
    p_part = p_parts + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    b_y = tl.load(p_part, mask=m_y, other=0)
    for _ in tl.static_range(1, SPLITS):
        p_part += stride_part
        b_y += tl.load(p_part, mask=m_y, other=0)
    o_row = tl.where(m_m, o_m, 0) // rows_a_scale
    y = finish(b_y, epilogue, o_row, o_n, m_n, PER_CHANNEL, RELU)
    tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], y, mask=m_y)


def quantize_rows(x):
    """8-bit integers of the contiguous matrix x and the scales, float32, of its rows."""
    M, K = x.shape
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1)
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty_like(largest, dtype=torch.float32)
    BK = min(4 * MATRIX_BLOCK, max(16, power_of_2(K)))
    quantize_rows_kernel[(M, cdiv(K, BK))](x, largest, q, scale, K, BK, enable_fp_fusion=False)
    return q, scale


def flags_of_packed(weight, precision, relu):
    """The flags of a product with a PackedWeight."""
    operand = {"fp32": tl.float32, "bf16": tl.bfloat16, "int8": tl.int8}[precision]
    return {
        "BLOCK_WORDS": weight.block_words,
        "NUM_LEVELS": weight.num_levels,
        "BITS": CODE_BITS.get(weight.num_levels, 4),
        "PER_CHANNEL": int(weight.levels.shape[0] > 1),
        "STRIDE": weight.levels.stride(0),
        "OPERAND": operand,
        "RELU": relu,
        # Contracted to a fused multiply-add, the end of an integer product would round once where the rule says twice.
        "enable_fp_fusion": weight.scale is None,
    }


def sums_of(y, splits, epilogue):
    """Where a product in so many splits writes its sums: y [M, N] itself, or parts [S, M, N]."""
    if splits == 1:
        return y
    dtype = torch.float32 if epilogue.scale is None else torch.int32
    return torch.empty((splits, *y.shape), device=y.device, dtype=dtype)


def sum_of_parts(parts, epilogue, y, relu, rows_a_scale=1):
    """Fills y [M, N] from the split sums ``parts`` [S, M, N]; ``rows_a_scale`` rows share a scale."""
    splits, M, N = parts.shape
    grid, blocks = blocks_of_matrix(M, N)
    scale = epilogue.scale
    packed_sum_kernel[grid](
        parts, epilogue, y, M, N, M * N, rows_a_scale, SPLITS=splits,
        PER_CHANNEL=int(scale is not None and scale.shape[0] > 1), RELU=relu, **blocks, enable_fp_fusion=scale is None,
    )  # fmt: skip
    return y
