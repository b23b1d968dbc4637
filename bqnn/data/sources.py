"""Where the images of a data set come from: scikit-learn, torchvision's files or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bqnn.core.extras import needs
from bqnn.data.channels import with_channels
from bqnn.data.image_folder import class_names, read_image_folder

DIGITS = tuple("0123456789")
# The name of each data set's class in torchvision.
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
TORCHVISION_VALIDATION = 5_000
DIGITS_TEST, DIGITS_VALIDATION = 360, 180  # of 1,797
FOLDER_TEST, FOLDER_VALIDATION = 0.2, 0.1  # shares, where a folder has no split of its own
VALIDATION_FOLDERS = ("val", "valid", "validation")  # what people call it
TEST_SEED = 0  # the test split does not depend on the caller's seed


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and their labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Source:
    """What is read, before a validation split is held out.

    ``classes`` are their names, in the order of the labels. ``validation`` is how many images that takes by default, or
    the split itself where the data set has one.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    validation: int | Split


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Parts ``split`` into (``count`` images with the classes in proportion, the rest), each in the order it had.

    Images are ordered by their place in a random permutation of their class, as a share of the class; the first
    ``count`` are taken, so that each class gives its share, to within one image.
    """
    labels = split.labels
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    classes = labels[by_class]
    share = (torch.arange(len(labels)) - starts[classes] + 0.5).double() / sizes[classes]
    order = by_class[share.argsort(stable=True)]
    taken, rest = order[:count].sort().values, order[count:].sort().values
    return Split(split.images[taken], labels[taken]), Split(split.images[rest], labels[rest])


def read_digits() -> Source:
    """scikit-learn's digits, 1,797 images of 8x8, their 17 grey levels spread over 0..255.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    with needs("train"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test, train = hold_out(Split(images, labels), DIGITS_TEST, TEST_SEED)
    return Source(train, test, DIGITS, DIGITS_VALIDATION)


def read_torchvision(name: str, root: Path, download: bool) -> Source:
    """One of :data:`TORCHVISION`, from the files that torchvision keeps under ``root``.

    Raises:
        ImportError: torchvision is not installed.
        FileNotFoundError: the files are not there, or are damaged, and ``download`` is False.
    """
    with needs("train"):
        from torchvision import datasets
    make = getattr(datasets, TORCHVISION[name])
    try:
        train, test = (make(root, train=train, download=download) for train in (True, False))
    except RuntimeError as error:
        if download:
            raise
        call = f"load_dataset({name!r}, {str(root)!r}, download=True)"
        raise FileNotFoundError(
            f"{name} is not in {root}, or is damaged there. To download it:\n"
            f'    python -c "from bqnn.data import load_dataset; {call}"'
        ) from error
    classes = DIGITS if name == "mnist" else tuple(train.classes)  # torchvision says "0 - zero"
    return Source(_as_split(train), _as_split(test), classes, TORCHVISION_VALIDATION)


def _as_split(dataset: Any) -> Split:
    """A torchvision data set, whose ``data`` is [N, H, W] or [N, H, W, C], as a :class:`Split`."""
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.as_tensor(dataset.targets).long())


def read_folder(path: Path, image_size: int | None, cached: bool = False) -> Source:
    """A folder that has ``train``, with a folder a class, beside ``val``, ``test`` or both; or just the class folders.

    ``val`` may be called ``valid`` or ``validation``. Where there is no ``test``, a fifth of the training images is
    taken for it, the classes in proportion. ``cached`` keeps what is decoded in ``path``/train.safetensors and so on.

    Raises:
        FileNotFoundError: there is no such folder, or it has no classes, or a class without training images.
        ValueError: an image does not fit (see :func:`read_image_folder`), ``test`` or ``val`` has classes that
            ``train`` lacks, or ``train`` or all others are missing.
    """
    path = path.expanduser()
    has_train, has_test = ((path / part).is_dir() for part in ("train", "test"))
    names = [name for name in VALIDATION_FOLDERS if has_train and (path / name).is_dir()]
    if len(names) > 1:
        raise ValueError(f"{path} has {' and '.join(names)}; it may have one of them")
    if has_train != (has_test or bool(names)):
        part = "train" if has_train else "test"
        raise ValueError(f"{path} has {part} but not its counterpart; it needs train and test or val, or none of them")
    if not has_train:
        classes = class_names(path)
        splits = {"train": Split(*read_image_folder(path, classes, image_size))}
    else:
        classes = class_names(path / "train")
        parts = ["train", *names, *(["test"] if has_test else [])]
        for part in parts[1:]:
            if alien := sorted(set(class_names(path / part)) - set(classes)):
                raise ValueError(f"{path / part} has classes that {path / 'train'} lacks: {', '.join(alien)}")
        splits = {part: _read_part(path, part, classes, image_size, cached) for part in parts}
    splits = _same_channels(splits)
    train, test = splits["train"], splits.get("test")
    side = train.images.shape[-1]
    for part, split in splits.items():
        if split.images.shape[-1] != side:
            raise ValueError(
                f"{path}: train has {side} pixels a side, {part} {split.images.shape[-1]}; pass image_size"
            )
    if test is None:
        test, train = hold_out(train, round(FOLDER_TEST * len(train)), TEST_SEED)
    validation = splits[names[0]] if names else round(FOLDER_VALIDATION * len(train))
    return Source(train, test, tuple(classes), validation)


def _read_part(path: Path, part: str, classes: list[str], image_size: int | None, cached: bool) -> Split:
    cache = path / f"{part}.safetensors" if cached else None
    return Split(*read_image_folder(path / part, classes, image_size, cache, complete=part == "train"))


def _same_channels(splits: dict[str, Split]) -> dict[str, Split]:
    """Grey images repeated over three channels, where only some of the splits are grey."""
    channels = max(split.images.shape[1] for split in splits.values())
    return {part: Split(with_channels(split.images, channels), split.labels) for part, split in splits.items()}
