"""From words of codes (``bqnn.ops.backends.gpu_layout``) to levels: one field of a block of words at a time.

Instructions a weight: a shift and a mask fold into the test of a bit, so up to 4 levels take a test and a select for 2,
two tests and two selects for 3, two tests and three selects for 4. More levels would take up to 15 selects; they are
loaded instead, from a table that lies in one or two lines of the L1 cache: shift and mask, address, load.
"""

import triton
import triton.language as tl


@triton.jit
def codebook(p_levels, o_n, PER_CHANNEL: tl.constexpr, STRIDE: tl.constexpr):
    """The codebooks of channels o_n [BN]: a pointer [BN, 1] to each, or a single one where all channels share it."""
    if PER_CHANNEL:
        return p_levels + o_n[:, None] * STRIDE
    else:
        return p_levels


@triton.jit
def few_levels(p_book, NUM_LEVELS: tl.constexpr, OPERAND: tl.constexpr):
    """The first four levels, the last one repeated where there are fewer: what :func:`decode` selects from."""
    c0 = tl.load(p_book).to(OPERAND)
    c1 = tl.load(p_book + 1).to(OPERAND)
    c2 = tl.load(p_book + (2 if NUM_LEVELS > 2 else 1)).to(OPERAND)
    c3 = tl.load(p_book + (3 if NUM_LEVELS > 3 else NUM_LEVELS - 1)).to(OPERAND)
    return c0, c1, c2, c3


@triton.jit
def decode(words, field, p_book, c0, c1, c2, c3, NUM_LEVELS: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr):
    """The levels of the codes in ``field`` of each word: words int32 [BN, BW] to OPERAND [BN, BW]."""
    shifted = words >> (field * BITS)
    if NUM_LEVELS == 2:
        return tl.where((shifted & 1) != 0, c1, c0)
    elif NUM_LEVELS <= 4:
        upper = tl.where((shifted & 1) != 0, c3, c2) if NUM_LEVELS == 4 else c2
        return tl.where((shifted & 2) != 0, upper, tl.where((shifted & 1) != 0, c1, c0))
    else:
        return tl.load(p_book + (shifted & 15)).to(OPERAND)
