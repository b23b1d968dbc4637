"""Reads folders of images, PATH/CLASS/IMAGE, into one uint8 tensor, and keeps what it decoded in a safetensors file."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "CMYK", "YCbCr"})
CACHE_VERSION = "1"

_log = logging.getLogger("bqnn")


def class_names(path: Path) -> list[str]:
    """The class folders of ``path``, sorted: the label of a class is its place.

    Raises:
        FileNotFoundError: ``path`` is no folder, or has no folder in it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; it should hold one folder of images a class")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{path}: no class folders in it; it should hold one folder of images a class")
    return names


def read_image_folder(
    path: Path, classes: list[str], image_size: int | None = None, cache: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Decodes the images of ``path``/CLASS, in the order of the classes and then of the file names.

    Args:
        path: the folder; images are found at any depth under a class.
        classes: its class folders; one that is missing in ``path`` has no images.
        image_size: side in pixels; an image is cut to a centred square and resized, bilinear. None keeps the images as
            they are, which then have to be squares of one size.
        cache: a file to keep the decoded tensors in. It is read instead of the images as long as their names and sizes
            in bytes stay what they were. One that is damaged is made again; one that can't be written is done without.

    Returns:
        images uint8 [N, C, H, W], C = 1 where all of them are grey, else 3; labels int64 [N].

    Raises:
        FileNotFoundError: there is no image.
        ValueError: an image can't be read, is neither 8-bit grey nor colour, or has another size than the others.
    """
    files = [(file, label) for label, name in enumerate(classes) for file in _image_files(path / name)]
    if not files:
        raise FileNotFoundError(f"{path}: no images in it ({', '.join(sorted(SUFFIXES))})")
    key = _listing_digest(path, files, image_size) if cache is not None else ""
    if cache is not None and (stored := _read_cache(cache, key)) is not None:
        return stored
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    images = _decode([file for file, _ in files], image_size)
    if cache is not None:
        _write_cache(cache, key, images, labels)
    return images, labels


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )


def _decode(files: list[Path], image_size: int | None) -> Tensor:
    first, grey = _decode_one(files[0], image_size)
    if first.shape[1] != first.shape[2]:
        raise ValueError(f"{files[0]}: {_size(first)} pixels are not a square; pass image_size")
    images = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    for i, file in enumerate(files):
        pixels, is_grey = _decode_one(file, image_size)
        if pixels.shape != first.shape:
            raise ValueError(f"{file}: {_size(pixels)} pixels, but {files[0]} has {_size(first)}; pass image_size")
        images[i] = pixels
        grey = grey and is_grey
    return images[:, :1].clone() if grey else images


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"


def _decode_one(file: Path, image_size: int | None) -> tuple[Tensor, bool]:
    """One image as uint8 [3, H, W], and whether it is grey."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            mode = image.mode
            if mode not in GREY_MODES | COLOUR_MODES:
                raise ValueError(f"{file}: mode {mode} is not supported; 8-bit grey or colour is needed")
            colour = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file}: can't be read as an image: {error}") from error
    if image_size is not None:
        colour = ImageOps.fit(colour, (image_size, image_size), method=Image.Resampling.BILINEAR)
    return _to_tensor(colour), mode in GREY_MODES


def _to_tensor(image: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def _listing_digest(path: Path, files: list[tuple[Path, int]], image_size: int | None) -> str:
    digest = hashlib.sha256(f"{CACHE_VERSION} {image_size}\n".encode())
    for file, label in files:
        digest.update(f"{label} {file.stat().st_size} {file.relative_to(path).as_posix()}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, key: str) -> tuple[Tensor, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        return None


def _write_cache(cache: Path, key: str, images: Tensor, labels: Tensor) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
    try:
        save_file({"images": images, "labels": labels}, temporary, metadata={"key": key})
        os.replace(temporary, cache)
    except (OSError, SafetensorError) as error:
        _log.warning("%s: not written, so the images are decoded again next time: %s", cache, error)
        temporary.unlink(missing_ok=True)
