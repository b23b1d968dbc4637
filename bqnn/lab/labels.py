"""What a network keeps of the data set that it was trained on, and another data set as this network takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.core.inputs import device_of
from bqnn.core.text import listed
from bqnn.data.channels import with_channels
from bqnn.data.splits import FOLDER, Split, Splits, normalise
from bqnn.files.metadata import Metadata


def metadata_of(data: Splits) -> Metadata:
    """What a network that is trained on ``data`` has to keep of it."""
    # Of a folder its own name: where it lies is nobody's business who gets the file.
    name = Path(data.name.removeprefix(FOLDER)).name if data.name.startswith(FOLDER) else data.name
    return Metadata(name or None, data.classes, data.in_channels, data.image_size, data.mean, data.std)


def as_taken(data: Splits, metadata: Metadata, num_logits: int) -> Splits:
    """``data`` with the channels and the normalization of a network, and the labels by which it knows the classes.

    A class is told by its name where both have names. What the network keeps none of is as in ``data``.

    Args:
        data: a data set whose images have the size that the network takes.
        metadata: of the network.
        num_logits: how many it gives.

    Raises:
        ValueError: ``data`` has classes that the network does not know, or images of other sizes.
    """
    labels = labels_of(data.classes, data.name, metadata, num_logits)
    if metadata.image_size not in (None, data.image_size):
        raise ValueError(f"{data.name} has {data.image_size} pixels a side, the network takes {metadata.image_size}")
    channels = metadata.in_channels or data.in_channels
    parts: dict[str, Any] = {
        part: Split(with_channels(split.images, channels), labels[split.labels])
        for part, split in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }
    mean, std = metadata.mean or data.mean, metadata.std or data.std
    classes = metadata.classes or data.classes
    return replace(data, **parts, classes=classes, in_channels=channels, mean=mean, std=std)


def labels_of(classes: Sequence[str], source: str, metadata: Metadata, num_logits: int) -> Tensor:
    """For each of ``classes``, of the data set ``source``, its label in a network: int64 [classes].

    Raises:
        ValueError: the network does not know one of them; or it has no names, and another number of classes.
    """
    if metadata.classes is None:
        if len(classes) != num_logits:
            raise ValueError(
                f"{source} has {len(classes)} classes ({listed(classes)}), the network {num_logits}, without names"
            )
        return torch.arange(num_logits)
    labels = {name: label for label, name in enumerate(metadata.classes)}
    if unknown := [name for name in classes if name not in labels]:
        raise ValueError(
            f"{source} has classes that the network does not know: {listed(unknown)}; it was trained on "
            f"{listed(metadata.classes)}"
        )
    return torch.tensor([labels[name] for name in classes], dtype=torch.int64)


@torch.no_grad()
def count_logits(net: nn.Module, metadata: Metadata, data: Splits) -> int:
    """How many logits a network gives for an image of its own channels and size, else of those of ``data``."""
    channels, size = metadata.in_channels or data.in_channels, metadata.image_size or data.image_size
    return int(net.eval()(torch.zeros(1, channels, size, size, device=device_of(net))).shape[-1])


def check_prepared(metadata: Metadata, source: object) -> None:
    """Raises ValueError unless the network of the file or run ``source`` says what images it takes."""
    if None in (metadata.mean, metadata.std, metadata.in_channels, metadata.image_size):
        raise ValueError(
            f"{source} does not say how images are sized and normalised, as files do that bqnn pack writes: pack the "
            "run again, or save the network with metadata=bqnn.Metadata(image_size=..., mean=..., std=...)"
        )


def prepared(images: Tensor, metadata: Metadata) -> Tensor:
    """uint8 images [B, C, H, W] as a network takes them whose metadata :func:`check_prepared` has passed."""
    assert metadata.mean is not None and metadata.std is not None
    return normalise(images, metadata.mean, metadata.std)
