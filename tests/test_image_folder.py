"""Folders of images as data sets: layout, sizes, grey and colour, errors, and the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bqnn.data import image_folder
from bqnn.data.channels import with_channels
from bqnn.data.image_folder import image_files, read_images
from bqnn.data.splits import Split, load_dataset

pytest.importorskip("PIL")


def keys(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


def write_images(
    folder: Path, count: int, *, size: tuple[int, int] = (6, 6), grey: bool = False, suffix: str = "png"
) -> None:
    """``count`` images of noise in ``folder``, ``size`` = (width, height), seeded by the folder's name."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(str(folder.name + folder.parent.name).encode()))
    for i in range(count):
        shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.{suffix}", lossless=True)


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    from PIL import Image

    for part, count in (("train", 20), ("test", 5)):
        for name in ("cat", "ant"):
            write_images(tmp_path / part / name, count)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    splits = load_dataset(f"folder:{tmp_path}")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 10)
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (2, 3, 6)
    assert splits.test.labels.tolist() == [0] * 5 + [1] * 5
    expected = np.asarray(Image.open(tmp_path / "test" / "cat" / "000.png")).transpose(2, 0, 1)
    assert torch.equal(splits.test.images[5], torch.from_numpy(expected.copy()))
    assert not list(tmp_path.glob("*.safetensors"))


def test_folder_of_classes_is_split(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_images(tmp_path / name, 20, grey=True)
    splits, other = load_dataset(f"folder:{tmp_path}"), load_dataset(f"folder:{tmp_path}", seed=3)
    assert splits.test.labels.bincount().tolist() == [4, 4, 4]
    assert (len(splits.train), len(splits.validation), splits.in_channels) == (43, 5, 1)
    assert len({*keys(splits.train), *keys(splits.validation), *keys(splits.test)}) == 60
    assert torch.equal(splits.test.images, other.test.images)


def test_folder_resizes_and_cuts_to_a_square(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    write_images(tmp_path / "b", 1, size=(7, 9))
    splits = load_dataset(f"folder:{tmp_path}", image_size=5, validation=0)
    images = torch.cat((splits.train.images, splits.test.images))
    assert images.shape == (11, 3, 5, 5)
    assert (images[..., 1:4] == 200).flatten(1).all(1).sum() == 10  # resampling reaches over the edge of the cut


def test_folder_where_one_split_is_grey(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 4)
    write_images(tmp_path / "test" / "a", 4, grey=True)
    splits = load_dataset(f"folder:{tmp_path}")
    assert splits.in_channels == 3 and splits.test.images.shape == (4, 3, 6, 6)
    assert torch.equal(splits.test.images[:, 0], splits.test.images[:, 2])


def test_folder_errors(tmp_path: Path) -> None:
    from PIL import Image

    name = f"folder:{tmp_path / 'data'}"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_dataset(name)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        load_dataset(name)
    (tmp_path / "data" / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        load_dataset(name)
    write_images(tmp_path / "data" / "a", 2, size=(6, 4))
    with pytest.raises(ValueError, match="6x4 pixels are not a square; pass image_size"):
        load_dataset(name)
    write_images(tmp_path / "data" / "a", 2)
    write_images(tmp_path / "data" / "b", 2, size=(5, 5))
    with pytest.raises(ValueError, match="b/000.png: 5x5 pixels, but .*a/000.png has 6x6; pass image_size"):
        load_dataset(name)
    Image.fromarray(np.zeros((6, 6), dtype=np.uint16)).save(tmp_path / "data" / "b" / "000.png")
    with pytest.raises(ValueError, match="000.png: mode I;16 is not supported"):
        load_dataset(name)
    (tmp_path / "data" / "b" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="000.png: can't be read as an image"):
        load_dataset(name)
    write_images(tmp_path / "data" / "train" / "a", 1)
    with pytest.raises(ValueError, match="has train but not its counterpart"):
        load_dataset(name)
    write_images(tmp_path / "data" / "test" / "c", 1)
    with pytest.raises(ValueError, match="has classes that .*train lacks: c"):
        load_dataset(name)


def test_cifar10_folder_is_cached_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 10), ("test", 3)):
        for name in ("airplane", "bird"):
            write_images(tmp_path / "cifar10" / part / name, count, suffix="webp")
    first = load_dataset("cifar10", tmp_path, validation=2)
    caches = [tmp_path / "cifar10" / f"{part}.safetensors" for part in ("train", "test")]
    assert sorted(file.name for file in (tmp_path / "cifar10").iterdir() if file.is_file()) == [
        "test.safetensors",
        "train.safetensors",
    ]

    decoded: list[Path] = []
    original = image_folder._decode_one

    def counted(file: Path, image_size: int | None) -> tuple[Tensor, bool]:
        decoded.append(file)
        return original(file, image_size)

    monkeypatch.setattr(image_folder, "_decode_one", counted)
    second = load_dataset("cifar10", tmp_path, validation=2)
    assert not decoded
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(second, part).images, getattr(first, part).images)
        assert torch.equal(getattr(second, part).labels, getattr(first, part).labels)

    caches[1].write_bytes(caches[1].read_bytes()[:50])
    assert torch.equal(load_dataset("cifar10", tmp_path, validation=2).test.images, first.test.images)
    assert decoded and all("test" in file.parts for file in decoded)

    write_images(tmp_path / "cifar10" / "train" / "bird", 11, suffix="webp")
    assert len(load_dataset("cifar10", tmp_path, validation=2).train) == 19


def test_grey_of_colour_is_that_of_pillow_and_colour_of_grey_goes_back() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 63, 3), dtype=np.uint8)
    colour = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    grey = with_channels(colour, 1)
    assert np.array_equal(grey[0, 0].numpy(), np.asarray(Image.fromarray(pixels).convert("L")))
    assert torch.equal(with_channels(with_channels(grey, 3), 1), grey)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(with_channels(with_channels(every, 3), 1), every) and with_channels(every, 1) is every
    for images, channels in ((colour, 2), (torch.zeros(1, 4, 2, 2, dtype=torch.uint8), 3)):
        with pytest.raises(ValueError, match=f"images must have {channels} channels, got {images.shape[1]}"):
            with_channels(images, channels)


def test_images_for_a_network_are_those_of_a_data_set(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 3, size=(9, 7))
    write_images(tmp_path / "b", 3, size=(5, 8))
    files = image_files(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [f"{c}/00{i}.png" for c in "ab" for i in range(3)]
    images, _ = image_folder.read_image_folder(tmp_path, ["a", "b"], 6)
    assert torch.equal(read_images(files, 3, 6), images)
    assert torch.equal(read_images(files, 1, 6), with_channels(images, 1))
    assert image_files(files[0]) == [files[0]], "a file is taken whatever its ending"
    for missing in ("none", "c"):
        (tmp_path / "c").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=f"{missing}: no "):
            image_files(tmp_path / missing)


def test_classes_have_the_names_of_their_folders(tmp_path: Path) -> None:
    for name in ("cat", "ant"):
        write_images(tmp_path / name, 10)
    splits = load_dataset(f"folder:{tmp_path}")
    assert splits.classes == ("ant", "cat") and splits.num_classes == 2
    assert load_dataset("digits").classes == tuple("0123456789")
