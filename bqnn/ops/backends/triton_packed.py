"""The backend "triton" of the packed products: from an op's arguments to what the launchers take.

The kernels take half-precision activations as they are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bqnn.core.geometry import Conv2dGeometry, memory_format_of
from bqnn.kernels.arguments import PackedWeight
from bqnn.ops import dispatch
from bqnn.ops.backends.gpu_layout import BLOCK_WORDS, describe, integer_codebooks, layout_of
from bqnn.ops.backends.triton import kernels, other_dtype
from bqnn.ops.packed_product import PackedCall


def run(name: str, call: PackedCall) -> Tensor:
    """The output of ``bqnn::<name>``, by the launcher of ``bqnn.kernels.<name>``."""
    x, codes, levels, geometry = call.x, call.codes, call.levels, call.geometry
    if x.numel() == 0:
        return geometry.output(x, len(codes))
    layout = layout_of(call)
    book, scale = levels.contiguous(), None
    if call.precision == "int8":  # the layout's integers with their scales, instead of levels
        book, scale = integer_codebooks(layout, len(codes), len(levels))
    weight = PackedWeight(layout[: len(codes)], BLOCK_WORDS, levels.shape[1], book, scale)
    forward = kernels(name).forward
    if not isinstance(geometry, Conv2dGeometry):
        return forward(x, weight, call.bias, call.precision, call.relu)
    y = forward(x, weight, call.bias, call.precision, call.relu, geometry)
    if memory_format_of(x) == torch.channels_last:
        return y
    return torch.empty(y.shape, dtype=y.dtype, device=y.device).copy_(y)


def _serves(call: PackedCall) -> str:
    return other_dtype(call)


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>``, from ``bqnn.kernels.<name>``."""
    dispatch.register(name, "triton", partial(run, name), _serves, describe=describe)
