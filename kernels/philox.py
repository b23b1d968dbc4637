"""Standard normal numbers inside a kernel: those of ``bqnn.core.philox``, from (seed, offset, logical index)."""

import triton
import triton.language as tl


@triton.jit
def sincos_turns(turns):
    """sin and cos of 0 <= turns <= 1 full turns; libdevice's would keep a table in local memory for large angles."""
    quarter = tl.floor(turns * 4.0 + 0.5)
    r = turns - quarter * 0.25
    square = r * r
    s = r * (6.2831855 + square * (-41.341663 + square * (81.592354 + square * -75.39356)))
    c = 1.0 + square * (-19.739208 + square * (64.93932 + square * (-85.44374 + square * 59.24596)))
    q = quarter.to(tl.int32)
    odd = (q & 1) != 0
    # A quarter turn takes (sin, cos) to (cos, -sin).
    sin = tl.where((q & 2) != 0, -1.0, 1.0) * tl.where(odd, c, s)
    cos = tl.where(((q + 1) & 2) != 0, -1.0, 1.0) * tl.where(odd, s, c)
    return sin, cos


@triton.jit
def box_muller(radius_word, angle_word):
    """The normals of two words, of which 24 bits each make a uniform number."""
    uniform = ((radius_word >> 8).to(tl.int32).to(tl.float32) + 1.0) * 5.9604644775390625e-08  # 2^-24
    turns = (angle_word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    sin, cos = sincos_turns(turns)
    return radius * cos, radius * sin


@triton.jit
def random_words(seed, call):
    """The four words of each call, an int64 block."""
    zero = tl.zeros(call.shape, tl.uint32)
    return tl.philox(seed, (call & 0xFFFFFFFF).to(tl.uint32), ((call >> 32) & 0xFFFFFFFF).to(tl.uint32), zero, zero)


@triton.jit
def normals_at(seed, offset, index):
    """The normal of each logical index, an int64 block; a call of Philox for each."""
    w0, w1, w2, w3 = random_words(seed, offset + (index >> 2))
    second = (index & 2) != 0
    even, odd = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((index & 1) != 0, odd, even)


@triton.jit
def normals_of_calls(seed, call):
    """The four normals of each call [R, C], side by side: float32 [R, 4 C]."""
    w0, w1, w2, w3 = random_words(seed, call)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [R, C, 2, 2]
    return tl.reshape(quads, (call.shape[0], 4 * call.shape[1]))


@triton.jit
def normals_of_rows(seed, offset, o_row, first, columns, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """The normals of rows o_row [R] and the columns from ``first`` on of a matrix with ``columns`` columns.

    float32 [R, COLUMNS]. ALIGNED says that ``columns`` and ``first`` are multiples of 4, so that a call serves four
    neighbours.
    """
    row = o_row.to(tl.int64) * columns
    if ALIGNED:
        o_quad = first // 4 + tl.arange(0, COLUMNS // 4)
        return normals_of_calls(seed, offset + (row // 4)[:, None] + o_quad[None, :])
    else:
        return normals_at(seed, offset, row[:, None] + (first + tl.arange(0, COLUMNS))[None, :])


@triton.jit
def normals_of_outputs(seed, offset, i_m, o_row, outputs, size, BM: tl.constexpr, ALIGNED: tl.constexpr):
    """The normals of outputs counted in [B, outputs, size] order: [BM, BN] for channels o_row and tile i_m of pixels.

    ALIGNED says that ``size``, the pixels of an image, is a multiple of 4, so that a call serves four of them.
    """
    first = (o_row.to(tl.int64) * size)[:, None]
    if ALIGNED:
        o_m = i_m * BM + 4 * tl.arange(0, BM // 4)
        index = first + ((o_m // size).to(tl.int64) * outputs * size + o_m % size)[None, :]
        return tl.trans(normals_of_calls(seed, offset + index // 4))
    else:
        o_m = i_m * BM + tl.arange(0, BM)
        index = first + ((o_m // size).to(tl.int64) * outputs * size + o_m % size)[None, :]
        return tl.trans(normals_at(seed, offset, index))
