"""The sampled product, for a linear layer and a convolution alike: y = x * Q(mu + sigma * eps) + bias.

sample_linear and sample_conv2d are this with the one product or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.check import check_levels, check_noise, check_same_shape, check_thresholds, check_weight
from bqnn.core.philox import Noise
from bqnn.core.product import Product
from bqnn.core.quantizer import Posterior
from bqnn.core.structure import Structure, only
from bqnn.ops.register import call, register_op


class SampledCall(NamedTuple):
    """The arguments of sample_linear and sample_conv2d."""

    x: Tensor
    posterior: Posterior
    bias: Tensor | None
    noise: Noise
    product: Product


class SampledBackwardCall(NamedTuple):
    """The arguments of their backward ops."""

    grad: Tensor
    x: Tensor
    posterior: Posterior
    noise: Noise
    input_gradient: bool
    product: Product


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""For x, weight, log_sigma2 and levels; one that is not asked for, or has no variance, is empty. Those of parameters
are contiguous."""


def sampled_product(call: SampledCall) -> Tensor:
    """y in x's dtype, and with x's memory format; the weight is sampled and quantized in its own, float32 at least."""
    posterior = call.posterior.wide()
    codes, _ = quantizer.sample(posterior, call.noise)
    weight = quantizer.look_up(posterior.levels, codes).to(call.x.dtype).contiguous()
    return call.product.forward(call.x, weight, call.bias)


def sampled_product_backward(call: SampledBackwardCall) -> Gradients:
    """Straight-through: dL/dmu = dL/dQ and dL/dlog_sigma2 = dL/dQ * sigma * eps / 2; dL/dc_m sums dL/dQ over a cell."""
    grad, x, _, _, input_gradient, product = call
    posterior = call.posterior.wide()
    levels = posterior.levels
    codes, noise = quantizer.sample(posterior, call.noise)
    quantized = quantizer.look_up(levels, codes).to(x.dtype).contiguous()
    grad_x, by_weight = product.backward(grad, x, quantized, input_gradient)
    by_weight = by_weight.to(posterior.weight.dtype)
    by_log_sigma2 = None if noise is None else 0.5 * by_weight * noise
    by_levels = quantizer.level_gradient(by_weight, codes, levels)
    gradients = only(Posterior, weight=by_weight, log_sigma2=by_log_sigma2, levels=by_levels)
    weight, log_sigma2, levels, _ = gradients.in_dtypes_of(call.posterior)
    return grad_x, weight, weight.new_empty(0) if log_sigma2 is None else log_sigma2, levels


def _fake(call: SampledCall) -> Tensor:
    return call.product.forward(call.x, call.posterior.weight.to(call.x.dtype).contiguous())


def _fake_backward(call: SampledBackwardCall) -> Gradients:
    weight, log_sigma2, levels, _ = call.posterior
    grad_x, _ = call.product.backward(call.grad, call.x, weight.to(call.x.dtype).contiguous(), call.input_gradient)
    like_weight = weight.new_empty(weight.shape)
    grad_log_sigma2 = weight.new_empty(0) if log_sigma2 is None else torch.empty_like(like_weight)
    return grad_x, like_weight, grad_log_sigma2, levels.new_empty(levels.shape)


def register(name: str, product: Callable[..., Product], geometry: str = "") -> None:
    """Registers ``bqnn::<name>`` and ``bqnn::<name>_backward``.

    Args:
        product: the class of the product.
        geometry: the part of the schema that describes its fields.
    """
    tensors = "Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds"
    geometry = geometry and f", {geometry}"

    def save(ctx: Any, call: SampledCall, output: Tensor) -> None:
        ctx.save_for_backward(call.x, *call.posterior, call.noise.seed)
        ctx.offset, ctx.product = call.noise.offset, call.product

    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *posterior, seed = ctx.saved_tensors
        wants, noise = ctx.wants, Noise(seed, ctx.offset)
        arguments = SampledBackwardCall(grad, x, Posterior(*posterior), noise, wants.x, ctx.product)
        grad_x, grad_weight, grad_log_sigma2, grad_levels = call(f"{name}_backward", arguments, ctx.backend)
        return only(
            SampledCall,
            x=grad_x if wants.x else None,
            posterior=only(
                Posterior,
                weight=grad_weight,
                log_sigma2=grad_log_sigma2 if wants.posterior.log_sigma2 else None,
                levels=grad_levels,
            ),
            bias=ctx.product.bias_gradient(grad) if wants.bias else None,
        )

    register_op(
        f"{name}_backward",
        f"(Tensor grad, Tensor x, {tensors}, Tensor? seed, int offset, bool input_gradient{geometry},"
        " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
        Structure(SampledBackwardCall, product=product),
        sampled_product_backward,
        _fake_backward,
        flops=lambda call, _: (1 + call.input_gradient) * 2 * call.grad.numel() * call.posterior.columns,
    )
    register_op(
        name,
        f"(Tensor x, {tensors}, Tensor? bias, Tensor? seed, int offset{geometry}, str? backend=None) -> Tensor",
        Structure(SampledCall, product=product),
        sampled_product,
        _fake,
        save,
        backward,
        lambda call, y: 2 * y.numel() * call.posterior.columns,
    )


def check_sampled(posterior: Posterior, dimensions: int, noise: Noise) -> None:
    """Checks what both ops take alike; the weight has ``dimensions`` dimensions."""
    weight, log_sigma2, levels, thresholds = posterior
    check_weight(weight, dimensions)
    check_levels("levels", levels, weight)
    check_thresholds(thresholds, weight, levels)
    if log_sigma2 is not None:
        check_same_shape("log_sigma2", log_sigma2, weight)
        if noise.seed is None:
            raise ValueError("seed is needed with log_sigma2, got None; pass an int64 scalar tensor")
    if noise.seed is not None:
        check_noise(noise.seed, noise.offset, weight)
