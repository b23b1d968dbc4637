"""Images from outside a distribution: what they are made of, and which other data set they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bqnn.data import out_of_distribution
from bqnn.data.out_of_distribution import other_images, outside_images
from bqnn.data.splits import Split, Splits, load_dataset


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator())


def splits(channels: int, size: int, test: int, validation: int = 3) -> Splits:
    held_out, tested = (Split(noise(n, channels, size, size), torch.zeros(n).long()) for n in (validation, test))
    return Splits(
        "x", tested, held_out, tested, tuple("0123456789"), channels, size, (0.5,) * channels, (0.2,) * channels
    )


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (4, 3, 9, 13), (1, 3, 1, 1), (0, 1, 8, 8)], ids=str)
def test_outside_images(shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    found = outside_images(images, generator())
    again = outside_images(images, generator())
    assert list(found) == ["inverted", "uniform noise", "shuffled pixels"]
    for name, each in found.items():
        assert each.shape == images.shape and each.dtype == torch.uint8
        assert torch.equal(each, again[name])
    assert torch.equal(found["inverted"].int() + images.int(), torch.full_like(images, 255).int())


def test_noise_is_uniform() -> None:
    values = outside_images(noise(50, 1, 64, 64), generator())["uniform noise"].flatten().long()
    counts = values.bincount(minlength=256).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 350, "chi squared, 255 degrees of freedom"


def test_shuffled_pixels_stay_together_and_have_an_order_an_image() -> None:
    places = torch.arange(20 * 20).view(1, 1, 20, 20)
    images = torch.cat([places // 256, places % 256, 0 * places], 1).to(torch.uint8).expand(2, -1, -1, -1)
    shuffled = outside_images(images, generator())["shuffled pixels"].long()
    order = 256 * shuffled[:, 0] + shuffled[:, 1]
    assert torch.equal(order.flatten(1).sort(1).values, places.flatten(1).expand(2, -1))
    assert not torch.equal(order[0], order[1])


@pytest.mark.parametrize("channels, other", [(1, "cifar10"), (3, "mnist")], ids=["grey", "colour"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_other_images_are_those_of_the_other_data_set(
    monkeypatch: pytest.MonkeyPatch, channels: int, other: str, split: str
) -> None:
    theirs, asked = splits(4 - channels, 16, test=7, validation=6), []

    def load(name: str, root: object) -> Splits:
        asked.append(name)
        return theirs

    monkeypatch.setattr(out_of_distribution, "load_dataset", load)
    found = other_images(splits(channels, 16, test=5), split, "data", generator())
    assert found is not None and asked == [other]
    assert found.shape == ({"test": 5, "validation": 3}[split], channels, 16, 16) and found.dtype == torch.uint8
    assert torch.equal(other_images(splits(channels, 16, test=5), split, "data", generator()), found)
    images = getattr(theirs, split).images
    if channels == 3:
        candidates = images.expand(-1, 3, -1, -1).int()
    else:  # the luma of Rec. 601
        candidates = torch.einsum("bchw,c->bhw", images.double(), torch.tensor([0.2989, 0.587, 0.114]).double())
        candidates = candidates.unsqueeze(1).int()
    distances = (found.int()[:, None] - candidates[None]).abs().amax((2, 3, 4))
    assert (distances.amin(1) <= 1).all(), "each is one of theirs"
    assert len(distances.argmin(1).unique()) == len(found), "and another one"


def test_other_images_have_the_size_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_distribution, "load_dataset", lambda *_: splits(1, 28, test=7))
    found = other_images(splits(3, 32, test=5), "test", "data", generator())
    assert found is not None and found.shape == (5, 3, 32, 32)


def test_a_data_set_that_is_not_there_is_none(tmp_path: Path) -> None:
    digits = load_dataset("digits")
    assert other_images(digits, "test", tmp_path, generator()) is None
    assert other_images(replace(digits, in_channels=3), "test", tmp_path, generator()) is None
