"""The backend "triton" of the packed products: from an op's arguments to what the launchers take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bqnn.ops.backends.gpu_layout import BLOCK_WORDS, integer_codebooks, make_gpu_layout
from bqnn.ops.backends.triton import kernels


def _codebooks(layout: Tensor, levels: Tensor, channels: int, precision: str) -> tuple[Tensor, Tensor | None]:
    """What the kernels multiply with: levels as they are, or the layout's integers with their scales."""
    if precision == "int8":
        return integer_codebooks(layout, channels, len(levels))
    return levels.contiguous(), None


def packed_linear(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None,
    relu: bool,
) -> Tensor:
    """The kernel, with a layout of this call's own where none is given."""
    if layout is None:
        layout = make_gpu_layout(codes, levels, x.shape[-1], precision)
    words = layout[: len(codes)]
    book, scale = _codebooks(layout, levels, len(codes), precision)
    return kernels("packed_linear").forward(x, words, levels.shape[1], book, scale, bias, precision, BLOCK_WORDS, relu)


def packed_conv2d(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    layout: Tensor | None,
    relu: bool,
) -> Tensor:
    """The kernel, with a layout of this call's own where none is given; channels-last. ``size`` is the output's."""
    taps = math.prod(kernel_size)
    if layout is None:
        layout = make_gpu_layout(codes, levels, x.shape[1] // groups * taps, precision, taps)
    words = layout[: len(codes)]
    book, scale = _codebooks(layout, levels, len(codes), precision)
    geometry = (size, kernel_size, stride, padding, dilation, groups)
    return kernels("packed_conv2d").forward(
        x, words, levels.shape[1], book, scale, bias, precision, BLOCK_WORDS, relu, *geometry
    )
