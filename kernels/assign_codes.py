"""assign_codes: the code of every weight, and the codes of a byte as digits of one number, in one pass.

Shapes: weight [N, K], thresholds [1 or N, M - 1], bytes [N, ceil(K / DIGITS)]; a plain code is a byte of one digit.
"""

import torch
import triton
import triton.language as tl

from bqnn.core.codes import digits_per_byte
from bqnn.kernels.launch import MATRIX_BLOCK, cdiv, power_of_2


@triton.jit
def assign_codes_kernel(
    p_weight,
    p_thresholds,
    p_bytes,
    N,
    K,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    DIGITS: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
):
    i_n, i_b = tl.program_id(0), tl.program_id(1)
    o_n, o_b = i_n * BN + tl.arange(0, BN), i_b * BB + tl.arange(0, BB)
    m_n = o_n < N
    # The digits of a byte are neighbours in a row, and those of a row one run: [BN, BB, BD].
    o_d = tl.arange(0, BD)[None, None, :]
    o_k = o_b[None, :, None] * DIGITS + o_d
    m_w = m_n[:, None, None] & (o_k < K) & (o_d < DIGITS)
    o_group = tl.where(m_n, o_n, 0)[:, None, None] * PER_CHANNEL
    # Below every threshold: what pads a byte is 0.
    weight = tl.load(p_weight + o_n.to(tl.int64)[:, None, None] * K + o_k, mask=m_w, other=float("-inf"))
    weight = weight.to(tl.float32)
    place = tl.full(o_d.shape, 1, tl.int32)  # M^d
    for d in tl.static_range(1, DIGITS):
        place *= tl.where(o_d >= d, NUM_LEVELS, 1)
    digit = tl.zeros(weight.shape, tl.int32)  # code M^d
    for j in tl.static_range(NUM_LEVELS - 1):
        threshold = tl.load(p_thresholds + o_group * (NUM_LEVELS - 1) + j).to(tl.float32)
        digit = tl.where(weight > threshold, (j + 1) * place, digit)
    width = tl.cdiv(K, DIGITS)
    o_byte = o_n.to(tl.int64)[:, None] * width + o_b[None, :]
    tl.store(p_bytes + o_byte, tl.sum(digit, axis=2).to(tl.uint8), mask=m_n[:, None] & (o_b < width)[None, :])


def assign_codes(weight, thresholds, packed):
    """uint8 in the weight's shape, or [N, packed_width]; tensors are contiguous and not empty."""
    N, K = weight.shape[0], weight.shape[1:].numel()
    num_levels = thresholds.shape[1] + 1
    digits = digits_per_byte(num_levels) if packed else 1
    width = cdiv(K, digits)
    codes = torch.empty((N, width) if packed else weight.shape, device=weight.device, dtype=torch.uint8)
    BD = power_of_2(digits)
    BB = min(MATRIX_BLOCK // BD, power_of_2(width))
    BN = MATRIX_BLOCK // (BB * BD)
    assign_codes_kernel[(cdiv(N, BN), cdiv(width, BB))](
        weight, thresholds, codes, N, K, NUM_LEVELS=num_levels, PER_CHANNEL=int(thresholds.shape[0] > 1),
        DIGITS=digits, BD=BD, BN=BN, BB=BB,
    )  # fmt: skip
    return codes
