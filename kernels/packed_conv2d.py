"""packed_conv2d: an implicit product of windows with a weight of codes, decoded field by field in registers.

Shapes: x [B, H, W, C] (channels-last), words [N, W'] (bqnn.ops.backends.gpu_layout), y [P, N]: P output pixels of all
images. A column of the product is a tap and a channel of the group, taps first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bqnn.kernels import packed_linear
from bqnn.kernels.decode import codebook, decode, few_levels
from bqnn.kernels.launch import cdiv, power_of_2, splits_of
from bqnn.kernels.packed import Epilogue, finish, flags_of_packed, quantize_rows, sum_of_parts, sums_of

# A product's tile has at least so many channels, and for a layer of few channels no more.
LEAST_BN = 16


class Windows(NamedTuple):
    """Where a kernel finds the windows of images [B, H, W, C] that outputs [B, OH, OW, N] are made of."""

    C: int
    H: int
    W: int
    OH: int
    OW: int
    KW: int
    """Columns of taps."""
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    groups: int


@triton.jit
def load_windows(p_pixel, m_m, o_top, o_left, o_k, K, windows, PADDED: tl.constexpr, OPERAND: tl.constexpr):
    """The columns o_k [BW] of the windows whose corner is p_pixel [BM, 1], in row o_top and column o_left [BM] of the
    image: OPERAND [BM, BW], 0 in the padding."""
    CG, H, W = windows.C // windows.groups, windows.H, windows.W
    o_tap, o_c = o_k // CG, o_k % CG
    o_down = (o_tap // windows.KW) * windows.dilation_h
    o_right = (o_tap % windows.KW) * windows.dilation_w
    m_x = m_m[:, None] & (o_k < K)[None, :]
    if PADDED:
        o_h, o_w = o_top[:, None] + o_down[None, :], o_left[:, None] + o_right[None, :]
        m_x = m_x & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)
    return tl.load(p_pixel + ((o_down * W + o_right) * windows.C + o_c)[None, :], mask=m_x, other=0).to(OPERAND)


@triton.jit
def packed_conv2d_fwd_kernel(
    p_x,
    p_words,
    p_levels,
    epilogue,
    p_y,
    P,
    N,
    K,
    WORDS,
    windows,
    span,
    BLOCK_WORDS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    OPERAND: tl.constexpr,
    RELU: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLLED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    C, groups = windows.C, windows.groups
    H, W, OH, OW = windows.H, windows.W, windows.OH, windows.OW
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2) // groups
    i_g = tl.program_id(2) % groups
    CG, NG = C // groups, N // groups
    o_m, o_ng = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    o_n = i_g * NG + o_ng
    m_m, m_n = o_m < P, o_ng < NG
    o_b, o_pixel = o_m // (OH * OW), o_m % (OH * OW)
    o_top = (o_pixel // OW) * windows.stride_h - windows.padding_h
    o_left = (o_pixel % OW) * windows.stride_w - windows.padding_w
    o_x = ((o_b.to(tl.int64) * H + o_top) * W + o_left) * C + i_g * CG
    p_pixel, p_word = p_x + o_x[:, None], p_words + o_n.to(tl.int64)[:, None] * WORDS
    p_book = codebook(p_levels, tl.where(m_n, o_n, 0), PER_CHANNEL, STRIDE)
    c0, c1, c2, c3 = few_levels(p_book, NUM_LEVELS, OPERAND)
    b_y = tl.zeros((BM, BN), tl.float32 if epilogue.scale is None else tl.int32)
    for first in range(i_s * span, tl.minimum(WORDS, (i_s + 1) * span), BW):
        o_w = first + tl.arange(0, BW)
        o_k = (o_w // BLOCK_WORDS) * (BLOCK_WORDS * PER_WORD) + o_w % BLOCK_WORDS
        b_words = tl.load(p_word + o_w[None, :], mask=m_n[:, None] & (o_w < WORDS)[None, :], other=0)
        if UNROLLED:
            for i in tl.static_range(PER_WORD):
                o_i = o_k + i * BLOCK_WORDS
                b_x = load_windows(p_pixel, m_m, o_top, o_left, o_i, K, windows, PADDED, OPERAND)
                b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
                # [BM, BW] @ [BW, BN]
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee", out_dtype=b_y.dtype)
        else:
            for i in range(PER_WORD):
                o_i = o_k + i * BLOCK_WORDS
                b_x = load_windows(p_pixel, m_m, o_top, o_left, o_i, K, windows, PADDED, OPERAND)
                b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
                # [BM, BW] @ [BW, BN]
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee", out_dtype=b_y.dtype)
    o_y = (i_s.to(tl.int64) * P + o_m)[:, None] * N + o_n[None, :]
    if not SPLIT:
        o_row = tl.where(m_m, o_b, 0)
        b_y = finish(b_y, epilogue, o_row, o_n, m_n, PER_CHANNEL, RELU)
    tl.store(p_y + o_y, b_y, mask=m_m[:, None] & m_n[None, :])


def forward(x, weight, bias, precision, relu, geometry):
    """y [B, N, OH, OW] in x's dtype, channels-last, of x [B, C, H, W], not empty, and a Conv2dGeometry; the rest as for
    packed_linear."""
    B, C, H, W = x.shape
    (OH, OW), (N, words), groups = geometry.size(x), weight.words.shape, geometry.groups
    images = x.permute(0, 2, 3, 1).contiguous()
    row_scale = None
    if precision == "int8":
        images, row_scale = quantize_rows(images.view(B, -1))
    elif precision == "bf16":
        images = images.to(torch.bfloat16)
    P, K = B * OH * OW, geometry.columns(x)
    y = torch.empty((P, N), device=x.device, dtype=x.dtype)
    if K == C and groups == 1 and (*geometry.stride, *geometry.padding) == (1, 1, 0, 0):
        if row_scale is not None:
            row_scale = row_scale[:, None].expand(B, H * W).contiguous().view(P)
        epilogue = Epilogue(weight.scale, row_scale, bias)
        packed_linear.multiply(images.view(P, C), weight, epilogue, y, precision, relu)
        return y.view(B, OH, OW, N).permute(0, 3, 1, 2)
    epilogue, flags = Epilogue(weight.scale, row_scale, bias), flags_of_packed(weight, precision, relu)
    config = packed_linear.configuration("packed_conv2d", P, images, precision, flags, N // groups, words)
    config["BN"] = min(config["BN"], max(LEAST_BN, power_of_2(N // groups)))
    del config["kernel"]  # a convolution is always a product
    blocks = (cdiv(P, config["BM"]), cdiv(N // groups, config["BN"]))
    splits, span = splits_of((*blocks, groups), words, config["BW"], x.device, config.pop("most_splits"))
    sums = sums_of(y, splits, epilogue)
    kernel_size, stride, padding, dilation, _ = geometry
    windows = Windows(C, H, W, OH, OW, kernel_size[1], *stride, *padding, *dilation, groups)
    packed_conv2d_fwd_kernel[(*blocks, splits * groups)](
        images, weight.words, weight.levels, epilogue, sums, P, N, K, words, windows, span, PADDED=any(padding),
        SPLIT=splits > 1, **config, **flags,
    )  # fmt: skip
    if splits > 1:
        sum_of_parts(sums, epilogue, y, relu, rows_a_scale=OH * OW)
    return y.view(B, OH, OW, N).permute(0, 3, 1, 2)
