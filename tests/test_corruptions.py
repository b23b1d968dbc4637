"""Corruptions: what each does to an image, by how much at each strength, and that the generator decides all of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bqnn.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt

SHAPES = [(3, 1, 28, 28), (2, 3, 32, 32), (1, 1, 8, 8), (2, 3, 9, 13), (1, 3, 1, 1)]
# The parameter of each corruption that changes nothing, and by how much it may miss that.
NEUTRAL: dict[str, tuple[Any, float]] = {
    "gaussian_noise": (0.0, 0.0),
    "shot_noise": (1e10, 1e-4),
    "impulse_noise": (0.0, 0.0),
    "gaussian_blur": (1e-3, 0.0),
    "motion_blur": ((6, 1e-3), 0.0),
    "fog": ((0.0, 2.0), 1e-6),
    "brightness": (0.0, 1e-6),
    "contrast": (1.0, 1e-6),
    "pixelate": (1.0, 0.0),
    "jpeg": (100, 4 / 255),
    "rotation": (0, 1e-5),
    "translation": (0.0, 1e-5),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(*shape: int) -> Tensor:
    """Random images without edges, as photographs have few, over the whole of 0..1: uint8."""
    coarse = torch.rand(*shape[:2], 5, 5, generator=generator())
    images = F.interpolate(coarse, shape[2:], mode="bicubic", align_corners=False).clamp(0, 1)
    return (255 * images).round().to(torch.uint8)


def apply(name: str, images: Tensor, parameter: Any, seed: int = 0) -> Tensor:
    return CORRUPTIONS[name].apply(images, parameter, generator(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_and_range_stay_and_the_seed_repeats(name: str, shape: tuple[int, ...]) -> None:
    images = smooth(*shape)
    before = images.clone()
    for strength in STRENGTHS:
        changed = corrupt(images, name, strength, generator(1))
        assert changed.shape == images.shape and changed.dtype == torch.uint8
        assert torch.equal(corrupt(images, name, strength, generator(1)), changed)
        assert torch.equal(images, before)
        for dtype in (torch.float16, torch.float32, torch.float64):
            x = images.to(dtype) / 255
            changed = corrupt(x, name, strength, generator(1))
            assert changed.shape == x.shape and changed.dtype == dtype
            assert changed.min() >= 0 and changed.max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_generator_goes_on(name: str) -> None:
    source, images = generator(), smooth(20, 3, 16, 16)
    first, second = (corrupt(images, name, 3, source) for _ in range(2))
    drawn = name not in ("gaussian_blur", "brightness", "contrast", "pixelate", "jpeg")
    assert torch.equal(first, second) != drawn


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_a_neutral_parameter_changes_nothing(name: str, channels: int) -> None:
    parameter, tolerance = NEUTRAL[name]
    x = smooth(4, channels, 28, 28).double() / 255
    if name == "jpeg":
        x = x.mean(1, keepdim=True).expand_as(x)  # colour is kept at half the resolution at every quality
    assert (apply(name, x, parameter) - x).abs().max() <= tolerance


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_distortion_grows_with_strength(name: str, channels: int) -> None:
    """Not from each strength to the next: published blurs and boxes of 28 pixels go down by a little in between."""
    images = smooth(50, channels, 32, 32)
    squares = [
        float((corrupt(images, name, each, generator()).double() - images.double()).square().mean())
        for each in STRENGTHS
    ]
    if name == "pixelate":
        assert 0 < squares[0] < squares[3] < squares[4]
    else:
        assert squares[0] > 0 and squares == sorted(squares) and squares[4] > 1.5 * squares[0]


def test_noises_have_the_deviation_that_they_are_named_for() -> None:
    grey = torch.full((20, 1, 32, 32), 0.5, dtype=torch.float64)
    count = grey.numel()
    noise = apply("gaussian_noise", grey, 0.08) - 0.5
    assert float(noise.std()) == pytest.approx(0.08, rel=3 / math.sqrt(2 * count))
    photons = apply("shot_noise", grey, 50)
    assert float(photons.var()) == pytest.approx(0.5 / 50, rel=4 * math.sqrt(2 / count))
    assert torch.allclose((50 * photons).round(), 50 * photons, atol=1e-9, rtol=0), "whole photons"
    impulses = apply("impulse_noise", grey, 0.07)
    for value in (0.0, 1.0):
        assert float((impulses == value).double().mean()) == pytest.approx(0.035, abs=4 * math.sqrt(0.035 / count))


def test_gaussian_blur_of_a_point_is_a_gaussian() -> None:
    point = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    point[..., 15, 15] = 1
    place = torch.arange(31, dtype=torch.float64) - 15
    row = torch.exp(-0.5 * place**2)
    row[place.abs() > 4] = 0
    row /= row.sum()
    assert torch.allclose(apply("gaussian_blur", point, 1.0)[0, 0], row[:, None] * row, atol=1e-7)


def test_motion_blur_goes_to_one_side_along_a_line() -> None:
    point = torch.zeros(200, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    blurred = apply("motion_blur", point, (9, 2.5))
    assert torch.allclose(blurred.sum((1, 2, 3)), torch.ones(200, dtype=torch.float64))
    place = torch.arange(41, dtype=torch.float64) - 20
    right = (blurred.sum((1, 2)) * place).sum(1)
    down = (blurred.sum((1, 3)) * place).sum(1)
    weights = torch.exp(-0.5 * (torch.arange(19) / 2.5) ** 2)
    mean = float((weights * torch.arange(19)).sum() / weights.sum())
    assert torch.allclose((right**2 + down**2).sqrt(), torch.full_like(down, mean), atol=0.3)
    angle = torch.atan2(down, right.abs())
    assert (right < 0).all(), "what a pixel shows lies to its right"
    assert angle.abs().max() < math.radians(50)
    assert angle.min() < math.radians(-35) and angle.max() > math.radians(35), "every direction is drawn"


def test_contrast_brightness_and_fog_by_hand() -> None:
    x = torch.tensor([[[[0.0, 0.4], [0.2, 0.6]]]], dtype=torch.float64)
    assert torch.allclose(apply("contrast", x, 0.5), torch.tensor([[0.15, 0.35], [0.25, 0.45]]).double())
    assert torch.allclose(apply("brightness", x, 0.1), x + 0.1)
    assert torch.allclose(apply("brightness", x, 0.7), (x + 0.7).clamp(max=1))
    colour = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).view(1, 3, 1, 1)
    assert torch.allclose(apply("brightness", colour, 0.2), 1.5 * colour), "hue and saturation stay"
    black = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    assert torch.equal(apply("brightness", black, 0.2), torch.full_like(black, 0.2))
    white = torch.ones(3, 3, 32, 32, dtype=torch.float64)
    fog = apply("fog", white, (0.5, 3.0))
    cloud = (1.5 * fog - 1) / 0.5
    assert torch.allclose(cloud.amin((1, 2, 3)), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(cloud.amax((1, 2, 3)), torch.ones(3).double(), atol=1e-12)
    assert torch.allclose(cloud[:, 0], cloud[:, 2]) and not torch.allclose(cloud[0], cloud[1])


def test_fog_is_the_smoother_the_faster_its_noise_falls() -> None:
    white = torch.ones(50, 1, 32, 32, dtype=torch.float64)

    def roughness(decay: float) -> Tensor:
        cloud = apply("fog", white, (1.0, decay))
        return (cloud - cloud.roll(1, -1)).square().mean() / cloud.var()

    assert roughness(1.25) > 1.2 * roughness(1.75) > 1.44 * roughness(3.0)


@pytest.mark.parametrize("side", [8, 9, 28, 32])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_pixelate_is_pillow_s(side: int, strength: int) -> None:
    image = torch.randint(0, 256, (side, side), dtype=torch.uint8, generator=generator())
    cells = int(CORRUPTIONS["pixelate"].parameters[strength - 1] * side)
    box = Image.Resampling.BOX
    expected = np.array(Image.fromarray(image.numpy()).resize((cells, cells), box).resize((side, side), box))
    changed = corrupt(image[None, None], "pixelate", strength, generator())
    assert (changed[0, 0].int() - torch.from_numpy(expected).int()).abs().max() <= 1, "Pillow rounds twice"


def test_rotation_is_to_both_sides_by_the_angle() -> None:
    place = torch.arange(29) - 14.0
    bar = torch.exp(-(place[:, None] ** 2) / 8 - place**2 / 50).double().expand(40, 1, 29, 29)
    turned = apply("rotation", bar, 30)[:, 0]
    weights = turned / turned.sum((1, 2), keepdim=True)
    xx, yy = ((weights * each).sum((1, 2)) for each in (place**2, place[:, None] ** 2))
    angle = 0.5 * torch.atan2(2 * (weights * place * place[:, None]).sum((1, 2)), xx - yy)
    assert torch.allclose(angle.abs(), torch.full_like(angle, math.radians(30)), atol=0.02)
    assert 5 < int((angle > 0).sum()) < 35


def test_translation_is_by_a_share_of_the_side_in_any_direction() -> None:
    place = torch.arange(29) - 14.0
    blob = torch.exp(-(place[:, None] ** 2) / 8 - place**2 / 8).double().expand(100, 1, 29, 29)
    moved = apply("translation", blob, 0.2)[:, 0]
    weights = moved / moved.sum((1, 2), keepdim=True)
    x, y = (weights * place).sum((1, 2)), (weights * place[:, None]).sum((1, 2))
    assert torch.allclose((x**2 + y**2).sqrt(), torch.full_like(x, 0.2 * 29), atol=0.05)
    assert all(20 < int(((x > 0) == right).sum()) < 80 and 20 < int(((y > 0) == right).sum()) < 80 for right in (0, 1))


def test_what_comes_in_from_outside_is_background() -> None:
    images = torch.full((4, 1, 20, 20), 200, dtype=torch.uint8)
    images[..., 8:12, 8:12] = 0
    for name in ("rotation", "translation"):
        assert (corrupt(images, name, 5, generator())[..., 0, :] == 200).all()


def test_strided_images_are_as_contiguous_ones() -> None:
    images = smooth(3, 3, 12, 12)
    strided = images.to(memory_format=torch.channels_last)
    for name in CORRUPTIONS:
        assert torch.equal(corrupt(images, name, 4, generator()), corrupt(strided, name, 4, generator()))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_image_is_none(name: str) -> None:
    assert corrupt(torch.zeros(0, 3, 8, 8), name, 1, generator()).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "name", "strength", "error", "message"),
    [
        pytest.param(torch.zeros(1, 1, 8, 8).int(), "fog", 1, TypeError, "images must be", id="dtype"),
        pytest.param(np.zeros((1, 1, 8, 8)), "fog", 1, TypeError, "images must be .* got ndarray", id="no-tensor"),
        pytest.param(torch.zeros(1, 8, 8), "fog", 1, ValueError, "images must be", id="dimensions"),
        pytest.param(torch.zeros(1, 4, 8, 8), "fog", 1, ValueError, "1 or 3 channels", id="channels"),
        pytest.param(torch.full((1, 1, 8, 8), 1.5), "fog", 1, ValueError, "0..1", id="range"),
        pytest.param(torch.full((1, 1, 8, 8), math.nan), "fog", 1, ValueError, "0..1", id="nan"),
        pytest.param(torch.zeros(1, 1, 8, 8), "smoke", 1, ValueError, "name must be one of gaussian_noise", id="name"),
        pytest.param(torch.zeros(1, 1, 8, 8), "fog", 0, ValueError, "strength must be from 1 to 5", id="strength"),
        pytest.param(torch.zeros(1, 1, 8, 8), "fog", 6, ValueError, "strength must be from 1 to 5", id="too-strong"),
        pytest.param(torch.zeros(1, 1, 8, 8), "fog", 1.0, TypeError, "strength must be an int", id="no-integer"),
    ],
)
def test_bad_input_is_named(images: Any, name: str, strength: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        corrupt(images, name, strength, generator())
