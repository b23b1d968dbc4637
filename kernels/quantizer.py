"""The partition and the levels of a block of weights, as in ``bqnn.core.quantizer``.

A codebook's row is found with ``o_group`` of :func:`codebook_of`.
"""

import triton
import triton.language as tl


@triton.jit
def codebook_of(o_n, m_n, step, NUM_LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """The row of the codebook of channels o_n [BN], those outside the mask have the first: [BN, 1], or a scalar where
    channels share it, so that levels are loaded once.

    ``step``, 0 or a loop's variable that is never negative, keeps long codebooks in the loop: hoisted out of it they
    would fill the registers.
    """
    if PER_CHANNEL:
        o_first = tl.where(m_n, o_n, 0)[:, None]
        return o_first + tl.minimum(step, 0) if NUM_LEVELS > 4 else o_first
    else:
        return tl.minimum(step, 0) if NUM_LEVELS > 4 else tl.cast(0, tl.int32)


@triton.jit
def level_at(posterior, o_group, m, NUM_LEVELS: tl.constexpr):
    """Level c_m, float32, of o_group's shape."""
    return tl.load(posterior.levels + o_group * NUM_LEVELS + m).to(tl.float32)


@triton.jit
def threshold_at(posterior, o_group, j, NUM_LEVELS: tl.constexpr):
    """The threshold between levels j and j + 1, float32, of o_group's shape."""
    return tl.load(posterior.thresholds + o_group * (NUM_LEVELS - 1) + j).to(tl.float32)


@triton.jit
def quantize(w, posterior, o_group, NUM_LEVELS: tl.constexpr):
    """Q(w) = c_code(w), float32 [BN, BK]."""
    quantized = tl.broadcast_to(level_at(posterior, o_group, 0, NUM_LEVELS), w.shape)
    for j in tl.static_range(NUM_LEVELS - 1):
        level = level_at(posterior, o_group, j + 1, NUM_LEVELS)
        quantized = tl.where(w > threshold_at(posterior, o_group, j, NUM_LEVELS), level, quantized)
    return quantized


@triton.jit
def partition(w, posterior, o_group, NUM_LEVELS: tl.constexpr):
    """code(w) = #{j : w > t_j}, int32 [BN, BK]."""
    code = tl.zeros(w.shape, tl.int32)
    for j in tl.static_range(NUM_LEVELS - 1):
        code += (w > threshold_at(posterior, o_group, j, NUM_LEVELS)).to(tl.int32)
    return code


@triton.jit
def store_level_sums(values, code, p_sums, o_n, m_n, NUM_LEVELS: tl.constexpr):
    """The sums of ``values`` [BN, BK] over each cell of each row, to p_sums[row, level]."""
    for m in range(NUM_LEVELS):
        sums = tl.sum(tl.where(code == m, values, 0.0), axis=1)
        tl.store(p_sums + o_n * NUM_LEVELS + m, sums, mask=m_n)
