"""Codes as base-M digits in bytes: the one layout that is stored, in memory and in files.

A byte holds d = floor(8 / log2 M) codes of one output channel; digit l has weight M**l, so the first code is the least
significant digit. Each channel starts at a byte of its own and the digits that pad its last byte are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.core.check import MOST_NUMBERS, check_data, check_int, check_num_levels, check_tensor


def digits_per_byte(num_levels: int) -> int:
    """How many codes share a byte: 8 for two levels, 5 for 3, 4 for 4, 3 for 5 and 6, 2 for 7 to 16.

    Raises:
        TypeError, ValueError: ``num_levels`` is no integer or outside 2..16.
    """
    check_num_levels(num_levels)
    digits = 1
    while num_levels ** (digits + 1) <= 256:
        digits += 1
    return digits


def packed_width(columns: int, num_levels: int) -> int:
    """Bytes that ``columns`` codes of one output channel take; raises as :func:`digits_per_byte` does."""
    return -(-columns // digits_per_byte(num_levels))


def code_bits(num_levels: int) -> int:
    """Bits of a code in the layouts that kernels read: 1, 2 or 4 for two, up to 4, up to 16 levels."""
    return 1 if num_levels == 2 else 2 if num_levels <= 4 else 4


def pack_codes(codes: Tensor, num_levels: int) -> Tensor:
    """Packs ``codes``, uint8 [N, K], each below ``num_levels``, into uint8 [N, packed_width(K, num_levels)].

    Raises:
        TypeError: ``codes`` is not uint8.
        ValueError: ``codes`` is not a matrix or holds a code that is no level; ``num_levels`` is outside 2..16.
    """
    digits = digits_per_byte(num_levels)
    _check_matrix("codes", codes)
    check_data("codes", codes)
    if codes.numel() and int(codes.max()) >= num_levels:
        raise ValueError(f"codes must be below num_levels, {num_levels}, got {int(codes.max())}")
    rows, columns = codes.shape
    width = packed_width(columns, num_levels)
    padded = codes.new_zeros(rows, width * digits)
    padded[:, :columns] = codes
    # The sum of a byte's digits is at most M**d - 1 <= 255: uint8 holds it.
    return (padded.view(rows, width, digits) * _digit_weights(num_levels, codes.device)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, num_levels: int, columns: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 [N, packed_width(columns, num_levels)] to codes, uint8 [N, columns].

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: ``packed`` has another width than ``columns`` codes take; ``num_levels`` is outside 2..16.
    """
    _check_matrix("packed", packed)
    check_int("columns", columns, 0, MOST_NUMBERS)
    width = packed_width(columns, num_levels)
    if packed.shape[1] != width:
        raise ValueError(
            f"packed must have {width} bytes a channel for {columns} codes of {num_levels} levels, "
            f"got {packed.shape[1]}"
        )
    digits = torch.div(packed.unsqueeze(-1), _digit_weights(num_levels, packed.device), rounding_mode="floor")
    return (digits % num_levels).flatten(1)[:, :columns].contiguous()


def find_bad_byte(packed: Tensor, num_levels: int, columns: int) -> str | None:
    """What is wrong with ``packed``, uint8 [N, packed_width(columns, num_levels)], or None: every byte has to be below
    M**d, and the digits that pad a channel's last byte have to be 0."""
    digits = digits_per_byte(num_levels)
    limits = torch.full((packed.shape[1],), num_levels**digits, dtype=torch.int16, device=packed.device)
    if columns % digits:
        limits[-1] = num_levels ** (columns % digits)
    bad = (packed >= limits).nonzero()
    if not len(bad):
        return None
    channel, byte = bad[0].tolist()
    value, limit = int(packed[channel, byte]), int(limits[byte])
    return (
        f"must hold base-{num_levels} digits, padded by zeros: byte {byte} of channel {channel} must be below {limit}, "
        f"got {value}"
    )


def _digit_weights(num_levels: int, device: torch.device) -> Tensor:
    weights = [num_levels**digit for digit in range(digits_per_byte(num_levels))]
    return torch.tensor(weights, dtype=torch.uint8, device=device)


def _check_matrix(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be torch.uint8, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have the shape [channels, columns], got {list(tensor.shape)}")
