"""sample_linear: a linear layer whose weight is sampled, partitioned and multiplied in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bqnn.ops import _sample
from bqnn.ops._check import check_bias, check_codebook, check_linear_input, check_same_shape
from bqnn.ops._register import register_op
from bqnn.ops.product import LinearProduct

_PRODUCT = LinearProduct()


def sample_linear_reference(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
) -> Tensor:
    y = _sample.sampled_product(_PRODUCT, x, weight, log_sigma2, levels, thresholds, seed, offset)
    return y if bias is None else y + bias.to(y.dtype)


def sample_linear_backward_reference(
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
    return _sample.sampled_product_backward(
        _PRODUCT, grad, x, weight, log_sigma2, levels, thresholds, seed, offset, input_gradient
    )


def _fake(x: Tensor, weight: Tensor, *args: Any, backend: str | None = None) -> Tensor:
    return _PRODUCT.forward(x, weight.to(x.dtype))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
    offset: int,
    input_gradient: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _sample.fake_backward(_PRODUCT, grad, x, weight, log_sigma2, levels, input_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _sample.save_for_backward(ctx, inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (backend,) = ctx.rest
    wants_x, _, wants_sigma, _, _, wants_bias, *_ = ctx.needs_input_grad
    grad_x, grad_weight, grad_log_sigma2, grad_levels = torch.ops.bqnn.sample_linear_backward(
        grad, *ctx.saved_tensors, ctx.offset, wants_x, backend
    )
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
    return (
        grad_x if wants_x else None,
        grad_weight,
        grad_log_sigma2 if wants_sigma else None,
        grad_levels,
        None,
        grad_bias,
        None,
        None,
        None,
    )


register_op(
    "sample_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds, Tensor? seed,"
    " int offset, bool input_gradient, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    sample_linear_backward_reference,
    _fake_backward,
)
register_op(
    "sample_linear",
    "(Tensor x, Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds, Tensor? bias, Tensor? seed,"
    " int offset=0, str? backend=None) -> Tensor",
    sample_linear_reference,
    _fake,
    _setup_context,
    _backward,
)


def sample_linear(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """y = x Q(mu + sigma * eps)^T + bias, with one weight sample for the whole batch.

    The gradient is straight-through for weight and log_sigma2, a sum over the cell for levels, and none for thresholds.
    Without ``log_sigma2`` sigma is 0: the deterministic M-ary layer.

    Args:
        x: [..., K] floating point; the product is taken, and returned, in its dtype.
        weight: mu, [N, K].
        log_sigma2: log of the posterior variance, [N, K], or None.
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key; needed with ``log_sigma2``.
        offset: Philox call that holds the noise of the first weight.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or no seed where one is needed.
    """
    check_sampled(weight, log_sigma2, levels, thresholds, seed)
    check_linear_input(x, weight.shape[1])
    check_bias(bias, weight.shape[0], x)
    return torch.ops.bqnn.sample_linear(x, weight, log_sigma2, levels, thresholds, bias, seed, offset, backend)


def check_sampled(
    weight: Tensor, log_sigma2: Tensor | None, levels: Tensor, thresholds: Tensor, seed: Tensor | None
) -> None:
    """Checks what sample_linear and sample_conv2d take alike."""
    num_levels = levels.shape[-1]
    check_codebook("levels", levels, weight, num_levels, num_levels)
    check_codebook("thresholds", thresholds, weight, num_levels, num_levels - 1)
    if log_sigma2 is not None:
        check_same_shape("log_sigma2", log_sigma2, weight)
        if seed is None:
            raise ValueError("seed is needed with log_sigma2, got None; pass an int64 scalar tensor")
