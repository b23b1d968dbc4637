"""Images in grey or in colour: the one rule by which either becomes the other."""

from __future__ import annotations

import torch
from torch import Tensor

GREY, COLOUR = 1, 3
# Red, green and blue in the luma of ITU-R BT.601, as 16 bits have them: what Pillow's convert("L") computes.
LUMA = (19_595, 38_470, 7_471)
LUMA_BITS = 16


def with_channels(images: Tensor, channels: int) -> Tensor:
    """``images``, uint8 [N, C, H, W], with so many channels; themselves where they have them.

    Grey is repeated over red, green and blue, and of colour the luma is taken, rounded to the nearest integer, so that
    grey images that were repeated are what they were.

    Raises:
        ValueError: they have another number of channels, and either number is neither 1 nor 3.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if (given, channels) == (GREY, COLOUR):
        return images.expand(-1, COLOUR, -1, -1).contiguous()
    if (given, channels) == (COLOUR, GREY):
        red, green, blue = (images[:, i : i + 1].to(torch.int32) for i in range(COLOUR))
        luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + (1 << (LUMA_BITS - 1))
        return (luma >> LUMA_BITS).to(torch.uint8)
    raise ValueError(f"images must have {channels} channels, got {given}; only 1 (grey) and 3 (RGB) are converted")
