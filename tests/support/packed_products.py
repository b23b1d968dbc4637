"""Random packed layers with the dense weight that their codes stand for, and the error of a product with them."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.core.codes import pack_codes
from tests.support.shapes import INTERPRETED

IMAGE = (7, 8) if INTERPRETED else (11, 13)


def linear_case(
    num_levels: int, granularity: str, rows: int, channels: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, codes (packed), levels, bias and the dense float64 weight of those codes."""
    generator = torch.Generator().manual_seed(num_levels * 10_000 + rows + channels + columns)
    codes = torch.randint(num_levels, (channels, columns), generator=generator, dtype=torch.uint8)
    levels, weight = _levels_and_weight(codes, num_levels, granularity, generator)
    x = torch.randn(rows, columns, generator=generator)
    return x, pack_codes(codes, num_levels), levels, torch.randn(channels, generator=generator), weight


def conv2d_case(
    num_levels: int, granularity: str, shape: tuple[int, int, int], kernel_size: int | tuple[int, int], groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, codes (packed), levels, bias and the dense float64 weight of those codes; ``shape`` is that of images, output
    channels and input channels."""
    batch, channels, inputs = shape
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    generator = torch.Generator().manual_seed(num_levels * 10_000 + batch + channels + inputs)
    codes = torch.randint(num_levels, (channels, inputs // groups, *kernel), generator=generator, dtype=torch.uint8)
    levels, weight = _levels_and_weight(codes, num_levels, granularity, generator)
    x = torch.randn(batch, inputs, *IMAGE, generator=generator)
    bias = torch.randn(channels, generator=generator)
    return x, pack_codes(codes.flatten(1), num_levels), levels, bias, weight


def _levels_and_weight(
    codes: Tensor, num_levels: int, granularity: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    channels = len(codes)
    codebooks = channels if granularity == "channel" else 1
    levels = torch.randn(codebooks, num_levels, generator=generator).sort(1).values
    weight = torch.stack([levels[n % codebooks][codes[n].long()] for n in range(channels)]).double()
    return levels, weight


def relative_error(y: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of ``exact``."""
    return float((y.double() - exact).norm() / exact.double().norm())
