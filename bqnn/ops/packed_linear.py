"""packed_linear: a linear layer whose weight is packed codes and a codebook.

    y[..., n] = sum_k x[..., k] * levels[g(n), code(n, k)] + bias[n],   g(n) = 0 or n

and with ``relu`` the ReLU of it: negative outputs become 0, NaN stays.

``precision`` says how: "fp32" multiplies in the dtype of x; "bf16" rounds x and the levels to bfloat16 and accumulates
in the dtype of x; "int8" rounds each row of x and each codebook to 8-bit integers with a scale of its own, and sums
integers exactly: :mod:`bqnn.core.int8` has the rule, which gives the same bits on every backend. The output has the
dtype of x; float16 and bfloat16 are computed in float32. The gradient for x is that
of the product with the decoded weight, whatever the precision; there is none for the others.
"""

from __future__ import annotations

from torch import Tensor

from bqnn.core.check import check_floating, check_linear_input
from bqnn.core.geometry import LinearGeometry
from bqnn.ops import packed_product
from bqnn.ops.backends import cpu_packed, cuda_packed, dense_packed, triton_packed
from bqnn.ops.packed_product import PackedCall, check_packed
from bqnn.ops.register import call

packed_product.register("packed_linear", LinearGeometry)
cpu_packed.register("packed_linear")
cuda_packed.register("packed_linear")
dense_packed.register("packed_linear")
triton_packed.register("packed_linear")


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
        layout: what a backend has made of codes and levels, or None: made where it is needed, and kept for as long as
            both tensors live and stay as they are.
        backend: forces a backend; None chooses.
        relu: whether negative outputs become 0.

    Returns:
        [..., N], x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        bqnn.BackendError: ``backend`` can not run this.
    """
    check_floating("x", x)
    check_linear_input(x, x.shape[-1] if x.dim() else 1)
    arguments = PackedCall(x, codes, levels, bias, LinearGeometry(), precision, layout, relu)
    check_packed(arguments, x.shape[-1])
    return call("packed_linear", arguments, backend)
