"""The backend "cpu" of the sampled product: the kernels sample the weight, torch multiplies. float32 only."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bqnn.core.philox import Noise
from bqnn.core.quantizer import Posterior, codebook_of
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import kernels, serves
from bqnn.ops.backends.cpu_products import Weights, gradients, outputs, reuse
from bqnn.ops.sampled_product import Gradients, SampledBackwardCall, SampledCall


def _sampled_product(call: SampledCall) -> Tensor:
    make = partial(_sampled, call.posterior.contiguous(), call.noise)
    (y,) = outputs(call.product, (call.x,), call.posterior.weight.shape[0], make, call.bias)
    return y


def _sampled_product_backward(call: SampledBackwardCall) -> Gradients:
    posterior = call.posterior.contiguous()
    weight, log_sigma2, levels, _ = posterior
    by_posterior = weight.new_empty(0 if log_sigma2 is None else weight.shape), levels.new_zeros(levels.shape)
    make = partial(_sampled, posterior, call.noise)
    finish = partial(_sampled_backward, posterior, call.noise, by_posterior)
    operands = (call.grad,), (call.x,), weight.shape
    (grad_x,), grad_weight = gradients(call.product, *operands, make, finish, call.input_gradient)
    return grad_x, grad_weight, *by_posterior


def _sampled(posterior: Posterior, noise: Noise, channels: slice, spent: Weights | None) -> Weights:
    """The sampled weight of some channels."""
    part = posterior.part(channels)
    quantized = reuse(spent[0] if spent else None, part.weight)
    kernels.sample(*part, *_from(noise, posterior, channels), quantized)
    return (quantized,)


def _sampled_backward(
    posterior: Posterior, noise: Noise, gradients: tuple[Tensor, Tensor], channels: slice, grad_weight: Tensor
) -> None:
    """The gradients of log_sigma2 and levels of some channels, from that of the weight."""
    part = posterior.part(channels)
    by_levels = torch.empty_like(part.levels)
    by_log_sigma2 = gradients[0][channels]
    kernels.sample_backward(grad_weight, *part, *_from(noise, posterior, channels), by_log_sigma2, by_levels)
    codebook_of(gradients[1], channels).add_(by_levels)


def _from(noise: Noise, posterior: Posterior, channels: slice) -> Noise:
    """The noise from these channels on: a call of Philox serves four weights."""
    return noise._replace(offset=noise.offset + (channels.start or 0) * posterior.weight[:1].numel() // 4)


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``."""
    dispatch.register(name, "cpu", _sampled_product, serves)
    dispatch.register(f"{name}_backward", "cpu", _sampled_product_backward, serves)
