"""The backend "cpu" of the moment-matched product: torch multiplies, kernels make one pass each of what is around.

float32 only. A coarse variance is taken in bfloat16 from the first product on where the processor has instructions for
it: products twice to several times as fast. Noise is made from the seed wherever it is needed, and never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bqnn import dispatch
from bqnn.ops import _moment
from bqnn.ops._cpu import all_float32, kernels, multiplies_bfloat16
from bqnn.ops.product import Product, bind, channels_last, dense

LARGE_LINEAR = 1 << 18  # weights from which on a linear layer's bfloat16 products are faster than its float32 ones


def _moment_product(
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
    posterior = (weight, log_sigma2, levels, thresholds)
    if not all_float32(x, *posterior, bias):
        return _moment.moment_product(product, x, *posterior, bias, seed, offset, mode, coarse)
    fast = coarse and _gains_from_bfloat16(x, weight)
    mean, variance = _weight_moments(*posterior, mode, fast)
    y = dense(product.forward(x, mean, bias))
    y_variance = dense(product.forward(_square(x, fast), variance))
    if coarse:
        y_variance = _moment.coarse_order(x, y_variance.bfloat16())
    kernels.add_noise(y, y_variance, seed, offset, coarse)  # a coarse variance becomes dy/dVar in its place
    return y, y_variance if coarse else y.new_empty(0)


def _moment_product_backward(
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
    posterior = (weight, log_sigma2, levels, thresholds)
    if not all_float32(grad, x, *posterior):
        arguments = (seed, offset, mode, input_gradient)
        return _moment.moment_product_backward(product, grad, slope, x, *posterior, *arguments)
    fast = slope is not None and _gains_from_bfloat16(x, weight)
    grad = dense(grad)
    mean, variance = _weight_moments(*posterior, mode, fast)
    square = _square(x, fast)
    by_variance = torch.empty_like(grad if slope is None or not fast else slope)
    if slope is None:
        kernels.noise_gradient(grad, dense(product.forward(square, variance)), seed, offset, by_variance)
    else:
        kernels.multiply(grad, dense(slope), by_variance)
    grad_x, grad_mean = product.backward(grad, x, mean, input_gradient)
    grad_square, grad_variance = product.backward(by_variance, square, variance, input_gradient)
    if input_gradient:
        grad_x = dense(grad_x)
        kernels.add_square_gradient(grad_x, dense(x), dense(grad_square))
    # The mean has served, and its memory takes a gradient; a Gaussian's is the weight.
    spent = torch.empty_like(mean) if mode == "gaussian" else mean
    gradients = grad_mean.contiguous(), grad_variance.contiguous()
    return grad_x, *_weight_moments_backward(*gradients, spent, *posterior, mode)


def _gains_from_bfloat16(x: Tensor, weight: Tensor) -> bool:
    return multiplies_bfloat16() and _moment.is_wide(x) and (weight.dim() == 4 or weight.numel() >= LARGE_LINEAR)


def _square(x: Tensor, fast: bool) -> Tensor:
    """x * x, in bfloat16 and channels-last order if ``fast``."""
    if not fast:
        return x * x
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    square = torch.empty(x.shape, dtype=torch.bfloat16, memory_format=layout)
    kernels.square(dense(x), square)
    return square


def _weight_moments(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, thresholds: Tensor, mode: str, fast: bool
) -> tuple[Tensor, Tensor]:
    """E and V of ``mode``; V in bfloat16 and channels-last order if ``fast``."""
    weight, log_sigma2 = weight.contiguous(), log_sigma2.contiguous()
    mean = None if mode == "gaussian" else torch.empty_like(weight)
    variance = torch.empty_like(weight, dtype=torch.bfloat16 if fast else torch.float32)
    arguments = (levels.contiguous(), thresholds.contiguous(), _moment.MODES.index(mode))
    kernels.moments(weight, log_sigma2, *arguments, mean, variance)
    return weight if mean is None else mean, channels_last(variance) if fast else variance


def _weight_moments_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_log_sigma2: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of weight (in ``grad_mean``), log_sigma2 (in the tensor given), levels and thresholds."""
    posterior = tuple(tensor.contiguous() for tensor in (weight, log_sigma2, levels, thresholds))
    # What a mode gives no gradient to is left as it is.
    grad_levels, grad_thresholds = torch.zeros_like(posterior[2]), torch.zeros_like(posterior[3])
    kernels.moments_backward(
        grad_mean,
        grad_variance,
        *posterior,
        _moment.MODES.index(mode),
        grad_log_sigma2,
        grad_levels,
        grad_thresholds,
    )
    return grad_mean, grad_log_sigma2, grad_levels, grad_thresholds


def register(name: str, product_of: Callable[..., Product]) -> None:
    """Registers the backend for ``bqnn::<name>`` and ``bqnn::<name>_backward``."""
    dispatch.register(name, "cpu", bind(_moment_product, product_of, _moment.FORWARD))
    dispatch.register(f"{name}_backward", "cpu", bind(_moment_product_backward, product_of, _moment.BACKWARD))
