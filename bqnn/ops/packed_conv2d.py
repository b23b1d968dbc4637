"""packed_conv2d: a two-dimensional convolution whose weight is packed codes and a codebook.

The weight [N, C/groups, kh, kw] is packed a channel as weight[n].flatten(), K = C/groups * kh * kw codes. Precisions
are those of packed_linear; "int8" has one scale a sample. The output has the dtype of x (float16 and bfloat16 are
computed in float32), is its ReLU with ``relu``, and is channels-last where x is. There is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import check_conv2d_input
from bqnn.core.geometry import memory_format_of, output_size, pair
from bqnn.ops import dispatch
from bqnn.ops.backends import triton_packed
from bqnn.ops.backends.cpu_layout import KERNEL_DTYPES, make_layout
from bqnn.ops.backends.triton import serves
from bqnn.ops.packed_product import DenseWeight, check_packed, decode_rounded, is_half, multiply, rectified
from bqnn.ops.register import register_op


def packed_conv2d_reference(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """Decodes the weight, then convolves; "int8" accumulates in float64. ``layout`` is of no use to it."""
    if is_half(x):
        geometry = (kernel_size, stride, padding, dilation, groups)
        y = packed_conv2d_reference(x.float(), codes, levels, bias, *geometry, precision, layout, relu)
        return y.to(x.dtype)
    channels = x.shape[1] // groups
    values, scale = decode_rounded(codes, levels, channels * kernel_size[0] * kernel_size[1], precision)
    weight = DenseWeight(values.view(-1, channels, *kernel_size), scale)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    y = rectified(multiply(convolve, x, weight, bias, precision, accumulate=torch.float64), relu)
    return y.contiguous(memory_format=memory_format_of(x))


def packed_conv2d_cpu(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """The kernel, with a layout of this call's own where none is given; the reference for float64."""
    geometry = (kernel_size, stride, padding, dilation, groups)
    if x.dtype == torch.float64:
        return packed_conv2d_reference(x, codes, levels, bias, *geometry, precision, layout, relu)
    if x.dtype not in KERNEL_DTYPES:
        return packed_conv2d_cpu(x.float(), codes, levels, bias, *geometry, precision, layout, relu).to(x.dtype)
    if layout is None:
        columns = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
        layout = make_layout(codes, levels, columns, precision, kernel_size, dilation[1], groups)
    return torch.ops.bqnn_cpu.packed_conv2d(x, layout, bias, stride, padding, dilation, relu)


def packed_conv2d_triton(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """The kernels, which take half-precision activations as they are; the reference for float64 and empty batches."""
    geometry = (kernel_size, stride, padding, dilation, groups)
    if not serves(x, levels, bias):
        return packed_conv2d_reference(x, codes, levels, bias, *geometry, precision, layout, relu)
    size = output_size(x.shape[2:], kernel_size, stride, [2 * p for p in padding], dilation)
    y = triton_packed.packed_conv2d(x, codes, levels, bias, size, *geometry, precision, layout, relu)
    if memory_format_of(x) == torch.channels_last:
        return y
    return torch.empty(y.shape, dtype=y.dtype, device=y.device).copy_(y)


def packed_conv2d_fake(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    layout: Tensor | None = None,
    backend: str | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """The shape, dtype and memory format of the output."""
    size = output_size(x.shape[2:], kernel_size, stride, [2 * p for p in padding], dilation)
    shape = (x.shape[0], codes.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


register_op(
    "packed_conv2d",
    "(Tensor x, Tensor codes, Tensor levels, Tensor? bias, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, str precision, Tensor? layout=None, str? backend=None, *, bool relu=False) -> Tensor",
    packed_conv2d_reference,
    packed_conv2d_fake,
)
dispatch.register("packed_conv2d", "cpu", packed_conv2d_cpu)
dispatch.register("packed_conv2d", "triton", packed_conv2d_triton)


def packed_conv2d(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: str = "fp32",
    layout: Tensor | None = None,
    backend: str | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """The convolution of ``x`` with a packed weight [N, C/groups, kh, kw]; zeros pad, as in torch.nn.functional.conv2d.

    Args:
        x: [B, C, H, W], floating point, any strides; an empty batch is allowed.
        codes: uint8 [N, packed_width(K, M)], K = C/groups * kh * kw, of :func:`bqnn.core.codes.pack_codes`.
        levels: float32 [1, M] or [N, M], increasing along M (not checked here).
        bias: [N], floating point, or None.
        kernel_size, stride, padding, dilation: one integer, or (height, width).
        groups: divides C and N.
        precision: "fp32", "bf16" or "int8".
        layout: what a backend made of codes and levels when they were loaded, or None: made for this call, if needed.
        backend: forces a backend; None chooses.
        relu: whether negative outputs become 0.

    Returns:
        [B, N, H', W'], x's dtype, channels-last where x is, else contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        bqnn.BackendError: ``backend`` can not run this.
    """
    if x.dim() != 4:
        raise ValueError(f"x must have the shape [batch, channels, height, width], got {list(x.shape)}")
    kernel = pair("kernel_size", kernel_size, 1)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding = pair("padding", padding, 0)
    check_conv2d_input(x, x.shape[1], codes.shape[0], groups)
    check_packed(x, codes, levels, bias, x.shape[1] // groups * kernel[0] * kernel[1], precision)
    if min(output_size(x.shape[2:], kernel, stride, [2 * p for p in padding], dilation)) < 1:
        raise ValueError(
            f"x must be large enough for a kernel of {kernel} with padding {padding} and dilation {dilation}, "
            f"got {list(x.shape)}"
        )
    geometry = (kernel, stride, padding, dilation, groups)
    return torch.ops.bqnn.packed_conv2d(x, codes, levels, bias, *geometry, precision, layout, backend, relu=relu)
