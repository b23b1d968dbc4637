"""Padding that a convolution op does not take itself: "same" with an even kernel, and modes other than zeros."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def explicit_padding(x: Tensor, conv: Any) -> tuple[Tensor, tuple[int, int]]:
    """x, padded where it must be, and the symmetric zero padding (height, width) that is left to the op.

    Args:
        x: [B, C, H, W].
        conv: a module with nn.Conv2d's ``kernel_size``, ``dilation``, ``padding`` and ``padding_mode``.
    """
    if conv.padding == "valid":
        return x, (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = list(conv.padding)
    if conv.padding_mode == "zeros" and before == after:
        return x, (before[0], before[1])
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (before[1], after[1], before[0], after[0]), mode=mode), (0, 0)
