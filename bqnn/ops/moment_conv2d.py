"""moment_conv2d: a convolution that propagates the mean and variance of its quantized Gaussian weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.ops import _moment
from bqnn.ops._check import check_bias, check_conv2d_input
from bqnn.ops._register import register_op
from bqnn.ops.product import Conv2dProduct


def moment_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int,
    mode: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    product = Conv2dProduct(stride, padding, dilation, groups)
    y, slope = _moment.moment_product(product, x, weight, log_sigma2, levels, thresholds, seed, offset, mode)
    return (y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)), slope


def moment_conv2d_backward_reference(
    grad: Tensor,
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    mode: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    product = Conv2dProduct(stride, padding, dilation, groups)
    return _moment.moment_product_backward(
        product, grad, slope, x, weight, log_sigma2, levels, thresholds, mode, input_gradient
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int,
    mode: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    y = Conv2dProduct(stride, padding, dilation, groups).forward(x, weight.to(x.dtype))
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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_gradient: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    product = Conv2dProduct(stride, padding, dilation, groups)
    return _moment.fake_backward(product, grad, x, weight, levels, thresholds, input_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _moment.save_for_backward(ctx, inputs, output)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    *geometry, backend = ctx.rest
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    grad_x, *gradients = torch.ops.bqnn.moment_conv2d_backward(
        grad, *ctx.saved_tensors, ctx.mode, *geometry, wants_x, backend
    )
    grad_bias = grad.sum((0, 2, 3)) if wants_bias else None
    return grad_x if wants_x else None, *gradients, grad_bias, *[None] * 8


register_op(
    "moment_conv2d_backward",
    "(Tensor grad, Tensor slope, Tensor x, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds,"
    " str mode, int[2] stride, int[2] padding, int[2] dilation, int groups, bool input_gradient,"
    " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    moment_conv2d_backward_reference,
    _fake_backward,
)
register_op(
    "moment_conv2d",
    "(Tensor x, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds, Tensor? bias, Tensor seed,"
    " int offset, str mode, int[2] stride, int[2] padding, int[2] dilation, int groups, str? backend=None)"
    " -> (Tensor, Tensor)",
    moment_conv2d_reference,
    _fake,
    _setup_context,
    _backward,
)


def moment_conv2d(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int = 0,
    mode: str = "categorical",
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """The convolution with mean and variance propagated; see :func:`bqnn.ops.moment_linear` for modes and gradients.

    Args:
        x: [B, C, H, W] floating point, any memory format; the products are taken, and returned, in its dtype.
        weight, log_sigma2: mu and log of the posterior variance, [N, C / groups, kh, kw].
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key.
        offset: Philox call that holds the noise of the first output; outputs count in [B, N, H', W'] order.
        mode: "categorical", "gaussian" or "straight_through".
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, in pixels.

    Returns:
        [B, N, H', W'] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    _moment.check_moment(weight, log_sigma2, levels, thresholds, seed, mode)
    check_conv2d_input(x, weight.shape[1] * groups, weight.shape[0], groups)
    check_bias(bias, weight.shape[0], x)
    y, _ = torch.ops.bqnn.moment_conv2d(
        x, weight, log_sigma2, levels, thresholds, bias, seed, offset, mode, stride, padding, dilation, groups, backend
    )
    return y
