"""Padding that a convolution op does not take itself: "same" with an even kernel, and modes other than zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_padding(conv: Any) -> tuple[int, int] | None:
    """The zeros on either side (height, width) that a convolution op can pad itself, or None where it can not.

    ``conv`` is a module with nn.Conv2d's ``kernel_size``, ``dilation``, ``padding`` and ``padding_mode``.
    """
    before, after = _sides(conv)
    if before != after or (conv.padding_mode != "zeros" and any(before)):
        return None
    return before


def explicit_padding(x: Tensor, conv: Any) -> tuple[Tensor, tuple[int, int]]:
    """x, padded where it must be, and the symmetric zero padding (height, width) that is left to the op.

    Args:
        x: [B, C, H, W].
        conv: as for :func:`symmetric_padding`.
    """
    padding = symmetric_padding(conv)
    if padding is not None:
        return x, padding
    before, after = _sides(conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (before[1], after[1], before[0], after[0]), mode=mode), (0, 0)


def _sides(conv: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns before, and after."""
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding != "same":
        height, width = conv.padding
        return (height, width), (height, width)
    height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (height // 2, width // 2), (height - height // 2, width - width // 2)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    total_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of the output for an input of ``size``; ``total_padding`` counts both sides together."""
    reach = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
    return [(size[i] + total_padding[i] - reach[i]) // stride[i] + 1 for i in range(2)]


def memory_format_of(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """``value``, one integer or two, as two; raises ValueError where one is below ``least``."""
    first, second = (value, value) if isinstance(value, int) else value if len(value) == 2 else (least - 1, 0)
    if min(first, second) < least:
        raise ValueError(f"{name} must be one integer or two, each {least} or more, got {value}")
    return first, second
