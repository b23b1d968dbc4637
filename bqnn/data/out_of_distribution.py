"""Images from outside a data set's distribution: made of its own ones, of nothing, or taken from another data set."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bqnn.data.splits import Split, Splits, load_dataset, resize

OTHERS = {1: "cifar10", 3: "mnist"}
"""By the channels of a data set, another one whose images are unlike its own."""


def outside_images(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Images [B, C, H, W] that are in no distribution of photographs or digits, uint8 as ``images`` are, by name.

    ``inverted``: white for black. ``uniform noise``: every value drawn by itself. ``shuffled pixels``: the pixels of
    each image in an order of its own, channels together.
    """
    batch, channels, height, width = images.shape
    order = torch.rand(batch, 1, height * width, generator=generator).argsort(-1).expand(-1, channels, -1)
    return {
        "inverted": 255 - images,
        "uniform noise": torch.randint(256, images.shape, dtype=torch.uint8, generator=generator),
        "shuffled pixels": images.flatten(2).gather(2, order).view_as(images),
    }


def other_name(data: Splits) -> str:
    """The name of the data set whose images are taken as outside of ``data``."""
    return OTHERS[data.in_channels]


def other_images(data: Splits, split: str, data_root: str | Path, generator: torch.Generator) -> Tensor | None:
    """Images of another data set as ``data`` would hold them: of its size, in grey, or in colour with equal channels.

    Args:
        data: the data set, grey or colour.
        split: "test" or "validation", of both.
        data_root: where data sets are.
        generator: chooses the images where the other data set has more than ``data``.

    Returns:
        uint8 [B, C, H, W], at most as many as the split of ``data`` has; None where the other data set is not in
        ``data_root``, or what reads it is not installed.
    """
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    try:
        other: Split = getattr(load_dataset(other_name(data), data_root), split)
    except (FileNotFoundError, ImportError):
        return None
    chosen = torch.randperm(len(other), generator=generator)[: len(getattr(data, split))]
    images = resize(Split(other.images[chosen], other.labels[chosen]), data.image_size).images
    return rgb_to_grayscale(images) if data.in_channels == 1 else images.expand(-1, data.in_channels, -1, -1)
