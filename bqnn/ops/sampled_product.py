"""The sampled product, for a linear layer and a convolution alike: y = x * Q(mu + sigma * eps) + bias.

sample_linear and sample_conv2d are this with the one product or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.check import check_levels, check_same_shape, check_seed, check_thresholds, check_weight
from bqnn.core.product import Product, bind
from bqnn.ops.register import call, register_op

FORWARD, BACKWARD = 8, 9  # arguments of the two ops before the geometry


def sampled_product(
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
    """y in x's dtype, and with x's memory format; the weight is sampled and quantized in its own dtype."""
    codes, _ = quantizer.sample(weight, log_sigma2, thresholds, seed, offset)
    return product.forward(x, quantizer.look_up(levels, codes).to(x.dtype).contiguous(), bias)


def sampled_product_backward(
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
    """Gradients for x, weight, log_sigma2 and levels; one that is not asked for, or has no variable, is empty.

    Those of parameters are contiguous.

    Straight-through: dL/dmu = dL/dQ and dL/dlog_sigma2 = dL/dQ * sigma * eps / 2; dL/dc_m sums dL/dQ over the cell.
    """
    codes, noise = quantizer.sample(weight, log_sigma2, thresholds, seed, offset)
    quantized = quantizer.look_up(levels, codes).to(x.dtype).contiguous()
    grad_x, grad_weight = product.backward(grad, x, quantized, input_gradient)
    grad_weight = grad_weight.to(weight.dtype).contiguous()
    grad_log_sigma2 = weight.new_empty(0) if noise is None else (0.5 * grad_weight * noise).contiguous()
    return grad_x, grad_weight, grad_log_sigma2, quantizer.level_gradient(grad_weight, codes, levels)


def _fake_backward(
    product: Product,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, _ = product.backward(grad, x, weight.to(x.dtype).contiguous(), rest[-1])
    like_weight = weight.new_empty(weight.shape)
    grad_log_sigma2 = weight.new_empty(0) if log_sigma2 is None else torch.empty_like(like_weight)
    return grad_x, like_weight, grad_log_sigma2, levels.new_empty(levels.shape)


def _fake(product: Product, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return product.forward(x, weight.to(x.dtype).contiguous())


def register(name: str, product_of: Callable[..., Product], geometry: str = "") -> None:
    """Registers ``bqnn::<name>`` and ``bqnn::<name>_backward``.

    Args:
        product_of: makes the product of the geometry's values.
        geometry: the part of the schema that describes them.
    """
    tensors = "Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds"
    geometry = geometry and f", {geometry}"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, log_sigma2, levels, thresholds, _, seed, ctx.offset = inputs[:FORWARD]
        ctx.save_for_backward(x, weight, log_sigma2, levels, thresholds, seed)
        ctx.geometry, ctx.backend = inputs[FORWARD:-1], inputs[-1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wants_x, _, wants_log_sigma2, _, _, wants_bias, *_ = ctx.needs_input_grad
        grad_x, grad_weight, grad_log_sigma2, grad_levels = call(
            f"{name}_backward", grad, *ctx.saved_tensors, ctx.offset, wants_x, *ctx.geometry, ctx.backend
        )
        grad_x = grad_x if wants_x else None
        grad_log_sigma2 = grad_log_sigma2 if wants_log_sigma2 else None
        grad_bias = product_of(*ctx.geometry).bias_gradient(grad) if wants_bias else None
        gradients = (grad_x, grad_weight, grad_log_sigma2, grad_levels, None, grad_bias)
        return gradients + (None,) * (len(ctx.needs_input_grad) - len(gradients))

    register_op(
        f"{name}_backward",
        f"(Tensor grad, Tensor x, {tensors}, Tensor? seed, int offset, bool input_gradient{geometry},"
        " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
        bind(sampled_product_backward, product_of, BACKWARD),
        bind(_fake_backward, product_of, BACKWARD),
    )
    register_op(
        name,
        f"(Tensor x, {tensors}, Tensor? bias, Tensor? seed, int offset{geometry}, str? backend=None) -> Tensor",
        bind(sampled_product, product_of, FORWARD),
        bind(_fake, product_of, FORWARD),
        setup_context,
        backward,
    )


def check_sampled(
    weight: Tensor,
    dimensions: int,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
) -> None:
    """Checks what both ops take alike; the weight has ``dimensions`` dimensions."""
    check_weight(weight, dimensions)
    check_levels("levels", levels, weight)
    check_thresholds(thresholds, weight, levels)
    if log_sigma2 is not None:
        check_same_shape("log_sigma2", log_sigma2, weight)
        if seed is None:
            raise ValueError("seed is needed with log_sigma2, got None; pass an int64 scalar tensor")
    if seed is not None:
        check_seed(seed)
