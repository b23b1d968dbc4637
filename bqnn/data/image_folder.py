"""Reads folders of images, PATH/CLASS/IMAGE, into one uint8 tensor, and keeps what it decoded in a safetensors file."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bqnn.core.extras import needs
from bqnn.core.files import open_regular, write_content
from bqnn.core.text import LISTED, listed, shown
from bqnn.data.channels import with_channels

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# The decoders that a file may call for, whatever its suffix says; Pillow has others, which run programs.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
ORIENTATION = 0x0112  # EXIF: how the camera was held
# What an image may say that it has, so that a small file can not ask for much memory: 16 million pixels, or more if it
# has the bytes for it, as the photographs of large cameras do.
MOST_PIXELS = 1 << 24
MOST_PIXELS_A_BYTE = 64
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found"})  # which archivers and servers make, not people
CACHE_VERSION = "2"

_NO_IMAGES = f"{{}}: no images in it ({', '.join(sorted(SUFFIXES))})"
_log = logging.getLogger("bqnn")


def class_names(path: Path) -> list[str]:
    """The class folders of ``path``, sorted: the label of a class is its place.

    Raises:
        FileNotFoundError: ``path`` is no folder, or has no folder in it.
    """
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"{path}: a file and not a folder; it should hold one folder of images a class")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; it should hold one folder of images a class")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and _is_ours(entry.name))
    if not names:
        raise FileNotFoundError(f"{path}: no class folders in it; it should hold one folder of images a class")
    return names


def read_image_folder(
    path: Path, classes: list[str], image_size: int | None = None, cache: Path | None = None, complete: bool = True
) -> tuple[Tensor, Tensor]:
    """Decodes the images of ``path``/CLASS, in the order of the classes and then of the file names.

    Images become 8-bit RGB as Pillow's ``convert("RGB")`` makes it: palettes are looked up, CMYK is converted, alpha is
    left out, grey is repeated, and of several frames the first is taken. As an EXIF orientation says, they are turned.
    More bits than 8 a grey value are refused: Pillow would clip them. Files with other endings, ``.gif`` among them,
    are left alone, as torchvision's ImageFolder does, and so are names that begin with a dot.

    Args:
        path: the folder; images are found at any depth under a class.
        classes: its class folders.
        image_size: side in pixels; an image is cut to a centred square and resized, bilinear. None keeps the images as
            they are, which then have to be squares of one size.
        cache: a file to keep the decoded tensors in. It is read instead of the images as long as their names, sizes in
            bytes and times of change stay what they were. One that is damaged, or does not hold what its images would
            give, is made again; one that can't be written is done without.
        complete: whether every class must have an image; otherwise those that have none are a warning in the log.

    Returns:
        images uint8 [N, C, H, W], C = 1 where all of them are grey, else 3; labels int64 [N].

    Raises:
        FileNotFoundError: there is no image, or none of a class and ``complete`` is set.
        ValueError: an image can't be read, is neither 8-bit grey nor colour, claims to be larger than
            :data:`MOST_PIXELS` and its bytes make likely, or has another size than the others.
    """
    by_class = [_image_files(path / name) for name in classes]
    files = [(file, label) for label, found in enumerate(by_class) for file in found]
    if not files:
        raise FileNotFoundError(_NO_IMAGES.format(path))
    if empty := [name for name, found in zip(classes, by_class) if not found]:
        _say_empty(path, empty, complete)
    key = _listing_digest(path, files, image_size) if cache is not None else ""
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    if cache is not None and (stored := _read_cache(cache, key, labels, image_size)) is not None:
        return stored, labels
    images = _decode([file for file, _ in files], image_size)
    if cache is not None:
        _write_cache(cache, key, images, labels)
    return images, labels


def image_files(path: Path) -> list[Path]:
    """The images of a folder, at any depth and in the order of their names; of a file the file, whatever its ending.

    Raises:
        FileNotFoundError: there is nothing of this name, or no image in the folder.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such image or folder of images")
        return [path]
    found = _image_files(path)
    if not found:
        raise FileNotFoundError(_NO_IMAGES.format(path))
    return found


def read_images(files: Sequence[Path], in_channels: int, image_size: int) -> Tensor:
    """Images for a network, uint8 [N, in_channels, image_size, image_size]: decoded, cut and resized as
    :func:`read_image_folder` does it, and then grey or in colour by :func:`bqnn.data.channels.with_channels`.

    Raises:
        ValueError: an image can't be read, as there, or ``in_channels`` is neither 1 nor 3.
    """
    decoded = [_decode_one(file, image_size)[0] for file in files]
    return with_channels(torch.stack(decoded), in_channels)


