"""packed_conv2d: a two-dimensional convolution whose weight is packed codes and a codebook.

The weight [N, C/groups, kh, kw] is packed a channel as weight[n].flatten(), K = C/groups * kh * kw codes. Precisions
are those of packed_linear; "int8" has one scale a sample. The output has the dtype of x (float16 and bfloat16 are
computed in float32), is its ReLU with ``relu``, and is channels-last where x is. The gradient for x is that
of the product with the decoded weight, whatever the precision; there is none for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bqnn.core.check import check_conv2d_input, check_floating
from bqnn.core.geometry import Conv2dGeometry, check_window, pair
from bqnn.ops import packed_product
from bqnn.ops.backends import cpu_packed, dense_packed, triton_packed
from bqnn.ops.packed_product import PackedCall, check_codes, check_packed
from bqnn.ops.register import call

packed_product.register(
    "packed_conv2d",
    Conv2dGeometry,
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups",
)
cpu_packed.register("packed_conv2d")
dense_packed.register("packed_conv2d")
triton_packed.register("packed_conv2d")


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
        layout: what a backend has made of codes and levels, or None: made where it is needed, and kept for as long as
            both tensors live and stay as they are.
        backend: forces a backend; None chooses.
        relu: whether negative outputs become 0.

    Returns:
        [B, N, H', W'], x's dtype, channels-last where x is, else contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        bqnn.BackendError: ``backend`` can not run this.
    """
    check_floating("x", x)
    check_codes(codes)
    if x.dim() != 4:
        raise ValueError(f"x must have the shape [batch, channels, height, width], got {list(x.shape)}")
    kernel = pair("kernel_size", kernel_size, 1)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding = pair("padding", padding, 0)
    check_conv2d_input(x, x.shape[1], codes.shape[0], groups)
    geometry = Conv2dGeometry(kernel, stride, padding, dilation, groups)
    arguments = PackedCall(x, codes, levels, bias, geometry, precision, layout, relu)
    check_packed(arguments, geometry.columns(x))
    check_window(x, codes.shape[0], kernel, stride, padding, dilation)
    return call("packed_conv2d", arguments, backend)
