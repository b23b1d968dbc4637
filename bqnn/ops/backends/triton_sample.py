"""The backend "triton" of the sampled product: a kernel that samples and multiplies, or a sample and torch's product.

Which of the two is decided by ``is_fused`` of the op's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from bqnn.core.product import Product, bind, dense
from bqnn.ops import dispatch, sampled_product
from bqnn.ops.backends.triton import contiguous, kernels, number, order_for, serves


def _sampled_product(
    name: str,
    product: Product,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
) -> Tensor:
    if not serves(x, weight, log_sigma2, levels, thresholds, bias):
        return sampled_product.sampled_product(product, x, weight, log_sigma2, levels, thresholds, bias, seed, offset)
    posterior = contiguous(weight, log_sigma2, levels, thresholds)
    noise = number(seed), offset
    fused = kernels(name)
    if fused.is_fused(x, weight, *product):
        return fused.forward(x, *posterior, bias, *noise, *product)
    quantized = kernels("sample").sample(*posterior, *noise, x.dtype, order_for(x))
    return product.forward(x, quantized, bias)


def _sampled_product_backward(
    name: str,
    product: Product,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
    offset: int,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not serves(grad, x, weight, log_sigma2, levels, thresholds):
        return sampled_product.sampled_product_backward(
            product, grad, x, weight, log_sigma2, levels, thresholds, seed, offset, input_gradient
        )
    posterior = contiguous(weight, log_sigma2, levels, thresholds)
    noise = number(seed), offset
    fused, elementwise = kernels(name), kernels("sample")
    if fused.is_fused(x, weight, *product):
        return fused.backward(grad, x, *posterior, *noise, input_gradient, *product)
    quantized = elementwise.sample(*posterior, *noise, x.dtype, order_for(x))
    grad_x, grad_weight = product.backward(grad, x, quantized, input_gradient)
    return grad_x, *elementwise.sample_backward(dense(grad_weight), *posterior, *noise)


def register(name: str, product_of: Callable[..., Product]) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``, from ``bqnn.kernels.<name>``."""
    forward, backward = partial(_sampled_product, name), partial(_sampled_product_backward, name)
    dispatch.register(name, "triton", bind(forward, product_of, sampled_product.FORWARD))
    dispatch.register(f"{name}_backward", "triton", bind(backward, product_of, sampled_product.BACKWARD))
