"""The data sets that the project's tables are made on, in memory, with a validation split held out of the training set.

``digits`` comes with scikit-learn; ``mnist``, ``fashion-mnist``, ``kmnist``, ``cifar10`` and ``cifar100`` are read by
torchvision, from the folders it keeps under ``data_root``; ``folder:PATH`` is any folder of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.text import suggestion
from bqnn.data.augment import augment
from bqnn.data.sources import TORCHVISION, Source, Split, hold_out, read_digits, read_folder, read_torchvision

__all__ = ["NAMES", "Split", "Splits", "augment", "batches", "load_dataset", "normalise"]

NAMES = ("digits", *TORCHVISION)
FOLDER = "folder:"  # what the name of a data set of the user's own begins with
SMALLEST_STD = 1 / 255  # of a channel that is (nearly) constant, so that normalising it does not blow it up
RESIZE_CHUNK = 4096  # images at a time: bounds the memory of their float copies


@dataclass(frozen=True)
class Splits:
    """A data set. ``mean`` and ``std`` are those of the training split, one a channel, with pixels in 0..1; ``classes``
    has the name of each label."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def load_dataset(
    name: str,
    data_root: str | Path = "data",
    *,
    validation: int | None = None,
    image_size: int | None = None,
    download: bool = False,
    seed: int = 0,
) -> Splits:
    """Reads a data set into memory.

    Args:
        name: one of :data:`NAMES`, or ``folder:PATH``, where PATH (``~`` is your home) has ``train`` beside ``val`` or
            ``test`` or both, with one folder of images a class in each, or the class folders themselves. Without
            ``test`` a fifth of the training images becomes the test split.
            ``cifar10`` is read from ``data_root/cifar10/{train,test}/CLASS/`` where torchvision's own files are not
            there; what is decoded is kept beside, in ``data_root/cifar10/{train,test}.safetensors``.
        data_root: the folder that torchvision keeps its data in.
        validation: how many training images are held out, the classes in proportion; 0 trains on all of them and
            leaves the validation split empty. None: 5,000, for digits 180, for a folder a tenth, or its own ``val``;
            beside that, nothing but 0 may be given.
        image_size: side in pixels to resize to, bilinear. None: as they are.
        download: let torchvision download what is missing.
        seed: chooses the validation images; the test split is the same for every seed.

    Raises:
        ValueError: the name is unknown, ``validation`` or ``image_size`` does not fit, or an image can't be used.
        FileNotFoundError: the data is not there.
        ImportError: the package that reads it is not installed.
    """
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size must be a positive integer or None, got {image_size!r}")
    source = _read(name, Path(data_root).expanduser(), image_size, download)
    train, held_out = resize(source.train, image_size), source.validation
    if isinstance(held_out, Split):
        if validation is not None and (isinstance(validation, bool) or validation != 0):
            raise ValueError(f"validation must be None or 0 where the data set has a split for it, got {validation!r}")
        held_out = resize(held_out, image_size)
        if validation == 0:
            held_out = Split(held_out.images[:0], held_out.labels[:0])
    else:
        count = held_out if validation is None else validation
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < len(train):
            raise ValueError(f"validation must be an integer from 0 to {len(train) - 1}, got {count!r}")
        held_out, train = hold_out(train, count, seed)
    test = resize(source.test, image_size)
    mean, std = _mean_std(train.images)
    channels, size = train.images.shape[1:3]
    return Splits(name, train, held_out, test, source.classes, channels, size, mean, std)


def _read(name: str, root: Path, image_size: int | None, download: bool) -> Source:
    if name == "digits":
        return read_digits()
    if name == "cifar10" and (root / "cifar10" / "train").is_dir() and not (root / "cifar-10-batches-py").is_dir():
        return read_folder(root / "cifar10", image_size=None, cached=True)
    if name in TORCHVISION:
        return read_torchvision(name, root, download)
    if isinstance(name, str) and name.startswith(FOLDER):
        return read_folder(Path(name.removeprefix(FOLDER)), image_size)
    hint = suggestion(name, NAMES) if isinstance(name, str) else ""
    raise ValueError(f"name must be one of {', '.join(NAMES)} or folder:PATH, got {name!r}{hint}")


def resize(split: Split, size: int | None) -> Split:
    """The same images with ``size`` pixels a side, bilinear; ``split`` itself where they have them, or for None."""
    if size is None or split.images.shape[-1] == size:
        return split
    chunks = split.images.split(RESIZE_CHUNK)
    resized = [F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True) for chunk in chunks]
    return Split(torch.cat([chunk.round().clamp(0, 255).to(torch.uint8) for chunk in resized]), split.labels)


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in 0..1, in float64 from exact counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(weights @ values)
        means.append(mean)
        deviations.append(max(float(weights @ (values - mean) ** 2) ** 0.5, SMALLEST_STD))
    return tuple(means), tuple(deviations)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, C, H, W] -> float32 (images / 255 - mean) / std, ``mean`` and ``std`` one number a channel.

    Raises:
        ValueError: ``images`` is not uint8 of four dimensions, or the channels don't agree.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or not images.shape[1] == len(mean) == len(std):
        got = f"{images.dtype} {list(images.shape)} with {len(mean)} means and {len(std)} deviations"
        raise ValueError(f"images must be uint8 [B, C, H, W] with C numbers in mean and in std, got {got}")
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - shift) / scale


def leaves_one(count: int, batch_size: int, processes: int = 1) -> bool:
    """Whether the last batch of ``count`` images would be one image, or none, for one of the processes that divide it:
    BatchNorm can not train on that."""
    return batch_size > processes and 0 < count % batch_size < 2 * processes


def batches(
    split: Split,
    batch_size: int,
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Goes once through ``split``: yields images uint8 [B, C, H, W] and labels int64 [B].

    ``shuffle`` draws one permutation, at the call, from ``generator`` (None: PyTorch's default one). ``drop_last``
    leaves out a last batch that is not full.

    Raises:
        ValueError: ``batch_size`` is not a positive integer.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    count = len(split)
    if shuffle:
        device = generator.device if generator is not None else torch.device("cpu")
        order = torch.randperm(count, generator=generator, device=device).to(split.images.device)
    else:
        order = torch.arange(count, device=split.images.device)
    stop = count - count % batch_size if drop_last else count
    chunks = [order[start : start + batch_size] for start in range(0, stop, batch_size)]
    return ((split.images[chunk], split.labels[chunk]) for chunk in chunks)
