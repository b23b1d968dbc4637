"""The backend "triton" of the packed products: the kernels, and the reference for what they do not take."""

from __future__ import annotations

from torch import Tensor

from bqnn.ops._gpu_layout import BLOCK_WORDS, integer_codebooks, make_gpu_layout
from bqnn.ops._triton import kernels, serves
from bqnn.ops.packed_linear import packed_linear_reference


def _codebooks(layout: Tensor, levels: Tensor, channels: int, precision: str) -> tuple[Tensor, Tensor | None]:
    """What the kernels multiply with: levels as they are, or the layout's integers with their scales."""
    if precision == "int8":
        return integer_codebooks(layout, channels, len(levels))
    return levels.contiguous(), None


def packed_linear_triton(
    x: Tensor, codes: Tensor, levels: Tensor, bias: Tensor | None, precision: str, layout: Tensor | None
) -> Tensor:
    """The kernel, with a layout of this call's own where none is given; the reference for float64."""
    if not serves(x, levels, bias):
        return packed_linear_reference(x, codes, levels, bias, precision, layout)
    if layout is None:
        layout = make_gpu_layout(codes, levels, x.shape[-1], precision)
    channels = len(codes)
    book, scale = _codebooks(layout, levels, channels, precision)
    words = layout[:channels]
    return kernels("packed_linear").forward(x, words, levels.shape[1], book, scale, bias, precision, BLOCK_WORDS)
