"""Image files as they are found: every kind that is read, how it is converted, and those that are refused by name."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bqnn.cli import main as cli
from bqnn.data import image_folder
from bqnn.data.image_folder import class_names, read_image_folder
from bqnn.data.splits import load_dataset
from tests.support.mutations import MEGABYTES, peak_megabytes

Image = pytest.importorskip("PIL.Image")


def noise(*shape: int) -> Any:
    return np.random.default_rng(list(shape)).integers(0, 256, shape, dtype=np.uint8)


def folder_of(path: Path, *names: str, count: int = 3) -> Path:
    for name in names:
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(noise(6, 6, 3) + i).save(path / name / f"{i}.png")
    return path


def read_one(path: Path, image: Any, name: str = "x.png", **options: Any) -> tuple[torch.Tensor, bool]:
    image.save(path / name, **options)
    return image_folder._decode_one(path / name, None)


def pixels(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def palette() -> Any:
    image = Image.fromarray(noise(6, 6), "P")
    image.putpalette(list(noise(768)))
    return image


KINDS = {
    "RGB": (lambda: Image.fromarray(noise(6, 6, 3)), "x.png", {}),
    "L": (lambda: Image.fromarray(noise(6, 6)), "x.png", {}),
    "1": (lambda: Image.fromarray(noise(6, 6)).convert("1"), "x.png", {}),
    "LA": (lambda: Image.fromarray(noise(6, 6, 2), "LA"), "x.png", {}),
    "RGBA": (lambda: Image.fromarray(noise(6, 6, 4)), "x.png", {}),
    "P": (palette, "x.png", {}),
    "P-transparent": (palette, "x.png", {"transparency": 3}),
    "CMYK": (lambda: Image.fromarray(noise(6, 6, 4), "CMYK"), "x.tif", {}),
    "YCbCr": (lambda: Image.fromarray(noise(6, 6, 3), "YCbCr"), "x.tif", {}),
    "GIF-named-png": (palette, "x.png", {"format": "GIF"}),
    "WebP": (lambda: Image.fromarray(noise(6, 6, 4)), "x.webp", {"lossless": True, "exact": True}),
    "BMP": (lambda: Image.fromarray(noise(6, 6, 3)), "x.bmp", {}),
    "PPM": (lambda: Image.fromarray(noise(6, 6, 3)), "x.ppm", {}),
}


@pytest.mark.parametrize("make, name, options", KINDS.values(), ids=KINDS)
def test_every_kind_becomes_the_rgb_that_torchvision_users_know(
    tmp_path: Path, make: Callable[[], Any], name: str, options: dict[str, Any]
) -> None:
    image = make()
    found, grey = read_one(tmp_path, image, name, **options)
    assert torch.equal(found, pixels(Image.open(tmp_path / name)))
    if image.mode in ("RGB", "L", "1"):
        assert torch.equal(found, pixels(image))
    assert grey == (image.mode in ("L", "1", "LA"))


def test_alpha_is_left_out(tmp_path: Path) -> None:
    image = noise(6, 6, 4)
    found, _ = read_one(tmp_path, Image.fromarray(image))
    assert torch.equal(found, torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.webp"])
def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int, name: str) -> None:
    corners = np.zeros((16, 16, 3), dtype=np.uint8)
    corners[:8, :8], corners[:8, 8:], corners[8:, :8] = 250, 160, 80
    upright = Image.fromarray(corners)
    # How the sensor saw it: the inverse of the turn that the number asks for.
    T = Image.Transpose
    seen = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90}
    seen |= {7: T.TRANSVERSE, 8: T.ROTATE_270}
    stored = upright if orientation == 1 else upright.transpose(seen[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, _ = read_one(tmp_path, stored, name, exif=exif, quality=100)
    assert (found.int() - pixels(upright).int()).abs().max() <= 8


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"\xff" * 50, b"Exif\0\0II*\0" + b"\xff" * 20], ids=range(3))
def test_damaged_exif_does_not_cost_the_image(tmp_path: Path, exif: bytes) -> None:
    image = Image.fromarray(noise(16, 16, 3))
    found, _ = read_one(tmp_path, image, "x.jpg", exif=exif)
    assert found.shape == (3, 16, 16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *others: bytes) -> bytes:
    """A one-bit grey PNG that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(others) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    return png(side, side, zlib.compress(bytes((side // 8 + 1) * side), 9))


def jpeg(cut: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, "JPEG")
    return buffer.getvalue()[:cut]


HOSTILE = {
    "empty": b"",
    "text": b"no image",
    "truncated": jpeg(600),
    "header": jpeg(30),
    "bomb-of-20-KB": bomb(13_000),
    "claims-60000": png(60_000, 60_000, zlib.compress(bytes(100))),
    "no-pixels": png(6, 6, b""),
    "long-text": png(6, 6, zlib.compress(bytes(12)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(30_000_000)))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\n/x { } def showpage\n",
}


@pytest.mark.parametrize("blob", HOSTILE.values(), ids=HOSTILE)
def test_a_broken_or_hostile_image_is_named(tmp_path: Path, blob: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(blob) < 40_000
    folder_of(tmp_path / "data", "a", "b")
    bad = tmp_path / "data" / "b" / "1.png"
    bad.write_bytes(blob)
    before = peak_megabytes()
    with pytest.raises(ValueError, match=f"^{bad}: ") as error:
        load_dataset(f"folder:{tmp_path / 'data'}")
    assert peak_megabytes() - before < MEGABYTES
    assert "\n" not in str(error.value) and "<_io" not in str(error.value)
    assert cli.main(["train", "--dataset", f"folder:{tmp_path / 'data'}", "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"bqnn: error: {bad}: ") and err.count("\n") == 1


def test_a_large_photograph_is_read_if_it_has_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MOST_PIXELS", 100)
    assert read_one(tmp_path, Image.fromarray(noise(64, 64, 3)))[0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="256x256 pixels are more than .* bytes may ask for"):
        read_one(tmp_path, Image.new("1", (256, 256)))


@pytest.mark.parametrize("kind", ["fifo", "link", "socket"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path, "a", "b")
    bad = tmp_path / "a" / "x.png"
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "link":
        bad.symlink_to(tmp_path / "nowhere")
    else:
        os.mknod(bad, 0o140600)
    with pytest.raises(ValueError, match=f"^{bad}: can't be read as an image: "):
        load_dataset(f"folder:{tmp_path}")


def test_folders_are_folders_whatever_they_are_called(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", "b.png")
    folder_of(tmp_path / "a", "album.jpg")
    images, labels = read_image_folder(tmp_path, class_names(tmp_path))
    assert labels.tolist() == [0] * 6 + [1] * 3


def test_what_people_did_not_put_there_is_left_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", "b", "__MACOSX", "@eaDir", ".thumbnails")
    folder_of(tmp_path / "a", ".ipynb_checkpoints", "@eaDir")
    (tmp_path / "a" / "._0.png").write_bytes(b"x")
    assert class_names(tmp_path) == ["a", "b"]
    assert len(read_image_folder(tmp_path, ["a", "b"])[1]) == 6


def test_a_class_without_images_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path / "train", "a", "b")
    (tmp_path / "train" / "c").mkdir()
    folder_of(tmp_path / "test", "a")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'train'}: no images of c \\(.bmp, .*\\)$"):
        load_dataset(f"folder:{tmp_path}")
    palette().save(tmp_path / "train" / "c" / "x.gif")
    with pytest.raises(FileNotFoundError, match="no images of c .*; they have .gif"):
        load_dataset(f"folder:{tmp_path}")
    folder_of(tmp_path / "train", "c")
    with caplog.at_level(logging.WARNING, "bqnn"):
        assert load_dataset(f"folder:{tmp_path}").test.labels.tolist() == [0, 0, 0]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"{tmp_path / 'test'}: no images of b, c"
    ]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'data'}: a file and not a folder"):
        load_dataset(f"folder:{tmp_path / 'data'}")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("with_test", [False, True], ids=["train-val", "train-val-test"])
def test_a_folder_with_its_own_validation_split(tmp_path: Path, name: str, with_test: bool) -> None:
    folder_of(tmp_path / "train", "a", "b", count=10)
    folder_of(tmp_path / name, "a", "b", count=3)
    if with_test:
        folder_of(tmp_path / "test", "b", count=4)
    data = load_dataset(f"folder:{tmp_path}")
    assert len(data.validation) == 6 and len(data.test) == 4 and len(data.train) == (20 if with_test else 16)
    assert data.test.labels.tolist() == ([1] * 4 if with_test else [0, 0, 1, 1])
    without = load_dataset(f"folder:{tmp_path}", validation=0)
    assert len(without.validation) == 0 and torch.equal(without.train.images, data.train.images)
    for wrong in (3, True):
        with pytest.raises(ValueError, match="validation must be None or 0 where the data set has a split for it"):
            load_dataset(f"folder:{tmp_path}", validation=wrong)
    folder_of(tmp_path / name, "c")
    with pytest.raises(ValueError, match=f"{name} has classes that .*train lacks: c"):
        load_dataset(f"folder:{tmp_path}")


def test_only_one_validation_folder(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        folder_of(tmp_path / part, "a")
    with pytest.raises(ValueError, match="has val and valid; it may have one of them"):
        load_dataset(f"folder:{tmp_path}")


def test_classes_may_be_called_valid(tmp_path: Path) -> None:
    assert load_dataset(f"folder:{folder_of(tmp_path, 'valid', 'invalid', count=6)}").num_classes == 2


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "data", "a", "b")
    assert load_dataset("folder:~/data").num_classes == 2
    options = cli.make_parser().parse_args(["train", "--out=~/run", "--data-root=~/data", "--init=~/w"])
    assert (options.out, options.data_root, options.init) == (tmp_path / "run", tmp_path / "data", tmp_path / "w")


def cached(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return read_image_folder(path, class_names(path), cache=path / "cache")


def test_a_cache_is_checked_before_it_is_believed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder_of(tmp_path, "a", "b")
    images, labels = cached(tmp_path)
    good = {name: tensor.clone() for name, tensor in load_file(tmp_path / "cache").items()}
    files = [(file, label) for label, name in enumerate("ab") for file in sorted((tmp_path / name).iterdir())]
    key = image_folder._listing_digest(tmp_path, files, None)
    crc = image_folder._crc32(good["images"])
    wrong = {
        "other pixels": ({**good, "images": 255 - good["images"]}, {"key": key, "crc32": crc}),
        "other labels": ({**good, "labels": 1 - good["labels"]}, {"key": key, "crc32": crc}),
        "fewer images": ({"images": images[:5], "labels": labels[:5]}, {"key": key, "crc32": crc}),
        "floats": ({**good, "images": good["images"].float()}, {"key": key, "crc32": crc}),
        "no images": ({"labels": labels}, {"key": key, "crc32": crc}),
        "no digest": (good, {"key": key}),
        "no metadata": (good, None),
        "two channels": ({**good, "images": images[:, :2].contiguous()}, {"key": key, "crc32": crc}),
    }
    for name, (tensors, metadata) in wrong.items():
        save_file(tensors, tmp_path / "cache", metadata)
        found = cached(tmp_path)
        assert torch.equal(found[0], images) and torch.equal(found[1], labels), name
    save_file(good, tmp_path / "cache", {"key": key, "crc32": crc})
    for file, _ in files:
        os.rename(file, file.with_suffix(".moved"))
        file.write_bytes(b"x" * os.path.getsize(file.with_suffix(".moved")))
        os.utime(file, ns=(0, os.stat(file.with_suffix(".moved")).st_mtime_ns))
    assert torch.equal(cached(tmp_path)[0], images), "a right cache is read instead of the images"
    os.utime(files[0][0])
    with pytest.raises(ValueError, match="can't be read as an image"):
        cached(tmp_path)


def test_a_cache_that_is_no_file_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, "a", "b")
    os.mkfifo(tmp_path / "cache")
    with caplog.at_level(logging.WARNING, "bqnn"):
        assert len(cached(tmp_path)[1]) == 6
    assert "not written" in caplog.text and (tmp_path / "cache").is_fifo()
