"""The backend "cpu" of the packed products: kernels that read the weight in a layout of their own.

They take float32 and bfloat16 activations; float16 ones go through float32. float64 is another backend's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.core.codes import code_bits
from bqnn.core.derived import Derived
from bqnn.core.geometry import Conv2dGeometry
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu_layout import make_layout
from bqnn.ops.dispatch import Bound
from bqnn.ops.packed_product import PackedCall

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Of the activations that the kernels read and write; they compute bfloat16 ones in float32."""

layouts = Derived(make_layout)


def layout_of(call: PackedCall) -> Tensor:
    """The layout of the call's weight, made where it is none of the call's own."""
    if call.layout is not None:
        return call.layout
    weight, geometry = (call.codes, call.levels), call.geometry
    if isinstance(geometry, Conv2dGeometry):
        # The tuple of sizes that a dispatcher hands over may be a list.
        kernel = tuple(geometry.kernel_size)
        return layouts(weight, call.columns, call.precision, kernel, geometry.dilation[1], geometry.groups)
    return layouts(weight, call.columns, call.precision)


def _run(call: PackedCall) -> Tensor:
    return _bind(call)(call.x, call.bias)


def _unwrapped(overload: Any) -> Any:
    """The op without the Python that torch has around it, which hands arguments on and takes part of a microsecond."""
    return getattr(overload, "_op", overload)


def _bind(call: PackedCall) -> Bound:
    layout, geometry, relu, dtype = layout_of(call), call.geometry, call.relu, call.x.dtype
    if isinstance(geometry, Conv2dGeometry):
        convolve = _unwrapped(torch.ops.bqnn_cpu.packed_conv2d.default)
        sizes = geometry.stride, geometry.padding, geometry.dilation

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            return convolve(x, layout, bias, *sizes, relu)

    else:
        multiply = _unwrapped(torch.ops.bqnn_cpu.packed_linear.default)

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            return multiply(x, layout, bias, relu)

    return run if dtype in KERNEL_DTYPES else lambda x, bias: run(x.float(), bias).to(dtype)


def _serves(call: PackedCall) -> str:
    return "it takes float32, bfloat16 and float16 activations, got float64" if call.x.dtype == torch.float64 else ""


def _describe(call: PackedCall) -> str:
    """Levels, bits of a code, and the kernel that the call runs, e.g. "3 levels, 2 bits, AVX-512 fp32 gemv"."""
    layout, geometry, num_levels = layout_of(call), call.geometry, call.levels.shape[1]
    x = call.x if call.x.dtype in KERNEL_DTYPES else call.x.float()
    if isinstance(geometry, Conv2dGeometry):
        sizes = geometry.stride, geometry.padding, geometry.dilation
        kernel = torch.ops.bqnn_cpu.packed_conv2d_kernel(x, layout, *sizes)
    else:
        kernel = torch.ops.bqnn_cpu.packed_linear_kernel(x, layout)
    return f"{num_levels} levels, {code_bits(num_levels)} bits, {kernel}"


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>``."""
    dispatch.register(name, "cpu", _run, _serves, _bind, _describe)
