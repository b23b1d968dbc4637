"""The backend "cuda" of packed_linear: CUDA C++ kernels for a few rows; more rows are another backend's.

Their sources are in csrc/cuda. A product of a few rows is bound by the weight's bytes, so each kernel decodes a code
once for all rows, in registers, and leaves products to tensor cores, in bfloat16 parts where the precision needs more:
"fp32" splits levels and activations into up to three each, exactly. An infinite activation makes its row's outputs
infinite or NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn import dispatch
from bqnn.ops._gpu_layout import integer_codebooks, make_gpu_layout
from bqnn.ops._int8 import quantize_rows

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
    scale = row_scale = None
    if precision == "int8":
        integers, scale = integer_codebooks(layout, channels, len(levels))
        levels = integers[:, : levels.shape[1]].float()
        x, row_scale = quantize_rows(x.float())
    bias = None if bias is None else bias.float().contiguous()
    _launch(x, layout, levels.contiguous(), bias, scale, row_scale, precision, relu, y.view(rows, channels))
    return y


def _launch(*arguments: Tensor | str | bool | None) -> None:
    torch.ops.bqnn_cuda.packed_linear(*arguments)
