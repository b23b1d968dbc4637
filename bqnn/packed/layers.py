"""PackedLinear and PackedConv2d: layers for inference whose weight is codes in bytes and a codebook."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bqnn.core.check import check_choice, check_conv2d_input, check_integer, check_linear_input
from bqnn.core.geometry import Conv2dGeometry, LinearGeometry, explicit_padding, output_size, pair, symmetric_padding
from bqnn.ops.packed_product import check_codes
from bqnn.packed.base import PackedLayer

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class PackedLinear(PackedLayer):
    """A linear layer with a packed weight [out_features, in_features]; made by bqnn.pack and bqnn.load.

    Args:
        in_features: K.
        codes: uint8 [N, packed_width(K, M)].
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

    op = "packed_linear"

    def __init__(
        self,
        in_features: int,
        codes: Tensor,
        levels: Tensor,
        bias: Tensor | None = None,
        precision: str = "fp32",
        execution: str = "auto",
        relu: bool = False,
        chances: Tensor | None = None,
    ) -> None:
        check_integer("in_features", in_features)
        check_codes(codes)
        super().__init__((len(codes), in_features), codes, levels, bias, precision, execution, relu, chances)
        self.in_features, self.out_features = in_features, len(codes)

    def rows(self, x: Tensor) -> int:
        return LinearGeometry().rows(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"

    def _check_input(self, x: Tensor) -> None:
        check_linear_input(x, self.in_features)

    def _geometry(self) -> LinearGeometry:
        return LinearGeometry()


class PackedConv2d(PackedLayer):
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

    op = "packed_conv2d"

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
        channels = len(codes)
        if groups < 1 or in_channels % groups or channels % groups:
            raise ValueError(
                f"groups must divide in_channels and channels, got {groups} for {in_channels} and {channels}"
            )
        kernel = pair("kernel_size", kernel_size, 1)
        shape = (channels, in_channels // groups, *kernel)
        super().__init__(shape, codes, levels, bias, precision, execution, relu, chances)
        self.in_channels, self.out_channels, self.kernel_size, self.groups = in_channels, channels, kernel, groups
        self.stride, self.dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, 0)
        self.padding_mode = padding_mode
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and self.stride != (1, 1):
            raise ValueError(f"stride must be 1 with padding='same', got {self.stride}")
        self._zeros = symmetric_padding(self)

    def rows(self, x: Tensor) -> int:
        if self.padding == "same":
            return x.shape[0] * x.shape[2] * x.shape[3]
        padding = (0, 0) if isinstance(self.padding, str) else [2 * p for p in self.padding]
        size = output_size(x.shape[2:], self.kernel_size, self.stride, padding, self.dilation)
        return x.shape[0] * math.prod(size)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([*parts, super().extra_repr()])

    def _check_input(self, x: Tensor) -> None:
        check_conv2d_input(x, self.in_channels, self.out_channels, self.groups)

    def _geometry(self) -> Conv2dGeometry:
        return Conv2dGeometry(self.kernel_size, self.stride, self._zeros or (0, 0), self.dilation, self.groups)

    def _padded(self, x: Tensor) -> Tensor:
        return x if self._zeros is not None else explicit_padding(x, self)[0]

    def _run_checked(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == 3:  # without the batch dimension, as nn.Conv2d takes it too
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return super()._run_checked(x)
