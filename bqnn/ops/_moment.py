"""The moment-matched product, for a linear layer and a convolution alike.

y = x * E + sqrt(x^2 * V) eps + bias, where E and V are the mean and the variance of the weight that reaches the
product: of Q(w) ("categorical"), of the Gaussian w itself ("gaussian"), or Q(mu) with the Gaussian's variance
("straight_through").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.ops import quantizer
from bqnn.ops._check import check_codebook, check_same_shape
from bqnn.ops.philox import normal
from bqnn.ops.product import Product

MODES = ("categorical", "gaussian", "straight_through")


def weight_moments(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, thresholds: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """E and V of ``mode``, in the weight's shape."""
    if mode == "categorical":
        return quantizer.moments(weight, log_sigma2, levels, thresholds)
    if mode == "gaussian":
        return weight, log_sigma2.exp()
    return quantizer.look_up(levels, quantizer.assign(weight, thresholds)), log_sigma2.exp()


def weight_moments_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`weight_moments` for weight, log_sigma2, levels and thresholds."""
    if mode == "categorical":
        return quantizer.moments_backward(grad_mean, grad_variance, weight, log_sigma2, levels, thresholds)
    grad_log_sigma2 = grad_variance * log_sigma2.exp()
    if mode == "gaussian":
        return grad_mean, grad_log_sigma2, torch.zeros_like(levels), torch.zeros_like(thresholds)
    grad_levels = quantizer.level_gradient(grad_mean, quantizer.assign(weight, thresholds), levels)
    return grad_mean, grad_log_sigma2, grad_levels, torch.zeros_like(thresholds)


def moment_product(
    product: Product,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor,
    offset: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """y without bias, and eps / (2 std) = dy/dVar[y], all that the backward pass needs of noise and deviation.

    The noise of an output is Philox's at its index in row-major order. Where the variance is 0, so is its gradient.
    """
    mean, variance = weight_moments(weight, log_sigma2, levels, thresholds, mode)
    y = product.forward(x, mean.to(x.dtype))
    std = product.forward(x * x, variance.to(x.dtype)).clamp_(min=0.0).sqrt_()
    noise = normal(seed, offset, y.shape, y.device, y.dtype)
    slope = torch.where(std > 0.0, 0.5 * noise / std, 0.0)
    return torch.addcmul(y, std, noise), slope


def moment_product_backward(
    product: Product,
    grad: Tensor,
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    mode: str,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x (empty if not asked for), weight, log_sigma2, levels and thresholds."""
    mean, variance = weight_moments(weight, log_sigma2, levels, thresholds, mode)
    grad_x, grad_mean = product.backward(grad, x, mean.to(x.dtype), input_gradient)
    grad_square, grad_variance = product.backward(grad * slope, x * x, variance.to(x.dtype), input_gradient)
    if input_gradient:
        grad_x = torch.addcmul(grad_x, x, grad_square, value=2.0)
    grad_mean, grad_variance = grad_mean.to(weight.dtype), grad_variance.to(weight.dtype)
    gradients = weight_moments_backward(grad_mean, grad_variance, weight, log_sigma2, levels, thresholds, mode)
    return grad_x, *gradients


def fake_backward(
    product: Product,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The shapes and strides of :func:`moment_product_backward`'s results."""
    return (
        product.backward(grad, x, weight.to(x.dtype), input_gradient)[0],
        torch.empty_like(weight),
        torch.empty_like(weight),
        torch.empty_like(levels),
        torch.empty_like(thresholds),
    )


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps x, parameters, and the one tensor of the output's size."""
    x, weight, log_sigma2, levels, thresholds, _, _, _, mode = inputs[:9]
    ctx.save_for_backward(output[1], x, weight, log_sigma2, levels, thresholds)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.mode, ctx.rest = mode, inputs[9:]


def check_moment(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, thresholds: Tensor, seed: Tensor, mode: str
) -> None:
    """Checks what moment_linear and moment_conv2d take alike."""
    num_levels = levels.shape[-1]
    check_codebook("levels", levels, weight, num_levels, num_levels)
    check_codebook("thresholds", thresholds, weight, num_levels, num_levels - 1)
    check_same_shape("log_sigma2", log_sigma2, weight)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be an int64 scalar tensor, got {type(seed).__name__}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
