"""sample_conv2d: a convolution whose weight is sampled, partitioned and multiplied in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.ops import _sample
from bqnn.ops._check import check_bias, check_conv2d_input
from bqnn.ops._register import register_op
from bqnn.ops.product import Conv2dProduct
from bqnn.ops.sample_linear import check_sampled


def sample_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    product = Conv2dProduct(stride, padding, dilation, groups)
    y = _sample.sampled_product(product, x, weight, log_sigma2, levels, thresholds, seed, offset)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def sample_conv2d_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
    offset: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    product = Conv2dProduct(stride, padding, dilation, groups)
    return _sample.sampled_product_backward(
        product, grad, x, weight, log_sigma2, levels, thresholds, seed, offset, input_gradient
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str | None = None,
) -> Tensor:
    return Conv2dProduct(stride, padding, dilation, groups).forward(x, weight.to(x.dtype))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
    offset: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_gradient: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    product = Conv2dProduct(stride, padding, dilation, groups)
    return _sample.fake_backward(product, grad, x, weight, log_sigma2, levels, input_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _sample.save_for_backward(ctx, inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *geometry, backend = ctx.rest
    wants_x, _, wants_sigma, _, _, wants_bias, *_ = ctx.needs_input_grad
    grad_x, grad_weight, grad_log_sigma2, grad_levels = torch.ops.bqnn.sample_conv2d_backward(
        grad, *ctx.saved_tensors, ctx.offset, *geometry, wants_x, backend
    )
    return (
        grad_x if wants_x else None,
        grad_weight,
        grad_log_sigma2 if wants_sigma else None,
        grad_levels,
        None,
        grad.sum((0, 2, 3)) if wants_bias else None,
        *[None] * 7,
    )


register_op(
    "sample_conv2d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds, Tensor? seed,"
    " int offset, int[2] stride, int[2] padding, int[2] dilation, int groups, bool input_gradient,"
    " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    sample_conv2d_backward_reference,
    _fake_backward,
)
register_op(
    "sample_conv2d",
    "(Tensor x, Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds, Tensor? bias, Tensor? seed,"
    " int offset, int[2] stride, int[2] padding, int[2] dilation, int groups, str? backend=None) -> Tensor",
    sample_conv2d_reference,
    _fake,
    _setup_context,
    _backward,
)


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """The convolution of x with Q(mu + sigma * eps), plus bias; see :func:`bqnn.ops.sample_linear`.

    Args:
        x: [B, C, H, W] floating point, any memory format; the product is taken, and returned, in its dtype.
        weight: mu, [N, C / groups, kh, kw].
        log_sigma2: log of the posterior variance, the weight's shape, or None for sigma = 0.
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key; needed with ``log_sigma2``.
        offset: Philox call that holds the noise of the first weight.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, in pixels.

    Returns:
        [B, N, H', W'] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or no seed where one is needed.
    """
    check_sampled(weight, log_sigma2, levels, thresholds, seed)
    check_conv2d_input(x, weight.shape[1] * groups, weight.shape[0], groups)
    check_bias(bias, weight.shape[0], x)
    return torch.ops.bqnn.sample_conv2d(
        x, weight, log_sigma2, levels, thresholds, bias, seed, offset, stride, padding, dilation, groups, backend
    )
