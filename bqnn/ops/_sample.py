"""The sampled product, for a linear layer and a convolution alike: y = x * Q(mu + sigma * eps) + bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.ops import quantizer
from bqnn.ops.product import Product


def sampled_product(
    product: Product,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
    offset: int,
) -> Tensor:
    """The product in x's dtype; the weight is sampled and quantized in its own."""
    codes, _ = quantizer.sample(weight, log_sigma2, thresholds, seed, offset)
    return product.forward(x, quantizer.look_up(levels, codes).to(x.dtype))


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

    Straight-through: dL/dmu = dL/dQ and dL/dlog_sigma2 = dL/dQ * sigma * eps / 2; dL/dc_m sums dL/dQ over the cell.
    """
    codes, noise = quantizer.sample(weight, log_sigma2, thresholds, seed, offset)
    quantized = quantizer.look_up(levels, codes).to(x.dtype)
    grad_x, grad_weight = product.backward(grad, x, quantized, input_gradient)
    grad_weight = grad_weight.to(weight.dtype)
    grad_log_sigma2 = weight.new_empty(0) if noise is None else 0.5 * grad_weight * noise
    return grad_x, grad_weight, grad_log_sigma2, quantizer.level_gradient(grad_weight, codes, levels)


def fake_backward(
    product: Product,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes and strides of :func:`sampled_product_backward`'s results."""
    grad_x, grad_weight = product.backward(grad, x, weight.to(x.dtype), input_gradient)
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        weight.new_empty(0) if log_sigma2 is None else torch.empty_like(weight),
        torch.empty_like(levels),
    )


def save_for_backward(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keeps what the gradients are made of: x and parameters, and the seed in place of the noise."""
    x, weight, log_sigma2, levels, thresholds, _, seed, offset = inputs[:8]
    ctx.save_for_backward(x, weight, log_sigma2, levels, thresholds, seed)
    ctx.offset, ctx.rest = offset, inputs[8:]
