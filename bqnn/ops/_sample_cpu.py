"""The backend "cpu" of the sampled product: the kernels sample the weight, torch multiplies. float32 only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bqnn import dispatch
from bqnn.ops import _sample
from bqnn.ops._cpu import all_float32, kernels
from bqnn.ops.product import Product, bind


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
        return _sample.sampled_product(product, x, weight, log_sigma2, levels, thresholds, bias, seed, offset)
    posterior = _contiguous(weight, log_sigma2, levels, thresholds)
    quantized = torch.empty_like(posterior[0])
    kernels.sample(*posterior, seed, offset, quantized)
    return product.forward(x, quantized, bias)


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
        return _sample.sampled_product_backward(
            product, grad, x, weight, log_sigma2, levels, thresholds, seed, offset, input_gradient
        )
    posterior = _contiguous(weight, log_sigma2, levels, thresholds)
    weight, levels = posterior[0], posterior[2]
    quantized = torch.empty_like(weight)
    if input_gradient:  # otherwise only the shape of it is looked at
        kernels.sample(*posterior, seed, offset, quantized)
    grad_x, grad_weight = product.backward(grad, x, quantized, input_gradient)
    grad_weight = grad_weight.contiguous()
    grad_log_sigma2 = weight.new_empty(0) if log_sigma2 is None else torch.empty_like(weight)
    grad_levels = torch.empty_like(levels)
    kernels.sample_backward(grad_weight, *posterior, seed, offset, grad_log_sigma2, grad_levels)
    return grad_x, grad_weight, grad_log_sigma2, grad_levels


def _contiguous(
    weight: Tensor, log_sigma2: Tensor | None, levels: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    log_sigma2 = None if log_sigma2 is None else log_sigma2.contiguous()
    return weight.contiguous(), log_sigma2, levels.contiguous(), thresholds.contiguous()


def register(name: str, product_of: Callable[..., Product]) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``."""
    dispatch.register(name, "cpu", bind(_sampled_product, product_of, _sample.FORWARD))
    dispatch.register(f"{name}_backward", "cpu", bind(_sampled_product_backward, product_of, _sample.BACKWARD))
