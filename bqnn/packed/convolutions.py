"""PackedConv1d and PackedConv2d: convolutions for inference whose weight is codes in bytes and a codebook."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bqnn.core.check import check_choice, check_convolution_input, check_integer
from bqnn.core.geometry import (
    Conv2dGeometry,
    as_images,
    explicit_padding,
    output_size,
    several,
    sizes_over_images,
    symmetric_padding,
)
from bqnn.ops.packed_product import check_codes
from bqnn.packed.base import PackedLayer

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class PackedConvolution(PackedLayer):
    """A convolution of one dimension or two; one of one dimension is one over images of height 1, by the same op."""

    op = "packed_conv2d"
    dimensions: int

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | Sequence[int],
        codes: Tensor,
        levels: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        precision: str = "fp32",
        execution: str = "auto",
        relu: bool = False,
        chances: Tensor | None = None,
    ) -> None:
        check_integer("in_channels", in_channels)
        check_integer("groups", groups)
        check_codes(codes)
        channels, count = len(codes), self.dimensions
        if groups < 1 or in_channels % groups or channels % groups:
            raise ValueError(
                f"groups must divide in_channels and channels, got {groups} for {in_channels} and {channels}"
            )
        kernel = several("kernel_size", kernel_size, 1, count)
        shape = (channels, in_channels // groups, *kernel)
        super().__init__(shape, codes, levels, bias, precision, execution, relu, chances)
        self.in_channels, self.out_channels, self.kernel_size, self.groups = in_channels, channels, kernel, groups
        self.stride, self.dilation = several("stride", stride, 1, count), several("dilation", dilation, 1, count)
        self.padding = padding if isinstance(padding, str) else several("padding", padding, 0, count)
        self.padding_mode = padding_mode
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and max(self.stride) > 1:
            raise ValueError(f"stride must be 1 with padding='same', got {self.stride}")
        self._sizes = sizes_over_images(self)
        self._zeros = symmetric_padding(self._sizes)

    def rows(self, x: Tensor) -> int:
        images, sizes = as_images(x, self.dimensions), self._sizes
        if sizes.padding == "same":
            return images.shape[0] * math.prod(images.shape[2:])
        padding = (0, 0) if isinstance(sizes.padding, str) else [2 * p for p in sizes.padding]
        size = output_size(images.shape[2:], sizes.kernel_size, sizes.stride, padding, sizes.dilation)
        return images.shape[0] * math.prod(size)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        ones, zeros = (1,) * self.dimensions, (0,) * self.dimensions
        defaults = {"stride": ones, "padding": zeros, "dilation": ones, "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([*parts, super().extra_repr()])

    def _check_input(self, x: Tensor) -> None:
        check_convolution_input(x, self.in_channels, self.out_channels, self.groups, self.dimensions)

    def _geometry(self) -> Conv2dGeometry:
        sizes = self._sizes
        return Conv2dGeometry(sizes.kernel_size, sizes.stride, self._zeros or (0, 0), sizes.dilation, self.groups)

    def _prepared_input(self, x: Tensor) -> Tensor:
        images = as_images(x, self.dimensions)
        return images if self._zeros is not None else explicit_padding(images, self._sizes)[0]

    def _finished_output(self, y: Tensor) -> Tensor:
        return y.squeeze(2) if self.dimensions == 1 else y

    def _run_checked(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == self.dimensions + 1:  # without a batch, as torch's layers take it too
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return super()._run_checked(x)


class PackedConv2d(PackedConvolution):
    """A two-dimensional convolution with a packed weight [out_channels, in_channels / groups, kh, kw].

    Its input is [B, in_channels, H, W] and its output [B, out_channels, H', W'], or both without the batch dimension.

    Args:
        in_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as nn.Conv2d takes them.
        codes: uint8 [N, packed_width(K, M)], K = in_channels / groups * kh * kw, in the order of weight[n].flatten().
        levels: float32 [1 or N, M], finite and increasing.
        bias: [N] or None.
        precision: "fp32", "bf16" or "int8".
        execution: "auto", "packed" or "dense".
        relu: whether negative outputs become 0; NaN stays.
        chances: float32 [M, M] or None: row m has the chances of the codes that :func:`bqnn.sample` draws for a weight
            with code m.

    Raises:
        TypeError, ValueError: an argument is wrong; the message starts with its name.
    """

    dimensions = 2


class PackedConv1d(PackedConvolution):
    """A one-dimensional convolution with a packed weight [out_channels, in_channels / groups, k].

    Its input is [B, in_channels, L] and its output [B, out_channels, L'], or both without the batch dimension. The
    arguments are those of :class:`PackedConv2d`, with one number where it has two.
    """

    dimensions = 1
