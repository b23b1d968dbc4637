"""Augmentation: what each kind does to an image, and that the generator decides all of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.data import augment as module
from bqnn.data.splits import augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(batch: int, size: int = 29, long: float = 3.0, short: float = 3.0) -> Tensor:
    """A Gaussian in the middle of the image: [batch, 1, size, size], deviations in pixels."""
    place = torch.arange(size) - (size - 1) / 2
    image = torch.exp(-(place[:, None] ** 2) / (2 * short**2) - place[None, :] ** 2 / (2 * long**2))
    return image.expand(batch, 1, size, size).clone()


def moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass [B]; centre [B, 2] (x, y), in pixels from the middle; covariance [B, 2, 2] in square pixels."""
    size = images.shape[-1]
    place = torch.arange(size) - (size - 1) / 2
    grid = torch.stack((place.expand(size, size), place[:, None].expand(size, size)), -1).reshape(-1, 2)
    weights = images[:, 0].flatten(1)
    mass = weights.sum(1)
    centre = weights @ grid / mass[:, None]
    offset = grid - centre[:, None]
    return mass, centre, torch.einsum("bp,bpi,bpj->bij", weights, offset, offset) / mass[:, None, None]


def only(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """Switches off every part of the affine map but one."""
    for name in {"ROTATION", "SCALE", "SHEAR", "SHIFT"} - {kept}:
        monkeypatch.setattr(module, name, 0.0)


@pytest.mark.parametrize("kind", module.KINDS[1:])
@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (2, 3, 8, 8), (3, 2, 9, 13)], ids=str)
def test_same_generator_same_images(kind: str, shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=generator())
    source = generator(1)
    first = augment(images, source, kind)
    state = source.get_state()
    second = augment(images, source, kind)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert not torch.equal(first, second)
    assert torch.equal(augment(images, generator(1), kind), first)
    assert torch.equal(augment(images, resumed, kind), second)


@pytest.mark.parametrize("kind", module.KINDS[1:])
def test_default_generator_is_the_global_one(kind: str) -> None:
    images = torch.randn(4, 1, 8, 8, generator=generator())
    torch.manual_seed(7)
    first = augment(images, None, kind)
    torch.manual_seed(7)
    assert torch.equal(augment(images, None, kind), first)


@pytest.mark.parametrize("kind", module.KINDS)
def test_input_is_left_alone_and_empty_batch_works(kind: str) -> None:
    images = torch.rand(6, 1, 12, 12, generator=generator())
    before = images.clone()
    augment(images, generator(), kind)
    assert torch.equal(images, before)
    assert augment(images[:0], generator(), kind).shape == (0, 1, 12, 12)


def test_none_returns_the_images() -> None:
    images = torch.rand(2, 1, 8, 8)
    assert augment(images, generator(), "none") is images


def test_affine_of_nothing_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "nothing")
    images = torch.randn(3, 2, 9, 13, generator=generator())
    torch.testing.assert_close(augment(images, generator(), "affine"), images, rtol=0, atol=1e-5)


def test_affine_stays_in_range_and_pads_with_the_background() -> None:
    images = torch.full((64, 2, 16, 16), -0.4)
    images[:, 1] = 0.7
    images[:, :, 5:11, 5:11] = 2.0
    result = augment(images, generator(), "affine")
    assert result[:, 0].min() >= -0.4 - 1e-5 and result.max() <= 2.0 + 1e-5
    assert result[:, 1].min() >= 0.7 - 1e-5
    torch.testing.assert_close(result[:, 0, 0], torch.full((64, 16), -0.4))


def test_affine_shift_is_up_to_1_2_pixels_of_28(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "SHIFT")
    _, centre, _ = moments(augment(blob(400, size=28), generator(), "affine"))
    limits = centre.amin(0).tolist() + centre.amax(0).tolist()
    assert limits == pytest.approx([-1.2, -1.2, 1.2, 1.2], abs=0.06)
    assert centre.mean(0).abs().max() < 0.2


def test_affine_rotation_is_up_to_six_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "ROTATION")
    mass, centre, covariance = moments(augment(blob(400, long=4, short=1.5), generator(), "affine"))
    turn = 0.5 * torch.atan2(2 * covariance[:, 0, 1], covariance[:, 0, 0] - covariance[:, 1, 1])
    assert math.degrees(turn.min()) == pytest.approx(-6, abs=0.3)
    assert math.degrees(turn.max()) == pytest.approx(6, abs=0.3)
    assert centre.abs().max() < 0.05
    torch.testing.assert_close(mass, blob(400, long=4, short=1.5).sum((1, 2, 3)), rtol=0.02, atol=0)


