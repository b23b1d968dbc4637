"""The backend "triton" of the moment-matched product: kernels that make moments and multiply, or moments and torch's
products with one pass each around them.

Which of the two is decided by ``is_fused`` of the op's kernels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bqnn.core.product import coarse_order
from bqnn.ops import dispatch
from bqnn.ops.backends.triton import kernels, no_weights, numbers, order_for, other_dtype
from bqnn.ops.moment_product import Gradients, MomentBackwardCall, MomentCall


def _moment_product(name: str, call: MomentCall) -> tuple[Tensor, Tensor]:
    x, _, bias, _, mode, coarse, product = call
    if x.numel() == 0:
        y = product.forward(x, call.posterior.weight.to(x.dtype), bias)  # empty, whatever the weight is
        return y, coarse_order(x, torch.empty_like(y, dtype=torch.bfloat16)) if coarse else y.new_empty(0)
    posterior, noise = call.posterior.contiguous(), numbers(call.noise)
    fused, elementwise = kernels(name), kernels("moment")
    if fused.is_fused(x, posterior, mode, product):
        return fused.forward(x, posterior, bias, noise, mode, coarse, product)
    mean, variance = elementwise.moments(posterior, mode, x.dtype, order_for(x))
    y = product.forward(x, mean, bias)
    slope = coarse_order(x, torch.empty_like(y, dtype=torch.bfloat16)) if coarse else None
    kernels("noise").noisy(y, product.forward(x * x, variance), noise, y, slope)
    return y, y.new_empty(0) if slope is None else slope


def _moment_product_backward(name: str, call: MomentBackwardCall) -> Gradients:
    grad, slope, x, _, _, mode, input_gradient, product = call
    posterior, noise = call.posterior.contiguous(), numbers(call.noise)
    if grad.numel() == 0 or x.numel() == 0:
        grad_x = torch.zeros_like(x) if input_gradient else x.new_empty(0)
        by_weight, by_log_sigma2, by_levels, by_thresholds = (
            torch.zeros_like(tensor) for tensor in posterior if tensor is not None
        )
        return grad_x, by_weight, by_log_sigma2, by_levels, by_thresholds
    fused, elementwise = kernels(name), kernels("moment")
    if fused.is_fused(x, posterior, mode, product):
        return fused.backward(grad, slope, x, posterior, noise, mode, input_gradient, product)
    mean, variance = elementwise.moments(posterior, mode, x.dtype, order_for(x))
    square = x * x
    if slope is None:
        y_variance = product.forward(square, variance)
        slope = torch.empty_like(y_variance)
        kernels("noise").noisy(None, y_variance, noise, None, slope)
    grad_x, grad_mean = product.backward(grad, x, mean, input_gradient)
    grad_square, grad_variance = product.backward(grad * slope.to(grad.dtype), square, variance, input_gradient)
    del mean, variance, square  # before there is memory to take for the gradients
    if input_gradient:
        grad_x.addcmul_(x, grad_square, value=2.0)
    del grad_square
    by_moments = elementwise.Moments(grad_mean.contiguous(), grad_variance.contiguous())
    return grad_x, *elementwise.moments_backward(by_moments, posterior, mode)


def _serves(call: MomentCall | MomentBackwardCall) -> str:
    return other_dtype(call) or no_weights(call.posterior.weight)


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``, from ``bqnn.kernels.<name>``."""
    dispatch.register(name, "triton", partial(_moment_product, name), _serves)
    dispatch.register(f"{name}_backward", "triton", partial(_moment_product_backward, name), _serves)
