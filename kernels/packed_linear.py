"""packed_linear: the product with a weight of codes, decoded field by field in registers.

Shapes: x [M, K], words [N, W] (bqnn.ops.backends.gpu_layout), y [M, N]. A single row is multiplied as it is decoded;
more rows go through tensor cores, a product for each field of a tile of words.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels.decode import codebook, decode, few_levels
from bqnn.kernels.launch import ALL_REGISTERS, MAX_SPLITS, architecture, cdiv, processors, rows_of, splits_of
from bqnn.kernels.packed import Epilogue, finish, flags_of_packed, quantize_rows, sum_of_parts, sums_of

# Up to so many rows, each takes a pass of its own over the words. Float32 products are FMA, for which tiles of a few
# rows are padded to 16.
GEMV_ROWS = {"fp32": 3, "bf16": 1, "int8": 1}
# A block takes so many words at once: four 16-byte loads a lane before the first is used.
GEMV_WORDS = 2048

# Tiles by precision and rows: the first whose BM is not below the rows, else the last. BW words are BW columns of each
# of the products that a tile of words takes, one for every field of a word.
TILES = {
    "fp32": ({"BM": 16, "BN": 64, "BW": 16}, {"BM": 32, "BN": 64, "BW": 16}, {"BM": 64, "BN": 64, "BW": 16}),
    "bf16": (
        {"BM": 16, "BN": 64, "BW": 32},
        {"BM": 32, "BN": 64, "BW": 32},
        {"BM": 64, "BN": 128, "BW": 16},
        {"BM": 128, "BN": 128, "BW": 16},
    ),
    "int8": (
        {"BM": 16, "BN": 64, "BW": 32},
        {"BM": 32, "BN": 64, "BW": 32},
        {"BM": 64, "BN": 64, "BW": 32},
        {"BM": 128, "BN": 128, "BW": 32},
    ),
}

# Activations on their way take no more than so many bytes, over all stages, which leaves room for the decoded tile.
STAGE_BYTES = 128 * 1024


@triton.jit
def load_columns(p_row, m_m, o_k, K, OPERAND: tl.constexpr):
    """The columns o_k [BW] of rows p_row [BM, 1]: OPERAND [BM, BW], 0 beyond the last row and column."""
    m_x = m_m[:, None] & (o_k < K)[None, :]
    return tl.load(p_row + o_k[None, :], mask=m_x, other=0).to(OPERAND)


@triton.jit
def packed_linear_gemv_kernel(
    p_x,
    p_words,
    p_levels,
    epilogue,
    p_y,
    N,
    K,
    W,
    stride_x,
    BLOCK_WORDS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    OPERAND: tl.constexpr,
    RELU: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    SUM: tl.constexpr = tl.float32 if epilogue.scale is None else tl.int32
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n, o_m = i_n * BN + tl.arange(0, BN), i_m + tl.arange(0, 1)
    m_n = o_n < N
    p_row, p_word = p_x + i_m.to(tl.int64) * stride_x, p_words + o_n.to(tl.int64)[:, None] * W
    p_book = codebook(p_levels, tl.where(m_n, o_n, 0), PER_CHANNEL, STRIDE)
    c0, c1, c2, c3 = few_levels(p_book, NUM_LEVELS, OPERAND)
    b_sum = tl.zeros((BN, BW), SUM)
    for first in range(0, W, BW):
        o_w = first + tl.arange(0, BW)
        o_k = (o_w // BLOCK_WORDS) * (BLOCK_WORDS * PER_WORD) + o_w % BLOCK_WORDS
        b_words = tl.load(p_word + o_w[None, :], mask=m_n[:, None] & (o_w < W)[None, :], other=0)
        for i in tl.static_range(PER_WORD):
            o_x = o_k + i * BLOCK_WORDS
            b_x = tl.load(p_row + o_x, mask=o_x < K, other=0).to(OPERAND).to(SUM)
            b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
            b_sum += b_w.to(SUM) * b_x[None, :]
    b_y = tl.sum(b_sum, axis=1)[None, :]
    y = finish(b_y, epilogue, o_m, o_n, m_n, PER_CHANNEL, RELU)
    tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], y, mask=m_n[None, :])


@triton.jit
def packed_linear_fwd_kernel(
    p_x,
    p_words,
    p_levels,
    epilogue,
    p_y,
    M,
    N,
    K,
    W,
    stride_x,
    span,
    BLOCK_WORDS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    OPERAND: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLLED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    p_row, p_word = p_x + o_m.to(tl.int64)[:, None] * stride_x, p_words + o_n.to(tl.int64)[:, None] * W
    p_book = codebook(p_levels, tl.where(m_n, o_n, 0), PER_CHANNEL, STRIDE)
    c0, c1, c2, c3 = few_levels(p_book, NUM_LEVELS, OPERAND)
    b_y = tl.zeros((BM, BN), tl.float32 if epilogue.scale is None else tl.int32)
    for first in range(i_s * span, tl.minimum(W, (i_s + 1) * span), BW):
        o_w = first + tl.arange(0, BW)
        o_k = (o_w // BLOCK_WORDS) * (BLOCK_WORDS * PER_WORD) + o_w % BLOCK_WORDS
        b_words = tl.load(p_word + o_w[None, :], mask=m_n[:, None] & (o_w < W)[None, :], other=0)
        if UNROLLED:
            for i in tl.static_range(PER_WORD):
                b_x = load_columns(p_row, m_m, o_k + i * BLOCK_WORDS, K, OPERAND)
                b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
                # [BM, BW] @ [BW, BN]
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee", out_dtype=b_y.dtype)
        else:
            for i in range(PER_WORD):
                b_x = load_columns(p_row, m_m, o_k + i * BLOCK_WORDS, K, OPERAND)
                b_w = decode(b_words, i, p_book, c0, c1, c2, c3, NUM_LEVELS, BITS, OPERAND)
                # [BM, BW] @ [BW, BN]
                b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee", out_dtype=b_y.dtype)
    o_y = (i_s.to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    if not SPLIT:
        o_row = tl.where(m_m, o_m, 0)
        b_y = finish(b_y, epilogue, o_row, o_n, m_n, PER_CHANNEL, RELU)
    tl.store(p_y + o_y, b_y, mask=m_m[:, None] & m_n[None, :])


def from_tile(tile, x_bytes, precision, flags):
    """The configuration of a product with these tile sizes, for activations of so many bytes.

    Float32 takes its fields in a loop: unrolled, its FMA would not fit the instruction cache.
    """
    per_word = 32 // flags["BITS"]
    # Triton 3.8 makes a trap of products that follow each other in a pipeline, where they go through tensor memory.
    through_tensor_memory = architecture() >= 100 and tile["BM"] >= 64
    unrolled = precision != "fp32" and not through_tensor_memory
    tile = dict(tile)
    if per_word == 32 and precision == "bf16":
        tile["BW"] = 16  # 32 fields of twice as many columns would leave no room for a second stage
    # sm_80 would spill levels of each channel in registers, pointers to those of each, and 32 fields of wide tiles.
    wide = tile["BM"] * tile["BW"] >= 64 * 32 or (precision == "fp32" and per_word == 8 and tile["BM"] >= 64)
    if (flags["PER_CHANNEL"] and wide) or (precision == "bf16" and per_word == 32 and tile["BM"] == 64):
        tile["BN"] //= 2
    stage = tile["BM"] * tile["BW"] * x_bytes * (per_word if unrolled else 1)
    return {
        "kernel": "product",
        **tile,
        "UNROLLED": unrolled,
        "num_warps": 8 if tile["BM"] * tile["BN"] > 64 * 64 else 4,
        "num_stages": max(1, min(3, STAGE_BYTES // stage)) if unrolled else 1 if through_tensor_memory else 2,
        "most_splits": MAX_SPLITS,
    }


def tiles_for(lines):
    """Those that are for the present architecture: with tensor memory, 128 rows spill what they load."""
    return [line for line in lines if architecture() < 100 or line["BM"] < 128]


def gemv_config(words, channels, device):
    BW = min(512, triton.next_power_of_2(words))
    BN = min(GEMV_WORDS // BW, triton.next_power_of_2(max(1, channels // (4 * processors(device)))))
    return {"kernel": "gemv", "BN": BN, "BW": BW, "num_warps": 4}


def configuration(op, rows, x, precision, flags, channels, words):
    """How a packed product of so many rows of x, as the kernel loads it, with so many channels is launched."""
    if op == "packed_linear" and GEMV_ROWS[precision] >= rows:
        return gemv_config(words, channels, x.device)
    lines = tiles_for(TILES[precision])
    int8_window = op == "packed_conv2d" and precision == "int8"
    if int8_window and architecture() < 90:
        lines = lines[:-1]  # a window takes an address a pixel: 128 of them would be spilled
    tile = next((line for line in lines if line["BM"] >= rows), lines[-1])
    config = from_tile(tile, x.element_size(), precision, flags)
    if op == "packed_conv2d":  # its gathered addresses take registers too, which would be spilled
        few_rows = flags["BITS"] == 4 and config["BM"] == 16 and not (int8_window and flags["PER_CHANNEL"])
        few_warps = few_rows or (int8_window and config["BM"] == 64 and architecture() < 90)
        config["num_warps"] = 4 if few_warps else 8
        if int8_window and config["BM"] == 128:
            config["num_stages"] = 1
        if precision == "bf16" and flags["BITS"] == 1 and config["BM"] == 64:
            config["BN"] //= 2
        if architecture() >= 100 and (flags["BITS"] == 4 if precision == "bf16" else flags["NUM_LEVELS"] == 4):
            config.update(ALL_REGISTERS)
    return config


def forward(x, weight, bias, precision, relu):
    """y [..., N] in x's dtype, its ReLU with ``relu``, of x [..., K], not empty, and a PackedWeight."""
    rows = rows_of(x)
    y = torch.empty((rows.shape[0], weight.words.shape[0]), device=x.device, dtype=x.dtype)
    row_scale = None
    if precision == "int8":
        rows, row_scale = quantize_rows(rows.contiguous())
    multiply(rows, weight, Epilogue(weight.scale, row_scale, bias), y, precision, relu)
    return y.view(*x.shape[:-1], -1)


