"""The backend "cpu" of the moment-matched product: torch multiplies, kernels make one pass each of what is around.

float32 only. A coarse variance is taken in bfloat16 from the first product on where the processor has instructions for
it: products twice to several times as fast. Noise is made from the seed wherever it is needed, and never stored.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bqnn.core.product import channels_last, coarse_order, dense, is_wide
from bqnn.core.quantizer import MODES, Posterior, codebook_of
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import kernels, multiplies_bfloat16, not_float32, serves
from bqnn.ops.backends.cpu_products import Weights, gradients, outputs, reuse
from bqnn.ops.moment_product import Gradients, MomentBackwardCall, MomentCall

LARGE_LINEAR = 1 << 18  # weights from which on a linear layer's bfloat16 products are faster than its float32 ones


def _moment_product(call: MomentCall) -> tuple[Tensor, Tensor]:
    x, posterior, coarse = call.x, call.posterior.contiguous(), call.coarse_variance
    fast = coarse and _gains_from_bfloat16(x, posterior.weight)
    make = partial(_weight_moments, posterior, call.mode, fast)
    y, y_variance = outputs(call.product, (x, _square(x, fast)), posterior.weight.shape[0], make, call.bias)
    if coarse:
        y_variance = coarse_order(x, y_variance.bfloat16())
    kernels.add_noise(y, y_variance, *call.noise, coarse)  # a coarse variance becomes dy/dVar in its place
    return y, y_variance if coarse else y.new_empty(0)


def _moment_product_backward(call: MomentBackwardCall) -> Gradients:
    x, slope, posterior = call.x, call.slope, call.posterior.contiguous()
    weight, _, levels, thresholds = posterior
    fast = slope is not None and _gains_from_bfloat16(x, weight)
    grad, square = dense(call.grad), _square(x, fast)
    make = partial(_weight_moments, posterior, call.mode, fast)
    by_variance = torch.empty_like(grad if slope is None or not fast else slope)
    if slope is None:
        (variance,) = outputs(call.product, (square,), weight.shape[0], make, None)
        kernels.noise_gradient(grad, variance, *call.noise, by_variance)
    else:
        kernels.multiply(grad, dense(slope), by_variance)
    by_codebook = levels.new_zeros(levels.shape), thresholds.new_zeros(thresholds.shape)
    by_posterior = (weight.new_empty(weight.shape), *by_codebook)
    finish = partial(_weight_moments_backward, posterior, call.mode, by_posterior)
    operands = (grad, by_variance), (x, square), weight.shape
    (grad_x, grad_square), grad_weight = gradients(call.product, *operands, make, finish, call.input_gradient)
    if call.input_gradient:
        grad_x = dense(grad_x)
        kernels.add_square_gradient(grad_x, dense(x), dense(grad_square))
    return grad_x, grad_weight, *by_posterior


def _serves_backward(call: MomentBackwardCall) -> str:
    return not_float32(call._replace(slope=None))  # which is bfloat16


def _gains_from_bfloat16(x: Tensor, weight: Tensor) -> bool:
    return multiplies_bfloat16() and is_wide(x) and (weight.dim() == 4 or weight.numel() >= LARGE_LINEAR)


def _square(x: Tensor, fast: bool) -> Tensor:
    """x * x, in bfloat16 and channels-last order if ``fast``."""
    if not fast:
        return x * x
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    square = torch.empty(x.shape, dtype=torch.bfloat16, memory_format=layout)
    kernels.square(dense(x), square)
    return square


def _weight_moments(posterior: Posterior, mode: str, fast: bool, channels: slice, spent: Weights | None) -> Weights:
    """E and V of ``mode`` of some channels; V in bfloat16 and channels-last order if ``fast``."""
    part, (mean, variance) = posterior.part(channels), spent or (None, None)
    mean = None if mode == "gaussian" else reuse(mean, part.weight)
    variance = reuse(variance, part.weight, torch.bfloat16 if fast else torch.float32)
    kernels.moments(*part, MODES.index(mode), mean, variance)
    return part.weight if mean is None else mean, channels_last(variance) if fast else variance


def _weight_moments_backward(
    posterior: Posterior,
    mode: str,
    gradients: tuple[Tensor, Tensor, Tensor],
    channels: slice,
    grad_mean: Tensor,
    grad_variance: Tensor,
) -> None:
    """The gradients of log_sigma2, levels and thresholds of some channels; the weight's is left in ``grad_mean``."""
    part = posterior.part(channels)
    # What a mode gives no gradient to is left as it is.
    by_levels, by_thresholds = torch.zeros_like(part.levels), torch.zeros_like(part.thresholds)
    by_log_sigma2 = gradients[0][channels]
    kernels.moments_backward(
        grad_mean, grad_variance, *part, MODES.index(mode), by_log_sigma2, by_levels, by_thresholds
    )
    codebook_of(gradients[1], channels).add_(by_levels)
    codebook_of(gradients[2], channels).add_(by_thresholds)


def register(name: str) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``."""
    dispatch.register(name, "cpu", _moment_product, serves)
    dispatch.register(f"{name}_backward", "cpu", _moment_product_backward, _serves_backward)
