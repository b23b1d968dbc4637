"""packed_conv2d: an implicit product of windows with a weight of codes, decoded field by field in registers.

Shapes: x [B, H, W, C] (channels-last), words [N, W'] (bqnn.ops.backends.gpu_layout), y [P, N]: P output pixels of all
images. A column of the product is a tap and a channel of the group, taps first.
"""

import math

import torch
import triton
import triton.language as tl

from bqnn.kernels import packed_linear
from bqnn.kernels.decode import codebook, decode, few_levels
from bqnn.kernels.launch import splits_of
from bqnn.kernels.packed import finish, flags_of_packed, quantize_rows, sum_of_parts

LEAST_BN = 16  # of a product: layers of few channels take no more


@triton.jit
def load_windows(
    p_pixel, m_m, o_top, o_left, o_k, K, C, CG, H, W, KW, dilation_h, dilation_w, PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """The columns o_k [BW] of the windows whose corner is p_pixel [BM, 1], in row o_top and column o_left [BM] of the
    image: OPERAND [BM, BW], 0 in the padding."""
    o_tap, o_c = o_k // CG, o_k % CG
    o_down, o_right = (o_tap // KW) * dilation_h, (o_tap % KW) * dilation_w
    m_x = m_m[:, None] & (o_k < K)[None, :]
    if PADDED:
        o_h, o_w = o_top[:, None] + o_down[None, :], o_left[:, None] + o_right[None, :]
        m_x = m_x & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)
    return tl.load(p_pixel + ((o_down * W + o_right) * C + o_c)[None, :], mask=m_x, other=0).to(OPERAND)


@triton.jit
def packed_conv2d_fwd_kernel(
    p_x,
    p_words,
    p_levels,
    p_scale,
    p_row_scale,
    p_bias,
    p_y,
    P,
    N,
    K,
    WORDS,
    C,
    H,
    W,
    OH,
    OW,
    KW,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    groups,
    span,
    BLOCK_WORDS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    OPERAND: tl.constexpr,
    INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLLED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2) // groups
    i_g = tl.program_id(2) % groups
    CG, NG = C // groups, N // groups
    o_m, o_ng = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    o_n = i_g * NG + o_ng
    m_m, m_n = o_m < P, o_ng < NG
    o_b, o_pixel = o_m // (OH * OW), o_m % (OH * OW)
    o_top, o_left = (o_pixel // OW) * stride_h - padding_h, (o_pixel % OW) * stride_w - padding_w
    o_x = ((o_b.to(tl.int64) * H + o_top) * W + o_left) * C + i_g * CG
    p_pixel, p_word = p_x + o_x[:, None], p_words + o_n.to(tl.int64)[:, None] * WORDS
    p_book = codebook(p_levels, tl.where(m_n, o_n, 0), PER_CHANNEL, STRIDE)
    c0, c1, c2, c3 = few_levels(p_book, NUM_LEVELS, OPERAND)
    b_y = tl.zeros((BM, BN), tl.int32 if INT8 else tl.float32)
    for first in range(i_s * span, tl.minimum(WORDS, (i_s + 1) * span), BW):
        o_w = first + tl.arange(0, BW)
        o_k = (o_w // BLOCK_WORDS) * (BLOCK_WORDS * PER_WORD) + o_w % BLOCK_WORDS
        b_words = tl.load(p_word + o_w[None, :], mask=m_n[:, None] & (o_w < WORDS)[None, :], other=0)
        if UNROLLED:
            for i in tl.static_range(PER_WORD):
                b_x = load_windows(
                    p_pixel, m_m, o_top, o_left, o_k + i * BLOCK_WORDS, K, C, CG, H, W, KW, dilation_h, dilation_w,
                    PADDED, OPERAND,
                )  # fmt: skip
                b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
                # [BM, BW] @ [BW, BN]
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee", out_dtype=b_y.dtype)
        else:
            for i in range(PER_WORD):
                b_x = load_windows(
                    p_pixel, m_m, o_top, o_left, o_k + i * BLOCK_WORDS, K, C, CG, H, W, KW, dilation_h, dilation_w,
                    PADDED, OPERAND,
                )  # fmt: skip
                b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
                # [BM, BW] @ [BW, BN]
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee", out_dtype=b_y.dtype)
    o_y = (i_s.to(tl.int64) * P + o_m)[:, None] * N + o_n[None, :]
    if not SPLIT:
        o_row = tl.where(m_m, o_b, 0)
        b_y = finish(b_y, p_scale, p_row_scale, p_bias, o_row, o_n, m_n, INT8, HAS_BIAS, PER_CHANNEL, RELU)
    tl.store(p_y + o_y, b_y, mask=m_m[:, None] & m_n[None, :])


def forward(
    x,
    words,
    num_levels,
    book,
    scale,
    bias,
    precision,
    block_words,
    relu,
    size,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
):
    """y [B, N, *size] in x's dtype, channels-last, of x [B, C, H, W], not empty; the rest as for packed_linear."""
    B, C, H, W = x.shape
    (OH, OW), N = size, words.shape[0]
    images = x.permute(0, 2, 3, 1).contiguous()
    row_scale = None
    if precision == "int8":
        images, row_scale = quantize_rows(images.view(B, -1))
    elif precision == "bf16":
        images = images.to(torch.bfloat16)
    flags = flags_of_packed(num_levels, book, scale, bias, precision, relu)
    P, K = B * OH * OW, C // groups * math.prod(kernel_size)
    y = torch.empty((P, N), device=x.device, dtype=x.dtype)
    if K == C and groups == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        if row_scale is not None:
            row_scale = row_scale[:, None].expand(B, H * W).contiguous().view(P)
        rows = images.view(P, C)
        packed_linear.multiply(rows, words, book, scale, row_scale, bias, y, precision, flags, block_words)
        return y.view(B, OH, OW, N).permute(0, 3, 1, 2)
    config = packed_linear.configuration("packed_conv2d", P, images, precision, flags, N // groups, words.shape[1])
    config["BN"] = min(config["BN"], max(LEAST_BN, triton.next_power_of_2(N // groups)))
    del config["kernel"]  # a product, always
    blocks = (triton.cdiv(P, config["BM"]), triton.cdiv(N // groups, config["BN"]))
    most = config.pop("most_splits")
    splits, span = splits_of((*blocks, groups), words.shape[1], config["BW"], x.device, most)
    sums = y
    if splits > 1:
        sums = torch.empty((splits, P, N), device=y.device, dtype=torch.int32 if precision == "int8" else torch.float32)
    packed_conv2d_fwd_kernel[(*blocks, splits * groups)](
        images, words, book, scale, row_scale, bias, sums, P, N, K, words.shape[1], C, H, W, OH, OW, kernel_size[1],
        *stride, *padding, *dilation, groups, span, block_words, PADDED=any(padding), SPLIT=splits > 1, **config,
        **flags,
    )  # fmt: skip
    if splits > 1:
        sum_of_parts(sums, scale, row_scale, bias, y, relu, rows_a_scale=OH * OW)
    return y.view(B, OH, OW, N).permute(0, 3, 1, 2)
