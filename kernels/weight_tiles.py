"""How kernels that go over a weight once cut it into tiles, and the functions whose instructions they count.

A weight is a matrix [N, K], one row if its channels share a codebook. A program takes some tiles of a few rows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# A program has at most so many tiles: what it does once for all of them costs as much as two weights of a thread.
MOST_TILES = 16
# So many programs keep a GPU busy; where there are fewer, they take fewer tiles each.
PROGRAMS = 2048
# A tile has at most so many elements for 128 threads, and a half or a quarter where many levels take many registers.
MOST_ELEMENTS = 512


heuristics_of_tiles = triton.heuristics(
    {
        # With many levels masks stay, since a loop without them would overfill the registers.
        "WHOLE": lambda args: args["NUM_LEVELS"] <= 8 and args["N"] % args["BN"] == 0 and args["K"] % args["BK"] == 0
    }
)


@triton.jit
def log2(x):
    """To an absolute error of 2^-22, which is one instruction where tl.log2 takes 25; the interpreter lacks it."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def reciprocal(x):
    """1 / x for x <= 2^126, to a unit in the last place, by one instruction, where a division takes eight; the
    interpreter lacks it."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def place_of(N, K, tiles, BN: tl.constexpr, BK: tl.constexpr):
    """A program's rows [BN], its number in the rows, its first column, and how many tiles it has."""
    spans = tl.cdiv(K, tiles * BK)
    i_n, i_k = tl.program_id(0) // spans, (tl.program_id(0) % spans).to(tl.int64)
    first = i_k * tiles * BK
    return i_n * BN + tl.arange(0, BN), i_k, first, tl.minimum(tiles, tl.cdiv(K - first, BK)).to(tl.int32)


@triton.jit
def offsets_of(o_n, first, N, K, BK: tl.constexpr, WHOLE: tl.constexpr):
    """Offsets [BN, BK] of a tile, and which are in the weight, where WHOLE says that all of them are."""
    o_k = tl.arange(0, BK)[None, :]
    o_w = (o_n.to(tl.int64) * K + first)[:, None] + o_k
    if WHOLE:
        return o_w, tl.full(o_w.shape, True, tl.int1)
    else:
        return o_w, (o_n < N)[:, None] & (o_k < tl.minimum(K - first, BK).to(tl.int32))
