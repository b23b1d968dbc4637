"""Image corruptions at five strengths: CIFAR-10-C's parameters, own draws.

Kinds and parameters are those of the script that made CIFAR-10-C (Hendrycks and Dietterich, "Benchmarking neural
network robustness to common corruptions and perturbations", 2019; github.com/hendrycks/robustness,
ImageNet-C/create_c/make_cifar_c.py), where it has them. Lengths in pixels are the same at every size of the image.
Random numbers and code are our own, so that errors on these images and on the published ones are close, not equal.
Rotations, by 10 to 50 degrees to either side, and translations, by 5 to 25 % of a side in any direction, are not among
CIFAR-10-C's; their strengths are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bqnn.core.check import check_int
from bqnn.core.precision import wide
from bqnn.data.augment import warp

SMALLEST_WEIGHT = 1e-4  # of a motion blur, relative to the largest: what is left out together moves no pixel by a 255th
TRUNCATE = 4  # deviations at which a Gaussian blur ends


class Corruption(NamedTuple):
    """What is done to images, and by how much at each strength."""

    # of float images [B, C, H, W], a parameter and a generator; results may leave 0..1
    apply: Callable[[Tensor, Any, torch.Generator], Tensor]
    parameters: tuple[Any, ...]  # of the strengths 1 to 5


def corrupt(images: Tensor, name: str, strength: int, generator: torch.Generator) -> Tensor:
    """A corrupted copy of a batch, of the same shape, dtype and device.

    Args:
        images: [B, C, H, W], grey or colour (C of 1 or 3), uint8, or floating point in 0..1.
        name: one of :data:`CORRUPTIONS`.
        strength: 1 to 5.
        generator: where the random numbers come from, on its own device; the same state gives the same images.

    Returns:
        the images, in 0..1, or rounded to uint8.

    Raises:
        TypeError: ``images`` is no tensor of these dtypes.
        ValueError: ``images`` has another shape or leaves 0..1; ``name`` or ``strength`` is unknown.
    """
    _check_images(images)
    if name not in CORRUPTIONS:
        raise ValueError(f"name must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    check_int("strength", strength, 1, STRENGTHS[-1])
    if images.numel() == 0:
        return images.clone()
    integers = images.dtype == torch.uint8
    x = images.float() / 255 if integers else wide(images)
    apply, parameters = CORRUPTIONS[name]
    x = apply(x, parameters[strength - 1], generator).clamp(0, 1)
    return (255 * x).round().to(torch.uint8) if integers else x.to(images.dtype)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a uint8 or floating-point tensor, got {got}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [B, C, H, W] with 1 or 3 channels, got {list(images.shape)}")
    if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images of floating point must lie in 0..1, got values that are NaN or outside")


def _uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), on the device of ``x`` and of its dtype."""
    return torch.rand(shape, generator=generator, device=generator.device).to(x)


def _gaussian_noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=generator, device=generator.device).to(x)


def _shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Each pixel is a count of photons, ``photons`` of them being white."""
    return torch.poisson((photons * x).to(generator.device), generator).to(x) / photons


def _impulse_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the values becomes 0 or 1, each as often."""
    place = _uniform(tuple(x.shape), x, generator)
    return torch.where(place < share, (place < share / 2).to(x), x)


