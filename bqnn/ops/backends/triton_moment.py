"""The backend "triton" of the moment-matched product: kernels that make moments and multiply, or moments and torch's
products with one pass each around them.

Which of the two is decided by ``is_fused`` of the op's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bqnn.core.product import Product, bind, coarse_order
from bqnn.ops import dispatch, moment_product
from bqnn.ops.backends.triton import contiguous, kernels, number, order_for, serves


def _moment_product(
    name: str,
    product: Product,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int,
    mode: str,
    coarse: bool,
) -> tuple[Tensor, Tensor]:
    if not serves(x, weight, log_sigma2, levels, thresholds, bias):
        return moment_product.moment_product(
            product, x, weight, log_sigma2, levels, thresholds, bias, seed, offset, mode, coarse
        )
    posterior = contiguous(weight, log_sigma2, levels, thresholds)
    noise = number(seed), offset
    fused, elementwise = kernels(name), kernels("moment")
    if fused.is_fused(x, weight, levels, mode, *product):
        return fused.forward(x, *posterior, bias, *noise, mode, coarse, *product)
    mean, variance = elementwise.moments(*posterior, mode, x.dtype, order_for(x))
    y = product.forward(x, mean, bias)
    slope = coarse_order(x, torch.empty_like(y, dtype=torch.bfloat16)) if coarse else None
    elementwise.noisy(y, product.forward(x * x, variance), *noise, y, slope)
    return y, y.new_empty(0) if slope is None else slope


def _moment_product_backward(
    name: str,
    product: Product,
    grad: Tensor,
    slope: Tensor | None,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor,
    offset: int,
    mode: str,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not serves(grad, slope, x, weight, log_sigma2, levels, thresholds):
        return moment_product.moment_product_backward(
            product, grad, slope, x, weight, log_sigma2, levels, thresholds, seed, offset, mode, input_gradient
        )
    posterior = contiguous(weight, log_sigma2, levels, thresholds)
    noise = number(seed), offset
    fused, elementwise = kernels(name), kernels("moment")
    if fused.is_fused(x, weight, levels, mode, *product):
        return fused.backward(grad, slope, x, *posterior, *noise, mode, input_gradient, *product)
    mean, variance = elementwise.moments(*posterior, mode, x.dtype, order_for(x))
    square = x * x
    if slope is None:
        y_variance = product.forward(square, variance)
        slope = torch.empty_like(y_variance)
        elementwise.noisy(None, y_variance, *noise, None, slope)
    grad_x, grad_mean = product.backward(grad, x, mean, input_gradient)
    grad_square, grad_variance = product.backward(grad * slope.to(grad.dtype), square, variance, input_gradient)
    if input_gradient:
        grad_x = torch.addcmul(grad_x, x, grad_square, value=2.0)
    gradients = grad_mean.contiguous(), grad_variance.contiguous()
    return grad_x, *elementwise.moments_backward(*gradients, *posterior, mode)


def register(name: str, product_of: Callable[..., Product]) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``, from ``bqnn.kernels.<name>``."""
    forward, backward = partial(_moment_product, name), partial(_moment_product_backward, name)
    dispatch.register(name, "triton", bind(forward, product_of, moment_product.FORWARD))
    dispatch.register(f"{name}_backward", "triton", bind(backward, product_of, moment_product.BACKWARD))
