"""packed_linear: a linear layer whose weight is packed codes and a codebook.

    y[..., n] = sum_k x[..., k] * levels[g(n), code(n, k)] + bias[n],   g(n) = 0 or n

and with ``relu`` the ReLU of it: negative outputs become 0, NaN stays.

``precision`` says how: "fp32" multiplies in the dtype of x; "bf16" rounds x and the levels to bfloat16 and accumulates
in the dtype of x; "int8" rounds each row of x and each codebook to 8-bit integers with a scale of its own, and sums
integers exactly: :mod:`bqnn.core.int8` has the rule, which gives the same bits on every backend. The output has the
dtype of x; float16 and bfloat16 are computed in float32. There is no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import check_linear_input
from bqnn.ops import dispatch
from bqnn.ops.backends import triton_packed
from bqnn.ops.backends.cpu_layout import KERNEL_DTYPES, make_layout
from bqnn.ops.backends.cuda_packed import packed_linear_cuda
from bqnn.ops.backends.triton import serves
from bqnn.ops.packed_product import check_packed, decode_rounded, is_half, multiply, rectified
from bqnn.ops.register import register_op


def packed_linear_reference(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """Decodes the weight, then multiplies; "int8" accumulates in float64. ``layout`` is of no use to it."""
    if is_half(x):
        return packed_linear_reference(x.float(), codes, levels, bias, precision, layout, relu).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    weight = decode_rounded(codes, levels, x.shape[-1], precision)
    y = multiply(F.linear, rows, weight, bias, precision, accumulate=torch.float64)
    return rectified(y, relu).view(*x.shape[:-1], codes.shape[0])


def packed_linear_cpu(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """The kernel, with a layout of this call's own where none is given; the reference for float64."""
    if x.dtype == torch.float64:
        return packed_linear_reference(x, codes, levels, bias, precision, layout, relu)
    if x.dtype not in KERNEL_DTYPES:
        return packed_linear_cpu(x.float(), codes, levels, bias, precision, layout, relu).to(x.dtype)
    if layout is None:
        layout = make_layout(codes, levels, x.shape[-1], precision)
    return torch.ops.bqnn_cpu.packed_linear(x, layout, bias, relu)


def packed_linear_triton(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """The kernels, which take half-precision activations as they are; the reference for float64 and empty batches."""
    if not serves(x, levels, bias):
        return packed_linear_reference(x, codes, levels, bias, precision, layout, relu)
    return triton_packed.packed_linear(x, codes, levels, bias, precision, layout, relu)


def packed_linear_fake(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None = None,
    backend: str | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """The shape and dtype of the output; always contiguous."""
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


register_op(
    "packed_linear",
    "(Tensor x, Tensor codes, Tensor levels, Tensor? bias, str precision, Tensor? layout=None, str? backend=None, *, "
    "bool relu=False) -> Tensor",
    packed_linear_reference,
    packed_linear_fake,
)
dispatch.register("packed_linear", "cpu", packed_linear_cpu)
dispatch.register("packed_linear", "cuda", packed_linear_cuda)
dispatch.register("packed_linear", "triton", packed_linear_triton)


def packed_linear(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None = None,
    precision: str = "fp32",
    layout: Tensor | None = None,
    backend: str | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """The product of ``x`` with a packed weight [N, K].

    Args:
        x: [..., K], floating point, any strides; an empty batch is allowed.
        codes: uint8 [N, packed_width(K, M)], of :func:`bqnn.core.codes.pack_codes`.
        levels: float32 [1, M] or [N, M], increasing along M (not checked here).
        bias: [N], floating point, or None.
        precision: "fp32", "bf16" or "int8".
        layout: what a backend made of codes and levels when they were loaded, or None: made for this call, if needed.
        backend: forces a backend; None chooses.
        relu: whether negative outputs become 0.

    Returns:
        [..., N], x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        bqnn.BackendError: ``backend`` can not run this.
    """
    check_linear_input(x, x.shape[-1] if x.dim() else 1)
    check_packed(x, codes, levels, bias, x.shape[-1], precision)
    return torch.ops.bqnn.packed_linear(x, codes, levels, bias, precision, layout, backend, relu=relu)