def test_affine_scale_is_up_to_six_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "SCALE")
    mass, _, _ = moments(augment(blob(400), generator(), "affine"))
    scale = (mass / blob(1).sum()).sqrt()
    assert [scale.min().item(), scale.max().item()] == pytest.approx([0.94, 1.06], abs=0.01)


def test_affine_shear_keeps_the_area(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "SHEAR")
    mass, _, covariance = moments(augment(blob(400), generator(), "affine"))
    torch.testing.assert_close(mass, blob(400).sum((1, 2, 3)), rtol=0.01, atol=0)
    shear = covariance[:, 0, 1] / covariance[:, 1, 1]
    assert [shear.min().item(), shear.max().item()] == pytest.approx([-0.06, 0.06], abs=0.006)


def test_affine_turns_rigidly_where_the_image_is_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "ROTATION")
    wide = F.pad(blob(50), (10, 10))
    turned = augment(wide, generator(), "affine")[..., 10:-10]
    torch.testing.assert_close(turned, augment(blob(50), generator(), "affine"), rtol=0, atol=1e-3)


def crops(padded: Tensor, size: int) -> set[tuple[float, ...]]:
    """Every crop of an image [C, size + 8, size + 8], and its mirror image, as numbers."""
    parts = [padded[:, i : i + size, j : j + size] for i in range(9) for j in range(9)]
    return {tuple(crop.flatten().tolist()) for part in parts for crop in (part, part.flip(-1))}


@pytest.mark.parametrize(("kind", "mode"), [("crop_flip", "constant"), ("flip-crop", "reflect")])
def test_crop_gives_every_crop_and_its_mirror(kind: str, mode: str) -> None:
    size, batch = 6, 3000
    image = torch.arange(1.0, 2 * size * size + 1).view(1, 2, size, size)
    expected = crops(F.pad(image, (4, 4, 4, 4), mode)[0], size)
    result = augment(image.expand(batch, -1, -1, -1), generator(), kind)
    counts: dict[tuple[float, ...], int] = {}
    for row in result.flatten(1).tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) == expected
    assert max(counts.values()) < 3 * batch / len(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_images_smaller_than_the_shift_are_reflected_again(size: int) -> None:
    image = torch.arange(1.0, size * size + 1).view(1, 1, size, size)
    bounce = [*range(size), *range(size - 2, 0, -1)]
    to_and_fro = [bounce[place % len(bounce)] for place in range(-4, size + 4)]
    expected = crops(image[0][:, to_and_fro][:, :, to_and_fro], size)
    result = augment(image.expand(2000, -1, -1, -1), generator(), "flip-crop")
    assert {tuple(row) for row in result.flatten(1).tolist()} == expected


def test_cutout_is_flip_crop_with_a_square_of_zeros() -> None:
    images = torch.rand(4000, 2, 16, 20, generator=generator()) + 1
    whole, cut = (augment(images, generator(3), kind) for kind in ("flip-crop", "flip-crop-cutout"))
    gone = cut == 0
    assert torch.equal(cut, whole.masked_fill(gone, 0.0))
    assert torch.equal(gone[:, 0], gone[:, 1]), "the same square in every channel"
    rows, columns = gone[:, 0].any(2), gone[:, 0].any(1)
    assert torch.equal(gone[:, 0], rows[:, :, None] & columns[:, None, :])
    # 12 pixels in 32 of each side, and at least half of them where the middle is at an edge.
    assert (rows.sum(1).min(), rows.sum(1).max()) == (3, 6) and (columns.sum(1).min(), columns.sum(1).max()) == (4, 8)
    for places in (rows, columns):
        steps = places.int().diff(dim=1).abs().sum(1)
        assert steps.max() <= 2, "in one piece"
        assert places.float().mean(0).min() > 0.15, "anywhere"


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        pytest.param(
            torch.zeros(2, 1, 8, 8), "flip", "kind must be one of none, affine, crop_flip, flip-crop", id="kind"
        ),
        pytest.param(torch.zeros(2, 8, 8), "affine", "images must be float .* \\[2, 8, 8\\]", id="shape"),
        pytest.param(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "affine", "got torch.uint8", id="dtype"),
    ],
)
def test_bad_input(images: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(images, generator(), kind)
