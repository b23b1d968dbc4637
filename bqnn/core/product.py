"""The two products an op can hold, and their gradients: a linear layer's and a convolution's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.core.geometry import convolved, may_see_padding_alone
from bqnn.core.precision import wide_dtype

PRODUCT_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""The layers of torch that compute one of these products with their weight."""


def matrix(tensor: Tensor) -> Tensor:
    """[..., K] -> [rows, K]; K may be 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


ROWS_OF_A_PART = 512


def sum_of_rows(rows: Tensor) -> Tensor:
    """The sum over the rows of [R, N], in their dtype, in parts of a few hundred rows each and then of the parts.

    Of very many rows at once torch makes a sum on a GPU in scratch memory, up to the size of the rows in float32.
    """
    whole = len(rows) - len(rows) % ROWS_OF_A_PART
    parts, dtype = rows[:whole].unflatten(0, (-1, ROWS_OF_A_PART)), wide_dtype(rows.dtype)
    total = parts.sum(1, dtype=dtype).sum(0)
    if whole < len(rows):
        total += rows[whole:].sum(0, dtype=dtype)
    return total.to(rows.dtype)


def sum_of_pixels(images: Tensor) -> Tensor:
    """The sum over images and pixels of [B, N, H, W], in their dtype, likewise."""
    if images.is_contiguous(memory_format=torch.channels_last):
        return sum_of_rows(matrix(images.permute(0, 2, 3, 1)))
    return images.sum((2, 3), dtype=wide_dtype(images.dtype)).sum(0).to(images.dtype)


class Product(Protocol):
    """A product y = x * w, linear in x and in w."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x * w + bias in x's dtype, a new tensor; the weight has x's dtype, the bias any."""
        ...

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        """The gradients for x (empty unless asked for) and weight."""
        ...

    def bias_gradient(self, grad: Tensor) -> Tensor: ...

    def __iter__(self) -> Iterator[Any]:
        """The values of the geometry."""
        ...


class LinearProduct(NamedTuple):
    """x [..., K], weight [N, K] -> [..., N]."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        rows, inputs = matrix(grad), matrix(x)
        return grad @ weight if input_gradient else x.new_empty(0), rows.t() @ inputs

    def bias_gradient(self, grad: Tensor) -> Tensor:
        rows = matrix(grad)
        return sum_of_rows(rows) if grad.is_cuda else rows.sum(0)


class Conv2dProduct(NamedTuple):
    """x [B, C, H, W], weight [N, C / groups, kh, kw] -> [B, N, H', W']."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolved(
            x, weight, None if bias is None else bias.to(x.dtype), self.stride, self.padding, self.dilation, self.groups
        )

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        stride, padding, dilation, groups = self
        mask = [input_gradient, True, False]
        pointwise = x.device.type == "cpu" and tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1
        if pointwise or may_see_padding_alone(x, weight, padding, dilation):
            # Of a channels-last x with few channels torch 2.14 writes past the weight's gradient (with AVX2).
            grad, x = grad.contiguous(), x.contiguous()
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return grad_x if input_gradient else x.new_empty(0), grad_weight

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return sum_of_pixels(grad) if grad.is_cuda else grad.sum((0, 2, 3))


CONV2D_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"  # a Conv2dProduct's fields, in a schema


def channels_last(tensor: Tensor) -> Tensor:
    """An image's tensor, or a convolution's weight, in channels-last order; any other one as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    if all([tensor is None or tensor.is_contiguous() for tensor in tensors]):
        return tensors
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, in an order of elements that kernels know: row-major, or channels-last."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


WIDE = 2  # channels


def is_wide(x: Tensor) -> bool:
    """Whether a convolution gains from bfloat16 and channels-last order: not of one channel."""
    return x.dim() != 4 or x.shape[1] >= WIDE


def coarse_order(x: Tensor, output: Tensor) -> Tensor:
    """What is kept of the outputs in bfloat16, in the memory format that it is kept in."""
    return channels_last(output) if is_wide(x) else output