def _is_ours(name: str) -> bool:
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if all(map(_is_ours, file.relative_to(folder).parts)) and not file.is_dir():
            yield file


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in _files(folder) if file.suffix.lower() in SUFFIXES)


def _say_empty(path: Path, names: list[str], complete: bool) -> None:
    """Raises FileNotFoundError, or logs, that classes have no images, with what they have instead."""
    others = sorted({file.suffix.lower() or file.name for name in names[:LISTED] for file in _files(path / name)})
    instead = f"; they have {', '.join(others[:LISTED])}" if others else ""
    text = f"{path}: no images of {listed(names)} ({', '.join(sorted(SUFFIXES))}){instead}"
    if complete:
        raise FileNotFoundError(text)
    _log.warning("%s", text)


def _decode(files: list[Path], image_size: int | None) -> Tensor:
    first, grey = _decode_one(files[0], image_size)
    if first.shape[1] != first.shape[2]:
        raise ValueError(f"{files[0]}: {_size(first)} pixels are not a square; pass image_size")
    try:
        images = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    except RuntimeError as error:
        size = f"{len(files):,} images of {_size(first)} pixels"
        raise ValueError(f"{files[0].parent.parent}: {size} do not fit into memory; pass image_size") from error
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
    with needs("train"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    formats, problem = [name for name in FORMATS if name in Image.OPEN], ""
    try:
        with open_regular(file) as source, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about what an image lacks
            with Image.open(source, formats=formats) as image:
                mode = image.mode
                if problem := _problem(image, file.stat().st_size):
                    raise ValueError(problem)
                colour = _upright(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{file}: can't be read as an image: it is none of {', '.join(formats)}") from error
    except Exception as error:  # decoders raise what they like, and whatever it is, it is the image's fault
        reason = problem or f"can't be read as an image: {shown(str(error))}"
        raise ValueError(f"{file}: {reason}") from error
    if image_size is not None:
        colour = ImageOps.fit(colour, (image_size, image_size), method=Image.Resampling.BILINEAR)
    return _to_tensor(colour), mode in GREY_MODES


def _problem(image: Image.Image, n_bytes: int) -> str:
    """Why ``image``, of which nothing but the header has been read, is not decoded; "" where it is."""
    pixels, most = math.prod(image.size), max(MOST_PIXELS, MOST_PIXELS_A_BYTE * n_bytes)
    if pixels > most:
        return f"{image.size[0]}x{image.size[1]} pixels are more than {n_bytes} bytes may ask for, {most:,}"
    if image.mode not in GREY_MODES | COLOUR_MODES:
        return f"mode {image.mode} is not supported; 8-bit grey or colour is needed"
    return ""


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says; as it is where that is missing or damaged."""
    from PIL.Image import Transpose

    image.load()  # TIFF images are turned by this
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # many cameras and programs write EXIF that Pillow can not read; the pixels are whole
        return image
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_tensor(image: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def _listing_digest(path: Path, files: list[tuple[Path, int]], image_size: int | None) -> str:
    digest = hashlib.sha256(f"{CACHE_VERSION} {image_size}\n".encode())
    for file, label in files:
        status, name = file.stat(), file.relative_to(path).as_posix()
        digest.update(f"{label} {status.st_size} {status.st_mtime_ns} {name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_cache(cache: Path, key: str, labels: Tensor, image_size: int | None) -> Tensor | None:
    """The images in ``cache``; None where it is damaged, or of other images than those with ``key`` and ``labels``."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(cache).close()
        with safe_open(cache, framework="pt") as file:
            metadata = file.metadata() or {}
            shape = file.get_slice("images").get_shape()
            fits = len(shape) == 4 and shape[0] == len(labels) and shape[1] in (1, 3) and shape[2] == shape[3]
            if metadata.get("key") != key or not fits or image_size not in (None, shape[2]):
                return None
            images = file.get_tensor("images")
            whole = images.dtype == torch.uint8 and torch.equal(file.get_tensor("labels"), labels)
            return images.clone() if whole and metadata.get("crc32") == _crc32(images) else None
    except (OSError, SafetensorError):
        return None


def _write_cache(cache: Path, key: str, images: Tensor, labels: Tensor) -> None:
    from safetensors.torch import save

    blob = save({"images": images, "labels": labels}, metadata={"key": key, "crc32": _crc32(images)})
    try:
        write_content(cache, blob)
    except OSError as error:
        _log.warning("%s: not written, so the images are decoded again next time: %s", cache, error)


def _crc32(images: Tensor) -> str:
    return f"{zlib.crc32(images.contiguous().numpy().data):08x}"
