"""The two products an op can hold, and their gradients: a linear layer's and a convolution's."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(Protocol):
    """A product y = x * w that is linear in x and in w."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        """The gradients for x (empty unless asked for) and weight."""
        ...


class LinearProduct:
    """x [..., K], weight [N, K] -> [..., N]."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, input_gradient: bool) -> tuple[Tensor, Tensor]:
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad @ weight if input_gradient else x.new_empty(0), rows.t() @ inputs


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
