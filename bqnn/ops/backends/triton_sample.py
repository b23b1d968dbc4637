"""The backend "triton" of the sampled product: a kernel that samples and multiplies, or a sample and torch's product.

Which of the two is decided by ``is_fused`` of the op's kernels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bqnn.core.product import dense
from bqnn.ops import dispatch
from bqnn.ops.backends.triton import kernels, no_weights, numbers, order_for, other_dtype
from bqnn.ops.sampled_product import Gradients, SampledBackwardCall, SampledCall


def _sampled_product(name: str, call: SampledCall) -> Tensor:
    x, _, bias, _, product = call
    if x.numel() == 0:
        return product.forward(x, call.posterior.weight.to(x.dtype), bias)  # empty, whatever the weight is
    posterior, noise = call.posterior.contiguous(), numbers(call.noise)
    fused = kernels(name)
    if fused.is_fused(x, posterior, product):
        return fused.forward(x, posterior, bias, noise, product)
    quantized = kernels("sample").sample(posterior, noise, x.dtype, order_for(x))
    return product.forward(x, quantized, bias)


def _sampled_product_backward(name: str, call: SampledBackwardCall) -> Gradients:
    grad, x, _, _, input_gradient, product = call
    posterior, noise = call.posterior.contiguous(), numbers(call.noise)
    if grad.numel() == 0 or x.numel() == 0:
        weight, log_sigma2, levels, _ = posterior
        by_log_sigma2 = weight.new_empty(0) if log_sigma2 is None else torch.zeros_like(weight)
        grad_x = torch.zeros_like(x) if input_gradient else x.new_empty(0)
        return grad_x, torch.zeros_like(weight), by_log_sigma2, torch.zeros_like(levels)
    fused, elementwise = kernels(name), kernels("sample")
    if fused.is_fused(x, posterior, product):
        return fused.backward(grad, x, posterior, noise, input_gradient, product)
    # The sample is nobody's any more when there is memory to take for the gradients.
    grad_x, grad_weight = product.backward(
        grad, x, elementwise.sample(posterior, noise, x.dtype, order_for(x)), input_gradient
    )
    return grad_x, *elementwise.sample_backward(dense(grad_weight), posterior, noise)


def _serves(call: SampledCall | SampledBackwardCall) -> str:
    return other_dtype(call) or no_weights(call.posterior.weight)


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``, from ``bqnn.kernels.<name>``."""
    dispatch.register(name, "triton", partial(_sampled_product, name), _serves)
    dispatch.register(f"{name}_backward", "triton", partial(_sampled_product_backward, name), _serves)
