"""The layout in which the GPU backends read a packed weight: made of the stored codes, never stored itself.

A row (an output channel) is a run of 32-bit words that hold 32, 16 or 8 codes of 1, 2 or 4 bits (M = 2, to 4, to 16),
in blocks of :data:`BLOCK_WORDS` words. Field i of word j of a block, the bits from ``i * bits`` on, holds the code

    block * BLOCK_WORDS * per_word + i * BLOCK_WORDS + j

so that one field of neighbouring words is a run of neighbouring columns: what a tile of words becomes by one shift is
multiplied by activations in their natural order, and the loads of both are coalesced. Rows are padded with zeros to
whole blocks. A convolution's columns go tap by tap, channels within, as channels-last activations do.

For "int8" so many more rows follow as hold the codebooks' scales, float32, and integers, int8, padded to 16 a codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.codes import code_bits, unpack_codes
from bqnn.core.derived import Derived
from bqnn.core.int8 import round_levels
from bqnn.ops.packed_product import PackedCall

BLOCK_WORDS = 16
INTEGERS = 16
"""int8 numbers of one codebook: as many as a codebook can have levels."""


def row_words(num_levels: int, columns: int) -> int:
    """Words of one row of ``columns`` codes, its padding included."""
    per_block = BLOCK_WORDS * 32 // code_bits(num_levels)
    return -(-columns // per_block) * BLOCK_WORDS


def make_words(codes: Tensor, num_levels: int, columns: int, taps: int = 1) -> Tensor:
    """The words of a packed weight, on the device of ``codes``.

    Args:
        codes: uint8 [N, packed_width(columns, M)], of :func:`bqnn.core.codes.pack_codes`.
        num_levels: M, 2..16.
        columns: K, 1 or more.
        taps: of a convolution's kernel, kh * kw.

    Returns:
        int32 [N, row_words(M, K)], contiguous.

    Raises:
        TypeError, ValueError: as :func:`bqnn.core.codes.unpack_codes`.
    """
    index = unpack_codes(codes, num_levels, columns)
    index = index.view(len(index), columns // taps, taps).transpose(1, 2).flatten(1)
    bits, words = code_bits(num_levels), row_words(num_levels, columns)
    per_byte = 8 // bits
    fields = F.pad(index, (0, words * 32 // bits - columns))
    # [N, blocks, bytes, fields of a byte, words] to [N, blocks, words, bytes, fields of a byte], lowest bits first.
    fields = fields.view(len(index), words // BLOCK_WORDS, 4, per_byte, BLOCK_WORDS).permute(0, 1, 4, 2, 3)
    places = fields.new_tensor([1 << (bits * place) for place in range(per_byte)])
    return (fields * places).sum(-1, dtype=torch.uint8).view(torch.int32).flatten(1)


def make_gpu_layout(codes: Tensor, levels: Tensor, columns: int, precision: str, taps: int = 1) -> Tensor:
    """What the GPU backends take as ``layout``: the words, and for "int8" the rounded codebooks in further rows.

    Args:
        codes, columns, taps: as for :func:`make_words`.
        levels: float32 [1 or N, M].
        precision: "fp32", "bf16" or "int8".

    Returns:
        int32 [N or more, row_words(M, K)], contiguous.

    Raises:
        TypeError, ValueError: as :func:`make_words`; "int8" with so many columns that sums could overflow.
    """
    words = make_words(codes, levels.shape[1], columns, taps)
    if precision != "int8":
        return words
    integers, scale = round_levels(levels, columns)
    padded = F.pad(integers, (0, INTEGERS - integers.shape[1]))
    books = torch.cat([scale.contiguous().view(torch.int32), padded.view(torch.int32).flatten()])
    return torch.cat([words, F.pad(books, (0, -len(books) % words.shape[1])).view(-1, words.shape[1])])


def integer_codebooks(layout: Tensor, channels: int, codebooks: int) -> tuple[Tensor, Tensor]:
    """Integers, int8 [codebooks, INTEGERS], and scales, float32 [codebooks], of an "int8" layout: views of it."""
    books = layout[channels:].view(-1)
    integers = books[codebooks : codebooks * (1 + INTEGERS // 4)].view(torch.int8).view(codebooks, INTEGERS)
    return integers, books[:codebooks].view(torch.float32)


layouts = Derived(make_gpu_layout)


def layout_of(call: PackedCall) -> Tensor:
    """The layout of the call's weight, made where it is none of the call's own."""
    if call.layout is not None:
        return call.layout
    return layouts((call.codes, call.levels), call.columns, call.precision, call.geometry.taps())


def describe(call: PackedCall) -> str:
    """Levels, bits of a code and precision, as :func:`bqnn.explain_speed` prints them."""
    num_levels = call.levels.shape[1]
    return f"{num_levels} levels, {code_bits(num_levels)} bits, {call.precision}"
