"""The backend "cuda" of packed_linear: CUDA C++ kernels for a few rows; more rows are another backend's.

Their sources are in csrc/cuda. A product of a few rows is bound by the weight's bytes, so each kernel decodes a code
once for all rows, in registers, and leaves products to tensor cores, in bfloat16 parts where the precision needs more:
"fp32" splits levels and activations into up to three each, exactly. An infinite activation makes its row's outputs
infinite or NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.ops import dispatch
from bqnn.ops.backends.gpu_layout import describe, integer_codebooks, layout_of
from bqnn.ops.packed_product import PackedCall

MAX_ROWS = 16
"""More rows than this are left to the next backend."""


def packed_linear_cuda(call: PackedCall) -> Tensor:
    """The kernel, on rows that it serves."""
    x, levels, channels = call.x, call.levels, call.codes.shape[0]
    y = call.geometry.output(x, channels)
    rows = call.geometry.rows(x)
    if rows == 0:
        return y
    layout = layout_of(call)
    x = x.reshape(rows, call.columns).contiguous()
    integers = scale = row_scale = None
    if call.precision == "int8":
        integers, scale = integer_codebooks(layout, channels, len(levels))
        q, row_scale = torch.empty_like(x, dtype=torch.bfloat16), torch.empty(rows, device=x.device)
        _round_rows(x, q, row_scale)
        x = q
    bias = None if call.bias is None else call.bias.float().contiguous()
    out = y.view(rows, channels)
    _launch(x, layout, levels.contiguous(), integers, bias, scale, row_scale, call.precision, call.relu, out)
    return y


def _serves(call: PackedCall) -> str:
    if call.x.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16 activations, got float64"
    rows = call.geometry.rows(call.x)
    return f"it takes up to {MAX_ROWS} rows, got {rows}" if rows > MAX_ROWS else ""


def _launch(*arguments: Tensor | str | bool | None) -> None:
    torch.ops.bqnn_cuda.packed_linear(*arguments)


def _round_rows(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """Fills ``q`` and ``scale`` by the rule of bqnn.core.int8.quantize_rows, in one pass of the GPU."""
    torch.ops.bqnn_cuda.round_rows(x, q, scale)


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>``."""
    dispatch.register(name, "cuda", packed_linear_cuda, _serves, describe=describe)
