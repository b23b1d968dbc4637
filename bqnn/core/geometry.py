"""Shapes: of linear layers and convolutions, and the padding that a convolution op does not take itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import MOST_NUMBERS, is_integer, named

MOST = 2**31 - 1


class ConvSizes(NamedTuple):
    """The sizes of a convolution over images, each (height, width); as nn.Conv2d has them."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    padding_mode: str


def sizes_over_images(conv: Any) -> ConvSizes:
    """The sizes of ``conv``, a module with the attributes of nn.Conv2d or nn.Conv1d; a convolution of one dimension is
    one over images of height 1."""
    steps = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    if len(conv.kernel_size) == 1:
        kernel, stride, padding, dilation = (
            values if isinstance(values, str) else (first, *values) for first, values in zip((1, 1, 0, 1), steps)
        )
        steps = kernel, stride, padding, dilation
    return ConvSizes(*steps, conv.padding_mode)


def as_images(x: Tensor, dimensions: int) -> Tensor:
    """x of so many ``dimensions`` beside batch and channels, as [B, C, H, W]: of one dimension with height 1; without a
    batch, as one of 1."""
    if x.dim() == dimensions + 1:
        x = x.unsqueeze(0)
    return x.unsqueeze(2) if dimensions == 1 else x


def symmetric_padding(conv: ConvSizes) -> tuple[int, int] | None:
    """The zeros on either side (height, width) that a convolution op can pad itself, or None where it can not."""
    before, after = _sides(conv)
    if before != after or (conv.padding_mode != "zeros" and any(before)):
        return None
    return before


def explicit_padding(x: Tensor, conv: ConvSizes) -> tuple[Tensor, tuple[int, int]]:
    """x, padded where it must be, and the symmetric zero padding (height, width) that is left to the op.

    Args:
        x: [B, C, H, W].
        conv: its sizes.

    Raises:
        ValueError: of padding that repeats or mirrors x there is more than x.
    """
    padding = symmetric_padding(conv)
    if padding is not None:
        return x, padding
    before, after = _sides(conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if mode in ("circular", "reflect"):
        most = [each - int(mode == "reflect") for each in x.shape[2:]]
        if any(max(a, b) > each for a, b, each in zip(before, after, most, strict=True)):
            raise ValueError(f"padding must be at most {most} with padding_mode={mode!r}, got {before} and {after}")
    return F.pad(x, (before[1], after[1], before[0], after[0]), mode=mode), (0, 0)


def _sides(conv: ConvSizes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns before, and after."""
    if not isinstance(conv.padding, str):
        return conv.padding, conv.padding
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (height // 2, width // 2), (height - height // 2, width - width // 2)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    total_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of the output for an input of ``size``; ``total_padding`` counts both sides together."""
    reach = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
    return [(size[i] + total_padding[i] - reach[i]) // stride[i] + 1 for i in range(2)]


def may_see_padding_alone(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether there may be windows of nothing but padding, on the CPU: torch 2.14 reads past the end of channels-last
    images that have them, and ends the process where there is no memory (seen with AVX2 and with AMX)."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
    return x.device.type == "cpu" and any(p >= r for p, r in zip(padding, reach))


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """F.conv2d, but for what torch does not survive (:func:`may_see_padding_alone`) or gets wrong."""
    if x.device.type == "cpu" and stride[1] > 1:
        both_sides = [2 * each for each in padding]
        if output_size(x.shape[2:], weight.shape[2:], stride, both_sides, dilation)[1] == 1:
            # With AMX, torch 2.14 makes noise of a single column in bfloat16, unless its step is 1.
            y = convolved(x, weight, bias, (stride[0], 1), padding, dilation, groups)[..., :1]
            return y.contiguous(memory_format=memory_format_of(x))
    if may_see_padding_alone(x, weight, padding, dilation):
        y = F.conv2d(x.contiguous(), weight.contiguous(), bias, stride, padding, dilation, groups)
        return y.contiguous(memory_format=memory_format_of(x))
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class LinearGeometry(NamedTuple):
    """A linear layer's: x [..., K] -> [..., N]. It has the methods of :class:`Conv2dGeometry`."""

    def columns(self, x: Tensor) -> int:
        return x.shape[-1]

    def taps(self) -> int:
        return 1

    def rows(self, x: Tensor) -> int:
        return math.prod(x.shape[:-1])

    def weight_shape(self, columns: int) -> tuple[int, ...]:
        return (-1, columns)

    def output(self, x: Tensor, channels: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], channels))

    def samples(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def as_output(self, y: Tensor, x: Tensor) -> Tensor:
        return y.view(*x.shape[:-1], y.shape[-1])

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight


class Conv2dGeometry(NamedTuple):
    """A convolution's: x [B, C, H, W] -> [B, N, H', W'], zeros pad."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def columns(self, x: Tensor) -> int:
        """Weights of an output channel."""
        return x.shape[1] // self.groups * self.taps()

    def taps(self) -> int:
        """Weights of an output channel for each input channel."""
        return math.prod(self.kernel_size)

    def size(self, x: Tensor) -> list[int]:
        """Height and width of the output."""
        total = [2 * each for each in self.padding]
        return output_size(x.shape[2:], self.kernel_size, self.stride, total, self.dilation)

    def rows(self, x: Tensor) -> int:
        """Output positions, over the whole batch."""
        return x.shape[0] * math.prod(self.size(x))

    def weight_shape(self, columns: int) -> tuple[int, ...]:
        """Of the dense weight with so many weights an output channel; -1 stands for these channels."""
        return (-1, columns // self.taps(), *self.kernel_size)

    def output(self, x: Tensor, channels: int) -> Tensor:
        """A new tensor of the output's shape, dtype and memory format."""
        shape = (x.shape[0], channels, *self.size(x))
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))

    def samples(self, x: Tensor) -> Tensor:
        """x with what "int8" has one scale for in each index of the first dimension."""
        return x

    def as_output(self, y: Tensor, x: Tensor) -> Tensor:
        """The product of :meth:`samples` in the output's shape and memory format."""
        return y.contiguous(memory_format=memory_format_of(x))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a dense weight."""
        return convolved(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient for x of :meth:`product`."""
        arguments = (list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups)
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments, mask)[0]


