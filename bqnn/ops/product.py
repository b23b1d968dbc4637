"""The two products an op can hold, and their gradients: a linear layer's and a convolution's."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(Protocol):
    """A product y = x * w, linear in x and in w, and the bias that is added to it."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        """The gradients for x (empty unless asked for) and weight."""
        ...

    def add_bias(self, y: Tensor, bias: Tensor | None) -> Tensor: ...

    def bias_gradient(self, grad: Tensor) -> Tensor: ...


class LinearProduct(NamedTuple):
    """x [..., K], weight [N, K] -> [..., N]."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad @ weight if input_gradient else x.new_empty(0), rows.t() @ inputs

    def add_bias(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias.to(y.dtype)

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)


class Conv2dProduct(NamedTuple):
    """x [B, C, H, W], weight [N, C / groups, kh, kw] -> [B, N, H', W']."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        stride, padding, dilation, groups = self
        mask = [input_gradient, True, False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return grad_x if input_gradient else x.new_empty(0), grad_weight

    def add_bias(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))


CONV2D_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"  # a Conv2dProduct's fields, in a schema