def _gaussian_blur(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    reach = math.ceil(TRUNCATE * sigma)
    width, height = (2 * min(reach, side - 1) + 1 for side in (x.shape[-1], x.shape[-2]))
    return gaussian_blur(x, [width, height], [sigma, sigma])


def _motion_blur(x: Tensor, shape: tuple[int, float], generator: torch.Generator) -> Tensor:
    """Half a Gaussian to one side along a line at -45 to 45 degrees, 2 radius + 1 pixels long at most, as ImageMagick
    draws it: offsets are rounded to whole pixels, and beyond the border stands the pixel at the border."""
    radius, sigma = shape
    batch, _, height, width = x.shape
    angle = math.radians(45) * (2 * _uniform((batch,), x, generator) - 1)
    weights = torch.exp(-0.5 * (torch.arange(2 * radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights = weights[weights > SMALLEST_WEIGHT]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    by_pixel, image = x.permute(0, 2, 3, 1), torch.arange(batch, device=x.device)[:, None, None]
    blurred = torch.zeros_like(by_pixel)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        down, right = ((step * part(angle)).round().long() for part in (torch.sin, torch.cos))
        from_row = (rows + down[:, None]).clamp(0, height - 1)
        from_column = (columns + right[:, None]).clamp(0, width - 1)
        blurred += weight * by_pixel[image, from_row[:, :, None], from_column[:, None, :]]
    return blurred.permute(0, 3, 1, 2)


def _fog(x: Tensor, shape: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A bright cloud over all channels, dimmed so that the brightest pixel possible is as bright as before."""
    amount, decay = shape
    height, width = x.shape[-2:]
    cloud = _clouds(x, decay, generator)[:, None, :height, :width]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * cloud) * brightest / (brightest + amount).clamp(min=1e-12)


def _clouds(x: Tensor, decay: float, generator: torch.Generator) -> Tensor:
    """A fractal height field in 0..1 for each image: [B, S, S], S the power of two that the image fits into.

    Midpoints of squares and of their edges in turns (the diamond-square algorithm) on a torus, each the mean of its
    four neighbours and noise whose size falls by ``decay`` squared from one scale to the next.
    """
    batch, size = len(x), 2 ** math.ceil(math.log2(max(x.shape[-2:])))
    heights, step, noise = x.new_zeros(batch, size, size), size, 1.0
    while step > 1:
        half, cells = step // 2, size // step
        drawn = noise * (2 * _uniform((3, batch, cells, cells), x, generator) - 1)
        corners = heights[:, ::step, ::step].clone()
        below = corners + corners.roll(-1, 1)
        centres = (below + below.roll(-1, 2)) / 4 + drawn[0]
        heights[:, half::step, half::step] = centres
        heights[:, half::step, ::step] = (below + centres + centres.roll(1, 2)) / 4 + drawn[1]
        beside = corners + corners.roll(-1, 2) + centres + centres.roll(1, 1)
        heights[:, ::step, half::step] = beside / 4 + drawn[2]
        step, noise = half, noise / decay**2
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _brightness(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """The value of HSV, the largest channel, is raised; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + amount).clamp(0, 1)
    return torch.where(value > 0, x * (raised / value.clamp(min=1e-12)), raised)


def _contrast(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the distance to each channel's mean stays."""
    mean = x.mean((2, 3), keepdim=True)
    return share * (x - mean) + mean


def _pixelate(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    height, width = (_boxes(side, share).to(x) for side in x.shape[-2:])
    return height @ x @ width.T


def _boxes(side: int, share: float) -> Tensor:
    """The matrix, float64 [side, side], that shrinks a row of pixels to ``share`` of them and stretches it again.

    As Pillow's filter BOX does both: of a shrunk pixel, the mean of the pixels whose centres it covers, each covered
    once; of a stretched one, the shrunk pixel that covers its centre.
    """
    cells, pixels = max(1, int(share * side)), torch.arange(side, dtype=torch.float64)
    owner = ((pixels + 0.5) * cells / side).ceil() - 1  # a centre on an edge belongs to the cell before it
    shown = ((pixels + 0.5) * cells / side).floor()
    covered = (shown[:, None] == owner).double()
    return covered / covered.sum(1, keepdim=True)


def _jpeg(x: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    from PIL import Image

    def decoded(pixels: np.ndarray) -> np.ndarray:
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file)).reshape(shape)

    pixels = (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    shape = pixels.shape[1:]
    images = np.stack([decoded(each.squeeze(-1) if shape[-1] == 1 else each) for each in pixels])
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(x) / 255


def _rotation(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    height, width = x.shape[-2:]
    left = _uniform((len(x),), x, generator) < 0.5
    angle = math.radians(degrees) * (1 - 2 * left.to(x.dtype))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    row_x = torch.stack((cos, -sin * (height / width), zero), -1)
    row_y = torch.stack((sin * (width / height), cos, zero), -1)
    return warp(x, torch.stack((row_x, row_y), 1))


def _translation(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * _uniform((len(x),), x, generator)
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    row_x = torch.stack((one, zero, 2 * share * angle.cos()), -1)
    row_y = torch.stack((zero, one, 2 * share * angle.sin()), -1)
    return warp(x, torch.stack((row_x, row_y), 1))


CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "motion_blur": Corruption(_motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "fog": Corruption(_fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40)),
    "rotation": Corruption(_rotation, (10, 20, 30, 40, 50)),
    "translation": Corruption(_translation, (0.05, 0.1, 0.15, 0.2, 0.25)),
}
"""By name. The parameters: standard deviation; photons of white; share of the values; deviation in pixels; radius and
deviation in pixels; amount and decay; what is added to the value; share of the contrast; share of the pixels a side;
quality; degrees; share of the side."""
STRENGTHS = tuple(range(1, 6))
