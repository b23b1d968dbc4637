"""DenseNet for 32x32 images: basic layers, no bottleneck, no compression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.models._common import Network, check_images, check_int, finish

SMALLEST = 4
STEM_WIDTH = 16
BLOCKS = 3
DEEPEST = 1000


class DenseLayer(nn.Module):
    """BatchNorm - ReLU - 3x3 convolution, joined to its input: [B, C, H, W] -> [B, C + growth_rate, H, W]."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(F.relu(self.bn(x)))), 1)


class Transition(nn.Module):
    """BatchNorm - ReLU - 1x1 convolution - 2x2 mean: [B, C, H, W] -> [B, C, H // 2, W // 2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(Network):
    """See :func:`densenet`. ``forward``: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, depth: int, growth_rate: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        layers = (depth - 4) // BLOCKS
        grown = layers * growth_rate
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 3, padding=1, bias=False)
        self.block1 = self._block(STEM_WIDTH, growth_rate, layers)
        self.transition1 = Transition(STEM_WIDTH + grown)
        self.block2 = self._block(STEM_WIDTH + grown, growth_rate, layers)
        self.transition2 = Transition(STEM_WIDTH + 2 * grown)
        self.block3 = self._block(STEM_WIDTH + 2 * grown, growth_rate, layers)
        self.bn = nn.BatchNorm2d(STEM_WIDTH + 3 * grown)
        self.fc = nn.Linear(STEM_WIDTH + 3 * grown, num_classes)

    @staticmethod
    def _block(in_channels: int, growth_rate: int, layers: int) -> nn.Sequential:
        return nn.Sequential(*(DenseLayer(in_channels + i * growth_rate, growth_rate) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition2(self.block2(x))
        x = F.relu(self.bn(self.block3(x)))
        return self.fc(x.mean((2, 3)))


def densenet(
    depth: int = 40, growth_rate: int = 12, in_channels: int = 3, num_classes: int = 10, image_size: int = 32
) -> DenseNet:
    """DenseNet for CIFAR (Huang et al. 2017, section 3), by default DenseNet-40-12.

    A 3x3 convolution to 16 channels, three blocks of (depth - 4) / 3 layers, a 1x1 convolution and a 2x2 mean between
    them, global mean, one full layer. Neither bottleneck nor compression nor dropout. Square images of 4 pixels or
    more; no layer depends on the size.

    Raises:
        ValueError: an argument is no positive integer, ``depth`` is not 4 plus a positive multiple of 3, or
            ``image_size`` is under 4.
    """
    check_int("depth", depth, 4 + BLOCKS, DEEPEST)
    if (depth - 4) % BLOCKS:
        raise ValueError(f"depth must be 4 plus a multiple of {BLOCKS} (7, 10, ... 40, ...), got {depth}")
    check_int("growth_rate", growth_rate, 1)
    check_images(in_channels, num_classes, image_size, SMALLEST)
    net = DenseNet(depth, growth_rate, in_channels, num_classes)
    return finish(
        net,
        "densenet",
        depth=depth,
        growth_rate=growth_rate,
        in_channels=in_channels,
        num_classes=num_classes,
        image_size=image_size,
    )