def multiply(rows, weight, epilogue, y, precision, relu):
    """Fills y [M, N] with the product of rows [M, K], integers for "int8", and a PackedWeight."""
    words, flags = weight.words, flags_of_packed(weight, precision, relu)
    (M, K), (N, W) = rows.shape, words.shape
    if precision == "bf16" and GEMV_ROWS[precision] < M:
        rows = rows.to(torch.bfloat16)  # this rounds once, not in every block of channels
    config = configuration("packed_linear", M, rows, precision, flags, N, W)
    if config.pop("kernel") == "gemv":
        packed_linear_gemv_kernel[(cdiv(N, config["BN"]), M)](
            rows, words, weight.levels, epilogue, y, N, K, W, rows.stride(0), **config, **flags
        )
        return y
    blocks = (cdiv(M, config["BM"]), cdiv(N, config["BN"]))
    splits, span = splits_of(blocks, W, config["BW"], rows.device, config.pop("most_splits"))
    sums = sums_of(y, splits, epilogue)
    packed_linear_fwd_kernel[(*blocks, splits)](
        rows, words, weight.levels, epilogue, sums, M, N, K, W, rows.stride(0), span, SPLIT=splits > 1, **config,
        **flags,
    )  # fmt: skip
    return y if splits == 1 else sum_of_parts(sums, epilogue, y, relu)
