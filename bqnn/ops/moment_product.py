"""The moment-matched product, for a linear layer and a convolution alike.

y = x * E + sqrt(x^2 * V) eps + bias, where E and V are the mean and the variance of the weight that reaches the
product: of Q(w) ("categorical"), of the Gaussian w itself ("gaussian"), or Q(mu) with the Gaussian's variance
("straight_through"). moment_linear and moment_conv2d are this with the one product or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.check import check_levels, check_same_shape, check_seed, check_thresholds, check_weight
from bqnn.core.philox import normal
from bqnn.core.product import Product, bind, coarse_order
from bqnn.core.quantizer import MODES
from bqnn.ops.register import call, register_op

FORWARD, BACKWARD = 10, 11  # arguments of the two ops before the geometry


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


def slope_of(variance: Tensor, noise: Tensor) -> Tensor:
    """dy/dVar = noise / (2 std); where the variance is 0, so is its gradient."""
    return torch.where(variance > 0.0, 0.5 * noise / variance.sqrt(), 0.0)


def moment_product(
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
    """y, and dy/dVar[y] in bfloat16 if ``coarse``, else an empty tensor.

    The noise of an output is Philox's at its index in row-major order.
    """
    mean, variance = weight_moments(weight, log_sigma2, levels, thresholds, mode)
    y = product.forward(x, mean.to(x.dtype).contiguous(), bias)
    variance = product.forward(x * x, variance.to(x.dtype).contiguous()).clamp_(min=0.0)
    if coarse:
        variance = variance.to(torch.bfloat16).to(x.dtype)
    noise = normal(seed, offset, y.shape, y.device, y.dtype)
    kept = coarse_order(x, slope_of(variance, noise).to(torch.bfloat16)) if coarse else y.new_empty(0)
    return torch.addcmul(y, variance.sqrt(), noise), kept


def moment_product_backward(
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
    """Gradients for x (empty if not asked for), weight, log_sigma2, levels and thresholds, the last four contiguous.

    Args:
        slope: dy/dVar, if the forward pass kept it; without it, variance and noise are made again.
    """
    mean, variance = weight_moments(weight, log_sigma2, levels, thresholds, mode)
    mean, variance = mean.to(x.dtype).contiguous(), variance.to(x.dtype).contiguous()
    grad_x, grad_mean = product.backward(grad, x, mean, input_gradient)
    if slope is None:
        noise = normal(seed, offset, grad.shape, grad.device, grad.dtype)
        slope = slope_of(product.forward(x * x, variance).clamp_(min=0.0), noise)
    grad_square, grad_variance = product.backward(grad * slope.to(grad.dtype), x * x, variance, input_gradient)
    if input_gradient:
        grad_x = torch.addcmul(grad_x, x, grad_square, value=2.0)
    grad_mean, grad_variance = grad_mean.to(weight.dtype), grad_variance.to(weight.dtype)
    gradients = weight_moments_backward(grad_mean, grad_variance, weight, log_sigma2, levels, thresholds, mode)
    by_weight, by_log_sigma2, by_levels, by_thresholds = (gradient.contiguous() for gradient in gradients)
    return grad_x, by_weight, by_log_sigma2, by_levels, by_thresholds


def _fake(product: Product, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    coarse = rest[-1]
    y = product.forward(x, weight.to(x.dtype).contiguous())
    return y, coarse_order(x, torch.empty_like(y, dtype=torch.bfloat16)) if coarse else y.new_empty(0)


def _fake_backward(
    product: Product, grad: Tensor, slope: Tensor | None, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_sigma2, levels, thresholds, *_, input_gradient = rest
    grad_x, _ = product.backward(grad, x, weight.to(x.dtype).contiguous(), input_gradient)
    by_weight, by_log_sigma2, by_levels, by_thresholds = (
        tensor.new_empty(tensor.shape) for tensor in (weight, log_sigma2, levels, thresholds)
    )
    return grad_x, by_weight, by_log_sigma2, by_levels, by_thresholds


def register(name: str, product_of: Callable[..., Product], geometry: str = "") -> None:
    """Registers ``bqnn::<name>`` and ``bqnn::<name>_backward``.

    Args:
        product_of: makes the product of the geometry's values.
        geometry: the part of the schema that describes them.
    """
    tensors = "Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds"
    geometry = geometry and f", {geometry}"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, log_sigma2, levels, thresholds, _, seed, ctx.offset, ctx.mode, coarse = inputs[:FORWARD]
        ctx.geometry, ctx.backend = inputs[FORWARD:-1], inputs[-1]
        ctx.save_for_backward(output[1] if coarse else None, x, weight, log_sigma2, levels, thresholds, seed)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        grad_x, *by_parameters = call(
            f"{name}_backward", grad, *ctx.saved_tensors, ctx.offset, ctx.mode, wants_x, *ctx.geometry, ctx.backend
        )
        grad_bias = product_of(*ctx.geometry).bias_gradient(grad) if wants_bias else None
        gradients = (grad_x if wants_x else None, *by_parameters, grad_bias)
        return gradients + (None,) * (len(ctx.needs_input_grad) - len(gradients))

    register_op(
        f"{name}_backward",
        f"(Tensor grad, Tensor? slope, Tensor x, {tensors}, Tensor seed, int offset, str mode,"
        f" bool input_gradient{geometry}, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        bind(moment_product_backward, product_of, BACKWARD),
        bind(_fake_backward, product_of, BACKWARD),
    )
    register_op(
        name,
        f"(Tensor x, {tensors}, Tensor? bias, Tensor seed, int offset, str mode, bool coarse_variance{geometry},"
        " str? backend=None) -> (Tensor, Tensor)",
        bind(moment_product, product_of, FORWARD),
        bind(_fake, product_of, FORWARD),
        setup_context,
        backward,
    )


def check_moment(
    weight: Tensor,
    dimensions: int,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor,
    mode: str,
) -> None:
    """Checks what both ops take alike; the weight has ``dimensions`` dimensions."""
    check_weight(weight, dimensions)
    check_levels("levels", levels, weight)
    check_thresholds(thresholds, weight, levels)
    check_same_shape("log_sigma2", log_sigma2, weight)
    check_seed(seed)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
