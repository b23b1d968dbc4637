"""The moment-matched product, for a linear layer and a convolution alike.

y = x * E + sqrt(x^2 * V) eps + bias, where E and V are the mean and the variance of the weight that reaches the
product: of Q(w) ("categorical"), of the Gaussian w itself ("gaussian"), or Q(mu) with the Gaussian's variance
("straight_through"). moment_linear and moment_conv2d are this with the one product or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.check import (
    check_choice,
    check_flag,
    check_levels,
    check_noise,
    check_same_shape,
    check_thresholds,
    check_weight,
)
from bqnn.core.philox import Noise
from bqnn.core.precision import is_half, wide, wide_dtype
from bqnn.core.product import Product, coarse_order
from bqnn.core.quantizer import MODES, Posterior
from bqnn.core.structure import Structure, only
from bqnn.ops.register import call, register_op


class MomentCall(NamedTuple):
    """The arguments of moment_linear and moment_conv2d."""

    x: Tensor
    posterior: Posterior
    bias: Tensor | None
    noise: Noise
    mode: str
    coarse_variance: bool
    product: Product


class MomentBackwardCall(NamedTuple):
    """The arguments of their backward ops."""

    grad: Tensor
    slope: Tensor | None
    """dy/dVar, if the forward pass kept it; without it, variance and noise are made again."""
    x: Tensor
    posterior: Posterior
    noise: Noise
    mode: str
    input_gradient: bool
    product: Product


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""For x (empty if not asked for), weight, log_sigma2, levels and thresholds, the last four contiguous."""


def weight_moments(posterior: Posterior, mode: str) -> tuple[Tensor, Tensor]:
    """E and V of ``mode``, in the weight's shape."""
    weight, log_sigma2, levels, thresholds = posterior
    assert log_sigma2 is not None
    if mode == "categorical":
        return quantizer.moments(weight, log_sigma2, levels, thresholds)
    if mode == "gaussian":
        return weight, log_sigma2.exp()
    return quantizer.look_up(levels, quantizer.assign(weight, thresholds)), log_sigma2.exp()