Geometry = LinearGeometry | Conv2dGeometry


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last where x is, and not contiguous as well."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """``value``, one integer or two, as two; raises as :func:`several`."""
    height, width = several(name, value, least, 2)
    return height, width


def several(name: str, value: int | Sequence[int], least: int, count: int) -> tuple[int, ...]:
    """``value``, one integer for all dimensions or ``count`` of them, one or two, as ``count``.

    Raises:
        TypeError: it is neither an integer nor integers.
        ValueError: one is below ``least``, or beyond what the kernels count with, 32 bits.
    """
    values: Any = (value,) * count if is_integer(value) else value
    need = "one integer or two" if count == 2 else "one integer"
    if not isinstance(values, (tuple, list)) or not all(is_integer(each) for each in values):
        raise TypeError(f"{name} must be {need}, got {named(value)}")
    if len(values) != count or min(values) < least or max(values) > MOST:
        each = "each " if count == 2 else ""
        raise ValueError(f"{name} must be {need}, {each}{least} or more and at most {MOST}, got {named(value)}")
    return tuple(values)


def check_window(
    x: Tensor,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raises ValueError where a kernel's reach is more than ``x`` [B, C, H, W] with its padding, or the output has more
    numbers than memory has addresses; sizes of 0 count as 1."""
    size = output_size(x.shape[2:], kernel, stride, [2 * p for p in padding], dilation)
    if min(size) < 1:
        raise ValueError(
            f"x must be large enough for a kernel of {tuple(kernel)} with padding {tuple(padding)} and dilation "
            f"{tuple(dilation)}, got {list(x.shape)}"
        )
    if max(size) > MOST or max(x.shape[0], 1) * channels * math.prod(size) > MOST_NUMBERS:
        raise ValueError(
            f"padding must make at most {MOST} rows and columns and {MOST_NUMBERS} outputs, got {tuple(padding)}"
        )
