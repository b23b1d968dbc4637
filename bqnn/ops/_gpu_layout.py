"""The layout in which the GPU backends read a packed weight: made of the stored codes, never stored itself.

Row-major words: a row (an output channel) is a run of 32-bit words, and each word holds 32, 16 or 8 codes of 1, 2 or
4 bits (M = 2, to 4, to 16). Code i of a row is at bits ``(i % per_word) * bits`` of word ``i // per_word``. Rows are
padded with zeros to whole 16 bytes, which is what a lane of a kernel loads at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.packing import unpack_codes

ROW_WORDS = 4
"""A row is a multiple of so many words: 16 bytes."""


def code_bits(num_levels: int) -> int:
    """Bits of a code in the layout: 1, 2 or 4 for two, up to 4, up to 16 levels."""
    return 1 if num_levels == 2 else 2 if num_levels <= 4 else 4


def row_words(num_levels: int, columns: int) -> int:
    """Words of one row of ``columns`` codes, its padding included."""
    per_load = ROW_WORDS * 32 // code_bits(num_levels)
    return -(-columns // per_load) * ROW_WORDS


def make_gpu_layout(codes: Tensor, num_levels: int, columns: int) -> Tensor:
    """The words of a packed weight, on the device of ``codes``.

    Args:
        codes: uint8 [N, packed_width(columns, M)], of :func:`bqnn.packing.pack_codes`.
        num_levels: M, 2..16.
        columns: K, 1 or more.

    Returns:
        int32 [N, row_words(M, K)], contiguous.

    Raises:
        TypeError, ValueError: as :func:`bqnn.packing.unpack_codes`.
    """
    index = unpack_codes(codes, num_levels, columns)
    bits, words = code_bits(num_levels), row_words(num_levels, columns)
    per_byte = 8 // bits
    # A word's bytes go from the lowest to the highest, so that codes can be put together a byte at a time.
    fields = F.pad(index, (0, words * 4 * per_byte - columns)).view(len(index), words * 4, per_byte)
    places = fields.new_tensor([1 << (bits * place) for place in range(per_byte)])
    return (fields * places).sum(-1, dtype=torch.uint8).view(torch.int32)