def weight_moments_backward(
    grad_mean: Tensor, grad_variance: Tensor, posterior: Posterior, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`weight_moments` for weight, log_sigma2, levels and thresholds."""
    weight, log_sigma2, levels, thresholds = posterior
    assert log_sigma2 is not None
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


def squares_dtype(x: Tensor, coarse: bool) -> torch.dtype:
    """What squares and variances are multiplied in: float16 ends at the square of 256."""
    if not is_half(x):
        return x.dtype
    return torch.bfloat16 if coarse else torch.float32


def moment_product(call: MomentCall) -> tuple[Tensor, Tensor]:
    """y, and dy/dVar[y] in bfloat16 if ``coarse_variance``, else an empty tensor.

    The noise of an output is Philox's at its index in row-major order.
    """
    x, product, coarse = call.x, call.product, call.coarse_variance
    mean, variance = weight_moments(call.posterior.wide(), call.mode)
    y = product.forward(x, mean.to(x.dtype).contiguous(), call.bias)
    squares = squares_dtype(x, coarse)
    variance = wide(product.forward(_square(x, squares), variance.to(squares).contiguous())).clamp_(min=0.0)
    if coarse:
        variance = variance.to(torch.bfloat16).to(variance.dtype)
    noise = call.noise.normal(variance)
    kept = coarse_order(x, slope_of(variance, noise).to(torch.bfloat16)) if coarse else y.new_empty(0)
    return torch.addcmul(wide(y), variance.sqrt(), noise).to(x.dtype), kept


def moment_product_backward(call: MomentBackwardCall) -> Gradients:
    grad, slope, x, posterior, _, mode, input_gradient, product = call
    squares = squares_dtype(x, slope is not None)
    mean, variance = weight_moments(posterior.wide(), mode)
    mean, variance, square = mean.to(x.dtype).contiguous(), variance.to(squares).contiguous(), _square(x, squares)
    grad_x, grad_mean = product.backward(grad, x, mean, input_gradient)
    if slope is None:
        y_variance = product.forward(square, variance).clamp_(min=0.0)
        slope = slope_of(y_variance, call.noise.normal(y_variance))
    by_variance = (wide(grad) * slope.to(wide_dtype(grad.dtype))).to(squares)
    grad_square, grad_variance = product.backward(by_variance, square, variance, input_gradient)
    if input_gradient:
        grad_x = torch.addcmul(wide(grad_x), wide(x), wide(grad_square), value=2.0).to(x.dtype)
    wanted = wide_dtype(posterior.weight.dtype)
    gradients = weight_moments_backward(grad_mean.to(wanted), grad_variance.to(wanted), posterior.wide(), mode)
    return grad_x, *Posterior(*gradients).in_dtypes_of(posterior)  # type: ignore[return-value]


def _square(x: Tensor, dtype: torch.dtype) -> Tensor:
    return wide(x).square().to(dtype)


def _fake(call: MomentCall) -> tuple[Tensor, Tensor]:
    y = call.product.forward(call.x, call.posterior.weight.to(call.x.dtype).contiguous())
    if not call.coarse_variance:
        return y, y.new_empty(0)
    return y, coarse_order(call.x, torch.empty_like(y, dtype=torch.bfloat16))


def _fake_backward(call: MomentBackwardCall) -> Gradients:
    weight = call.posterior.weight.to(call.x.dtype).contiguous()
    grad_x, _ = call.product.backward(call.grad, call.x, weight, call.input_gradient)
    by_weight, by_log_sigma2, by_levels, by_thresholds = (
        tensor.new_empty(tensor.shape) for tensor in call.posterior if tensor is not None
    )
    return grad_x, by_weight, by_log_sigma2, by_levels, by_thresholds


def register(name: str, product: Callable[..., Product], geometry: str = "") -> None:
    """Registers ``bqnn::<name>`` and ``bqnn::<name>_backward``.

    Args:
        product: the class of the product.
        geometry: the part of the schema that describes its fields.
    """
    tensors = "Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds"
    geometry = geometry and f", {geometry}"

    def save(ctx: Any, call: MomentCall, output: tuple[Tensor, Tensor]) -> None:
        slope = output[1] if call.coarse_variance else None
        ctx.save_for_backward(slope, call.x, *call.posterior, call.noise.seed)
        ctx.offset, ctx.mode, ctx.product = call.noise.offset, call.mode, call.product
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        if grad is None:
            return only(MomentCall)
        slope, x, *posterior, seed = ctx.saved_tensors
        wants, noise = ctx.wants, Noise(seed, ctx.offset)
        arguments = MomentBackwardCall(grad, slope, x, Posterior(*posterior), noise, ctx.mode, wants.x, ctx.product)
        grad_x, *gradients = call(f"{name}_backward", arguments, ctx.backend)
        return only(
            MomentCall,
            x=grad_x if wants.x else None,
            posterior=Posterior(*gradients),
            bias=ctx.product.bias_gradient(grad) if wants.bias else None,
        )

    register_op(
        f"{name}_backward",
        f"(Tensor grad, Tensor? slope, Tensor x, {tensors}, Tensor seed, int offset, str mode,"
        f" bool input_gradient{geometry}, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        Structure(MomentBackwardCall, product=product),
        moment_product_backward,
        _fake_backward,
        # Two products, of means and of variances, and that of the variances again where their slope was not kept.
        flops=lambda call, _: (
            (2 * (1 + call.input_gradient) + (call.slope is None)) * (2 * call.grad.numel() * call.posterior.columns)
        ),
    )
    register_op(
        name,
        f"(Tensor x, {tensors}, Tensor? bias, Tensor seed, int offset, str mode, bool coarse_variance{geometry},"
        " str? backend=None) -> (Tensor, Tensor)",
        Structure(MomentCall, product=product),
        moment_product,
        _fake,
        save,
        backward,
        lambda call, outputs: 2 * (2 * outputs[0].numel() * call.posterior.columns),
    )


def check_moment(posterior: Posterior, dimensions: int, noise: Noise, mode: str, coarse_variance: bool) -> None:
    """Checks what both ops take alike; the weight has ``dimensions`` dimensions."""
    weight, log_sigma2, levels, thresholds = posterior
    check_weight(weight, dimensions)
    check_levels("levels", levels, weight)
    check_thresholds(thresholds, weight, levels)
    check_same_shape("log_sigma2", log_sigma2, weight)  # type: ignore[arg-type]
    check_noise(noise.seed, noise.offset, weight)  # type: ignore[arg-type]
    check_choice("mode", mode, MODES)
    check_flag("coarse_variance", coarse_variance)
