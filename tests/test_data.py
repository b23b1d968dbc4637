"""Data sets: what is read, how it is split, and what happens where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bqnn.data.splits import Split, Splits, batches, load_dataset, normalise

DATA = Path(os.environ.get("BQNN_DATA", Path(__file__).parents[1] / "data"))
pytest.importorskip("PIL")


def keys(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


@pytest.fixture(scope="module")
def digits() -> Splits:
    pytest.importorskip("sklearn")
    return load_dataset("digits")


def test_digits(digits: Splits) -> None:
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1257, 180, 360)
    assert (digits.num_classes, digits.in_channels, digits.image_size) == (10, 1, 8)
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.shape == (1257, 1, 8, 8)
    assert digits.train.labels.dtype == torch.int64
    assert digits.train.images.min() == 0 and digits.train.images.max() == 255


def test_digits_splits_cover_all_and_are_disjoint(digits: Splits) -> None:
    from sklearn.datasets import load_digits

    whole = load_digits()
    levels = np.rint(whole.images * 255 / 16).astype(np.uint8)
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(levels, whole.target))
    parts = (digits.train, digits.validation, digits.test)
    found = sorted(pair for part in parts for pair in zip(keys(part), part.labels.tolist()))
    assert found == expected


def test_digits_splits_are_stratified(digits: Splits) -> None:
    whole = sum(split.labels.bincount(minlength=10) for split in (digits.train, digits.validation, digits.test))
    for split in (digits.train, digits.validation, digits.test):
        share = whole * len(split) / 1797
        assert (split.labels.bincount(minlength=10) - share).abs().max() <= 2


def test_seed_chooses_validation_and_never_test(digits: Splits) -> None:
    again, other = load_dataset("digits"), load_dataset("digits", seed=1)
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.validation.images, digits.validation.images)
    assert not torch.equal(other.validation.images, digits.validation.images)
    assert torch.equal(other.test.images, digits.test.images)


@pytest.mark.parametrize("count", [0, 1, 10, 1000])
def test_validation_size(digits: Splits, count: int) -> None:
    splits = load_dataset("digits", validation=count)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1437 - count, count, 360)
    assert splits.validation.images.shape == (count, 1, 8, 8)


@pytest.mark.parametrize("count", [-1, 1437, 0.1, True])
def test_bad_validation_size(digits: Splits, count: object) -> None:
    with pytest.raises(ValueError, match="validation must be an integer from 0 to 1436"):
        load_dataset("digits", validation=count)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [5, 16])
def test_image_size_resizes(digits: Splits, size: int) -> None:
    from PIL import Image

    resized = load_dataset("digits", image_size=size)
    assert resized.image_size == size and resized.train.images.shape == (1257, 1, size, size)
    assert torch.equal(resized.train.labels, digits.train.labels)
    for i in range(0, 1257, 100):
        image = Image.fromarray(digits.train.images[i, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
        difference = resized.train.images[i, 0].int() - torch.from_numpy(np.asarray(image).astype(np.int32))
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_bad_image_size(size: object) -> None:
    with pytest.raises(ValueError, match="image_size must be a positive integer or None"):
        load_dataset("digits", image_size=size)  # type: ignore[arg-type]


def test_normalise_gives_zero_mean_and_unit_deviation(digits: Splits) -> None:
    images = normalise(digits.train.images, digits.mean, digits.std)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_normalise_is_per_channel() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    result = normalise(images, (0.5, 0.5, 0.0), (0.5, 0.25, 0.1)).flatten().tolist()
    assert result == pytest.approx([-1, 2, 2])


@pytest.mark.parametrize(
    ("images", "channels"),
    [
        pytest.param(torch.zeros(2, 3, 4, 4), 3, id="float"),
        pytest.param(torch.zeros(3, 4, 4, dtype=torch.uint8), 3, id="no-batch"),
        pytest.param(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 1, id="channels"),
    ],
)
def test_normalise_bad_input(images: Tensor, channels: int) -> None:
    with pytest.raises(ValueError, match="images must be uint8"):
        normalise(images, (0.0,) * channels, (1.0,) * channels)


def indexed(count: int) -> Split:
    labels = torch.arange(count)
    return Split(labels.to(torch.uint8).view(-1, 1, 1, 1), labels)


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"), [(10, False, [4, 4, 2]), (10, True, [4, 4]), (8, False, [4, 4]), (0, False, [])]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_go_through_all_once(count: int, drop_last: bool, sizes: list[int], shuffle: bool) -> None:
    got = list(batches(indexed(count), 4, torch.Generator().manual_seed(0), shuffle=shuffle, drop_last=drop_last))
    assert [len(labels) for _, labels in got] == sizes
    for images, labels in got:
        assert torch.equal(images.flatten().long(), labels)
    seen = torch.cat([labels for _, labels in got]).tolist() if got else []
    if not shuffle:
        assert seen == list(range(sum(sizes)))
    else:
        assert len(set(seen)) == len(seen) == sum(sizes)
        assert set(seen) <= set(range(count))


def test_shuffle_follows_the_generator() -> None:
    split = indexed(100)

    def order(source: torch.Generator | None) -> list[int]:
        return torch.cat([labels for _, labels in batches(split, 7, source, shuffle=True)]).tolist()

    source = torch.Generator().manual_seed(0)
    first, state = order(source), source.get_state()
    second = order(source)
    assert first != second and first != list(range(100))
    assert order(torch.Generator().manual_seed(0)) == first
    source.set_state(state)
    assert order(source) == second
    torch.manual_seed(5)
    default = order(None)
    torch.manual_seed(5)
    assert order(None) == default


@pytest.mark.parametrize("size", [0, -3, 1.5, True])
def test_bad_batch_size_is_refused_at_the_call(size: object) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        batches(indexed(3), size)  # type: ignore[arg-type]


@pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason=f"no MNIST in {DATA}; set BQNN_DATA")
def test_mnist() -> None:
    pytest.importorskip("torchvision")
    mnist = load_dataset("mnist", DATA)
    assert (len(mnist.train), len(mnist.validation), len(mnist.test)) == (55_000, 5_000, 10_000)
    assert (mnist.num_classes, mnist.in_channels, mnist.image_size) == (10, 1, 28)
    assert mnist.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # 0.1307 and 0.3081, of the 60,000, are the numbers that everybody uses.
    assert mnist.mean == pytest.approx((0.1307,), abs=5e-4) and mnist.std == pytest.approx((0.3081,), abs=5e-4)
    share = (mnist.train.labels.bincount() + mnist.validation.labels.bincount()) / 12
    assert (mnist.validation.labels.bincount() - share).abs().max() <= 1


def test_torchvision_colour_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)

    class Stub:
        data, targets, classes = pixels, [i % 10 for i in range(50)], list("abcdefghij")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert root == tmp_path and download

    monkeypatch.setattr(datasets, "CIFAR10", Stub)
    splits = load_dataset("cifar10", tmp_path, validation=0, download=True)
    assert torch.equal(splits.train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert splits.in_channels == 3 and len(splits.mean) == 3
    assert splits.train.labels.tolist() == Stub.targets


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100"])
def test_missing_data_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError) as error:
        load_dataset(name, tmp_path)
    assert f"load_dataset('{name}', '{tmp_path}', download=True)" in str(error.value)


@pytest.mark.parametrize("name", ["imagenet", "", None, "folder"])
def test_unknown_name(name: object) -> None:
    with pytest.raises(ValueError, match="name must be one of digits, mnist, .* or folder:PATH"):
        load_dataset(name)  # type: ignore[arg-type]


def test_importing_loads_no_reader() -> None:
    code = "import bqnn.data, sys; print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"
