"""The network of airbench, which learns CIFAR-10 in ten epochs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.models._common import Network, check_images, record

SMALLEST = 9  # pixels: three poolings leave one
WIDTHS = (64, 256, 256)
PATCH = 2  # pixels a side, of what is whitened
LEAST_VARIANCE = 5e-4  # added to that of each direction, so that noise is not blown up
WHITENED_BATCHES = 10
STATISTICS_MOMENTUM = 0.4  # of BatchNorm: a run has few steps
LOGIT_SCALE = 1 / 9


class Group(nn.Module):
    """Convolution - 2x2 maximum - BatchNorm - GELU - convolution - BatchNorm - GELU, the convolutions 3x3.

    ``forward``: [B, in_channels, H, W] -> [B, channels, H // 2, W // 2].
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _identity_convolution(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels, momentum=STATISTICS_MOMENTUM)
        self.conv2 = _identity_convolution(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels, momentum=STATISTICS_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x)))


class Airbench(Network):
    """See :func:`airbench`. ``forward``: [B, in_channels, image_size, image_size] -> logits [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        whitened = 2 * in_channels * PATCH**2
        self.whiten = nn.Conv2d(in_channels, whitened, PATCH)
        self.whiten.bias = nn.Parameter(torch.zeros(whitened))
        self.whiten.weight.requires_grad_(False)
        self.group1 = Group(whitened, WIDTHS[0])
        self.group2 = Group(WIDTHS[0], WIDTHS[1])
        self.group3 = Group(WIDTHS[1], WIDTHS[2])
        self.fc = nn.Linear(WIDTHS[2], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group3(self.group2(self.group1(F.gelu(self.whiten(x)))))
        return self.fc(x.amax((2, 3))) * LOGIT_SCALE

    @torch.no_grad()
    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Makes the first layer whiten the patches of the images, of at most ten batches.

        Its filters are the principal directions of 2x2 patches, each over the deviation along it, and their negatives.
        """
        second_moment, count = torch.zeros((), dtype=torch.float64), 0
        for images in islice(batches, WHITENED_BATCHES):
            patches = F.unfold(images, PATCH).transpose(1, 2).flatten(0, 1).double()
            second_moment, count = second_moment + patches.T @ patches, count + len(patches)
        if not count:
            raise ValueError("batches must hold at least one image, got none")
        variances, directions = torch.linalg.eigh(second_moment / count)
        filters = (directions / (variances + LEAST_VARIANCE).sqrt()).T
        self.whiten.weight.copy_(torch.cat((filters, -filters)).view_as(self.whiten.weight))


def _identity_convolution(in_channels: int, channels: int) -> nn.Conv2d:
    """A convolution whose first channels start as copies of its input, the others as PyTorch starts them."""
    layer = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[: min(in_channels, channels)])
    return layer


def airbench(in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> Airbench:
    """The network of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498).

    A 2x2 convolution to 24 channels (8 for each of the image's), which whitens patches; three groups of two 3x3
    convolutions with 64, 256 and 256 channels, each with a 2x2 maximum; the maximum over what is left; a full layer
    without bias, over 9. BatchNorm has a scale here and its usual epsilon; published ones have neither. Square images
    of 9 pixels or more; no layer depends on the size.

    The weight of the first layer is frozen, as published: it is what :meth:`Airbench.initialise` makes of images, and
    random before. Its filters differ in size by two orders of magnitude, so it needs ``granularity="channel"``: three
    levels for all of them make half of CIFAR-10's filters constant; three for each are off by a quarter at most.

    Raises:
        ValueError: an argument is no positive integer, or ``image_size`` is under 9.
    """
    check_images(in_channels, num_classes, image_size, SMALLEST)
    net = Airbench(in_channels, num_classes)
    return record(net, "airbench", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
