"""BayesConv1d and BayesConv2d: convolutions with an M-ary quantized weight that is a distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bqnn import ops
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.options import BayesOptions
from bqnn.core.check import check_convolution_input
from bqnn.core.geometry import as_images, convolved, explicit_padding, sizes_over_images
from bqnn.core.leaf import node_of

if TYPE_CHECKING:  # of Python itself from 3.11 on
    from typing_extensions import Unpack


class _BayesConvolution(BayesLayer):
    """A convolution of one dimension or two; one of one dimension is one over images of height 1, by the same ops."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return node_of(self, x)
        dimensions = len(self.kernel_size)
        if isinstance(x, Tensor) and x.dim() == dimensions + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        check_convolution_input(x, self.in_channels, self.out_channels, self.groups, dimensions)
        y = self._convolve(as_images(x, dimensions))
        return y.squeeze(2) if dimensions == 1 else y

    def _convolve(self, images: Tensor) -> Tensor:
        sizes = sizes_over_images(self)
        x, padding = explicit_padding(images, sizes)
        if not (self.training or self.sampling):
            parameters = self._evaluation_parameters(x)
            return convolved(x, *parameters, sizes.stride, padding, sizes.dilation, self.groups)
        geometry = {"stride": sizes.stride, "padding": padding, "dilation": sizes.dilation, "groups": self.groups}
        return self._product(x, ops.sample_conv2d, ops.moment_conv2d, geometry)

    def _operand(self, weight: Tensor) -> Tensor:
        return as_images(weight, len(self.kernel_size))


class BayesConv1d(_BayesConvolution, nn.Conv1d):  # type: ignore[override]
    """nn.Conv1d whose weight is N(mu, sigma^2), quantized to M learned levels: [B, C, L] -> [B, N, L'], or without the
    batch dimension.

    Args:
        in_channels ... dtype: as nn.Conv1d takes them, string padding and padding modes included.
        options: as :class:`BayesLinear` takes them; "channel" is one codebook an output channel.

    Raises:
        TypeError, ValueError: an argument out of its range; a wrong x in the forward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | str | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[BayesOptions],
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_bayes(**options)


class BayesConv2d(_BayesConvolution, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d whose weight is N(mu, sigma^2), quantized to M learned levels (Chien and Chang 2023):
    [B, C, H, W] -> [B, N, H', W'], or without the batch dimension.

    Args:
        in_channels ... dtype: as nn.Conv2d takes them, string padding and padding modes included.
        options: as :class:`BayesLinear` takes them; "channel" is one codebook an output channel.

    Raises:
        TypeError, ValueError: an argument out of its range; a wrong x in the forward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[BayesOptions],
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_bayes(**options)
