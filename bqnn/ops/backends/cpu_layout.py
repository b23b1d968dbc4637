"""The layout in which the cpu backend wants a packed weight: made of the stored codes, never stored itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bqnn.core.int8 import round_levels


def make_layout(
    codes: Tensor,
    levels: Tensor,
    columns: int,
    precision: str,
    kernel_size: Sequence[int] = (),
    dilation_w: int = 1,
    groups: int = 1,
) -> Tensor:
    """The layout of the cpu backend for a packed weight; valid in this process, as long as codes and levels are.

    Args:
        codes: uint8 [N, packed_width(columns, M)], on the CPU.
        levels: float32 [1 or N, M].
        columns: K; for a convolution C/groups * kh * kw.
        precision: "fp32", "bf16" or "int8".
        kernel_size, dilation_w, groups: of a convolution; ``dilation_w`` is the dilation along the width. A linear
            layer has no kernel size.

    Returns:
        uint8, bytes that the cpu backend alone reads.

    Raises:
        ValueError: "int8" with so many columns that sums could overflow, or a tensor has another shape or dtype.
    """
    if precision == "int8":
        integers, scale = round_levels(levels, columns)
    else:
        integers, scale = levels.new_zeros(levels.shape, dtype=torch.int8), levels.new_zeros(len(levels))
    return torch.ops.bqnn_cpu.packed_layout(
        codes.contiguous(),
        levels.contiguous(),
        integers,
        scale,
        columns,
        list(kernel_size),
        dilation_w,
        groups,
        precision,
    )
