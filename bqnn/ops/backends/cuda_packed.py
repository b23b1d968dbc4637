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
from bqnn.ops.backends.gpu_layout import integer_codebooks, make_gpu_layout

MAX_ROWS = 16
"""More rows than this are left to the next backend."""


def packed_linear_cuda(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """The kernel, with a layout of this call's own where none is given; for many rows, or float64, the next backend."""
    columns, channels = x.shape[-1], codes.shape[0]
    rows = x.numel() // columns
    if rows > MAX_ROWS or x.dtype == torch.float64:
        usable = dispatch.status("packed_linear", "triton", x.device.type).usable
        run = dispatch.implementation("packed_linear", x.device, "triton" if usable else "reference")
        return run(x, codes, levels, bias, precision, layout, relu=relu)
    y = x.new_empty((*x.shape[:-1], channels))
    if rows == 0:
        return y
    if layout is None:
        layout = make_gpu_layout(codes, levels, columns, precision)
    x = x.reshape(rows, columns).contiguous()
    integers = scale = row_scale = None
    if precision == "int8":
        integers, scale = integer_codebooks(layout, channels, len(levels))
        q, row_scale = torch.empty_like(x, dtype=torch.bfloat16), torch.empty(rows, device=x.device)
        _round_rows(x, q, row_scale)
        x = q
    bias = None if bias is None else bias.float().contiguous()
    levels, out = levels.contiguous(), y.view(rows, channels)
    _launch(x, layout, levels, integers, bias, scale, row_scale, precision, relu, out)
    return y


def _launch(*arguments: Tensor | str | bool | None) -> None:
    torch.ops.bqnn_cuda.packed_linear(*arguments)


def _round_rows(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """Fills ``q`` and ``scale`` by the rule of bqnn.core.int8.quantize_rows, in one pass of the GPU."""
    torch.ops.bqnn_cuda.round_rows(x, q, scale)
