"""The backend "cpu" of the sampled product: the kernels sample the weight, torch multiplies. float32 only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bqnn.core.product import Product, bind
from bqnn.ops import dispatch, sampled_product
from bqnn.ops.backends.cpu import all_float32, kernels
from bqnn.ops.backends.cpu_products import Posterior, Weights, codebook_of, gradients, outputs, reuse


def _sampled_product(
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
    if not all_float32(x, weight, log_sigma2, levels, thresholds, bias):
        return sampled_product.sampled_product(product, x, weight, log_sigma2, levels, thresholds, bias, seed, offset)
    make = partial(_sampled, Posterior.of(weight, log_sigma2, levels, thresholds), seed, offset)
    (y,) = outputs(product, (x,), weight.shape[0], make, bias)
    return y


def _sampled_product_backward(
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
    if not all_float32(grad, x, weight, log_sigma2, levels, thresholds):
        return sampled_product.sampled_product_backward(
            product, grad, x, weight, log_sigma2, levels, thresholds, seed, offset, input_gradient
        )
    posterior = Posterior.of(weight, log_sigma2, levels, thresholds)
    by_posterior = weight.new_empty(0 if log_sigma2 is None else weight.shape), levels.new_zeros(levels.shape)
    make = partial(_sampled, posterior, seed, offset)
    finish = partial(_sampled_backward, posterior, seed, offset, by_posterior)
    (grad_x,), grad_weight = gradients(product, (grad,), (x,), weight.shape, make, finish, input_gradient)
    return grad_x, grad_weight, *by_posterior


def _sampled(posterior: Posterior, seed: Tensor | None, offset: int, channels: slice, spent: Weights | None) -> Weights:
    """The sampled weight of some channels."""
    part = posterior.part(channels)
    quantized = reuse(spent[0] if spent else None, part.weight)
    kernels.sample(*part, seed, offset + _calls_before(posterior, channels), quantized)
    return (quantized,)


def _sampled_backward(
    posterior: Posterior,
    seed: Tensor | None,
    offset: int,
    gradients: tuple[Tensor, Tensor],
    channels: slice,
    grad_weight: Tensor,
) -> None:
    """The gradients of log_sigma2 and levels of some channels, from that of the weight."""
    part = posterior.part(channels)
    by_levels = torch.empty_like(part.levels)
    calls = offset + _calls_before(posterior, channels)
    kernels.sample_backward(grad_weight, *part, seed, calls, gradients[0][channels], by_levels)
    codebook_of(gradients[1], channels).add_(by_levels)


def _calls_before(posterior: Posterior, channels: slice) -> int:
    """How many calls of Philox there are for the channels before, four weights each."""
    return (channels.start or 0) * posterior.weight[:1].numel() // 4


def register(name: str, product_of: Callable[..., Product]) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``."""
    dispatch.register(name, "cpu", bind(_sampled_product, product_of, sampled_product.FORWARD))
    dispatch.register(f"{name}_backward", "cpu", bind(_sampled_product_backward, product_of, sampled_product.BACKWARD))
