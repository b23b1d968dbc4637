"""Transposed convolutions, and GPT-2's linear layer, whose weights are those of another layer in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.core.composed import Composed


class ComposedTransposedConvolution(Composed):
    """A transposed convolution as the convolution ``conv`` of its input with zeros between the pixels.

    The weight of ``conv`` is torch's [in, out / groups, ...] with in- and output channels of a group exchanged and the
    kernel turned round (Dumoulin and Visin 2016, section 4). So an output channel has its weights side by side, its own
    codebook if it shall, and bytes that are full; and one op draws the noise of an output once. A product whose columns
    are added up (col2im) would multiply stride^2 times less, and have rows of in / groups weights alone: of one, where
    channels are groups of their own, each in a byte.
    """

    PARTS = ("conv",)
    SETTINGS: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )
    SETTINGS += ("output_padding", "padding_mode", "transposed", "_reversed_padding_repeated_twice")
    PLAIN: type[nn.Module]
    CONVOLUTION: type[nn.Module]
    conv: Any
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    _output_padding: Any

    @classmethod
    def fresh(cls, layer: Any) -> nn.Module:
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
        rest = layer.output_padding, layer.groups, layer.bias is not None, layer.dilation
        return cls.PLAIN(*sizes, *rest, device="meta")

    def _make_parts(self, layer: Any) -> None:
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size
        options = {"dilation": layer.dilation, "groups": layer.groups, "bias": layer.bias is not None}
        self.conv = self.CONVOLUTION(*sizes, **options, device="meta")

    def split(self, name: str, tensor: Any) -> dict[str, Any]:
        own = f"conv.{name}" if name in ("weight", "bias") else name
        return {own: self._turned(tensor) if name == "weight" else tensor}

    def joined(self) -> dict[str, nn.Parameter]:
        bias = {} if self.conv.bias is None else {"bias": self.conv.bias}
        return {"weight": nn.Parameter(self.weight.detach()), **bias}

    def _turned(self, weight: Tensor) -> Tensor:
        """Torch's weight in the order of the convolution's, and the other way about."""
        grouped = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return grouped.flip(tuple(range(2, weight.dim())))

    weight = property(lambda self: self._turned(self.conv.weight))
    bias = property(lambda self: self.conv.bias)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As that of torch's layer, with what ``output_size`` it takes.

        Raises:
            ValueError: ``input`` or ``output_size`` does not fit.
        """
        dimensions = len(self.kernel_size)
        if input.dim() not in (dimensions + 1, dimensions + 2):
            raise ValueError(f"x must have {dimensions + 2} dimensions, or one less without a batch, got {input.dim()}")
        steps = self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        extra = self._output_padding(input, output_size, *steps)
        return self.conv(self._with_zeros(input, extra))

    def _with_zeros(self, x: Tensor, extra: Sequence[int]) -> Tensor:
        """x with stride - 1 zeros between its positions, and around it what the kernel reaches beyond, or less of x."""
        sides: list[int] = []
        for dimension in range(-1, -len(self.kernel_size) - 1, -1):
            stride, before = self.stride[dimension], self._reach(dimension)
            if stride > 1:
                x = x.transpose(dimension, -1).unsqueeze(-1)
                x = F.pad(x, (0, stride - 1)).flatten(-2).transpose(dimension, -1)
            sides += [before, before + extra[dimension] - (stride - 1)]
        return F.pad(x, sides) if any(sides) else x

    def _reach(self, dimension: int) -> int:
        return self.dilation[dimension] * (self.kernel_size[dimension] - 1) - self.padding[dimension]


class ComposedConvTranspose1d(ComposedTransposedConvolution, nn.ConvTranspose1d):
    """nn.ConvTranspose1d as an nn.Conv1d."""

    PLAIN, CONVOLUTION = nn.ConvTranspose1d, nn.Conv1d


class ComposedConvTranspose2d(ComposedTransposedConvolution, nn.ConvTranspose2d):
    """nn.ConvTranspose2d as an nn.Conv2d."""

    PLAIN, CONVOLUTION = nn.ConvTranspose2d, nn.Conv2d


class ComposedConv1D(Composed):
    """GPT-2's linear layer, transformers' Conv1D, whose weight is [in, out], as the nn.Linear ``linear``."""

    PARTS = ("linear",)
    linear: Any
    _plain: Any

    @classmethod
    def fresh(cls, layer: Any) -> nn.Module:
        kind, (inputs, outputs) = (layer._plain if isinstance(layer, cls) else type(layer)), layer.weight.shape
        with torch.device("meta"):
            return kind(outputs, inputs)

    def _make_parts(self, layer: Any) -> None:
        inputs, outputs = layer.weight.shape
        self._plain, self.nf, self.nx = type(layer), outputs, inputs
        self.linear = nn.Linear(inputs, outputs, device="meta")

    def split(self, name: str, tensor: Any) -> dict[str, Any]:
        own = f"linear.{name}" if name in ("weight", "bias") else name
        return {own: tensor.t() if name == "weight" else tensor}

    def joined(self) -> dict[str, nn.Parameter]:
        return {"weight": nn.Parameter(self.weight.detach().contiguous()), "bias": self.linear.bias}

    weight = property(lambda self: self.linear.weight.t())
    bias = property(lambda self: self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.linear(x)
