"""Padding that a convolution op does not take itself: "same" with an even kernel, and modes other than zeros."""

from __future__ import annotations

from typing import Any

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
