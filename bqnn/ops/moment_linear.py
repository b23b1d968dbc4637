"""moment_linear: a linear layer that propagates the mean and variance of its quantized Gaussian weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.ops import _moment
from bqnn.ops._check import check_bias, check_linear_input
from bqnn.ops._register import register_op
from bqnn.ops.product import LinearProduct

_PRODUCT = LinearProduct()


def moment_linear_reference(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    y, slope = _moment.moment_product(_PRODUCT, x, weight, log_sigma2, levels, thresholds, seed, offset, mode)
    return (y if bias is None else y + bias.to(y.dtype)), slope


def moment_linear_backward_reference(
    grad: Tensor,
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    mode: str,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _moment.moment_product_backward(
        _PRODUCT, grad, slope, x, weight, log_sigma2, levels, thresholds, mode, input_gradient
    )


def _fake(x: Tensor, weight: Tensor, *args: Any, backend: str | None = None) -> tuple[Tensor, Tensor]:
    y = _PRODUCT.forward(x, weight.to(x.dtype))
    return y, torch.empty_like(y)


def _fake_backward(
    grad: Tensor,
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    mode: str,
    input_gradient: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _moment.fake_backward(_PRODUCT, grad, x, weight, levels, thresholds, input_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _moment.save_for_backward(ctx, inputs, output)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    (backend,) = ctx.rest
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    grad_x, *gradients = torch.ops.bqnn.moment_linear_backward(grad, *ctx.saved_tensors, ctx.mode, wants_x, backend)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
    return grad_x if wants_x else None, *gradients, grad_bias, *[None] * 4


register_op(
    "moment_linear_backward",
    "(Tensor grad, Tensor slope, Tensor x, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds,"
    " str mode, bool input_gradient, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    moment_linear_backward_reference,
    _fake_backward,
)
register_op(
    "moment_linear",
    "(Tensor x, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds, Tensor? bias, Tensor seed,"
    ' int offset=0, str mode="categorical", str? backend=None) -> (Tensor, Tensor)',
    moment_linear_reference,
    _fake,
    _setup_context,
    _backward,
)


def moment_linear(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int = 0,
    mode: str = "categorical",
    backend: str | None = None,
) -> Tensor:
    """y ~ N(x E^T + bias, x^2 V^T): local reparameterisation (Kingma et al. 2015), each output with noise of its own.

    "categorical": E and V are the moments of Q(w), smooth in weight, log_sigma2, levels and thresholds, with true
    gradients for all four. "gaussian": of w itself (the published training). "straight_through": E = Q(mu) with a
    straight-through gradient, V = sigma^2.

    Args:
        x: [..., K] floating point; the products are taken, and returned, in its dtype.
        weight, log_sigma2: mu and log of the posterior variance, [N, K].
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key.
        offset: Philox call that holds the noise of the first output.
        mode: "categorical", "gaussian" or "straight_through".

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    _moment.check_moment(weight, log_sigma2, levels, thresholds, seed, mode)
    check_linear_input(x, weight.shape[1])
    check_bias(bias, weight.shape[0], x)
    y, _ = torch.ops.bqnn.moment_linear(x, weight, log_sigma2, levels, thresholds, bias, seed, offset, mode, backend)
    return y
