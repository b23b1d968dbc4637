"""ResNet-20 for 32x32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.models._common import Network, check_images, finish

SMALLEST = 4
WIDTHS = (16, 32, 64)
BLOCKS = 3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that has no parameters.

    ``forward``: [B, in_channels, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(x + y)


class ResNet20(Network):
    """See :func:`resnet20`. ``forward``: [B, in_channels, H, W] -> logits [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = WIDTHS[0]
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(*(BasicBlock(width, width, 1) for _ in range(BLOCKS)))
        self.stage2 = self._narrowing_stage(WIDTHS[0], WIDTHS[1])
        self.stage3 = self._narrowing_stage(WIDTHS[1], WIDTHS[2])
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    @staticmethod
    def _narrowing_stage(in_channels: int, channels: int) -> nn.Sequential:
        rest = (BasicBlock(channels, channels, 1) for _ in range(BLOCKS - 1))
        return nn.Sequential(BasicBlock(in_channels, channels, 2), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


def resnet20(in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> ResNet20:
    """ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2): 3 stages of 3 blocks, 16, 32 and 64 channels wide.

    Shortcuts are the paper's option A: where the width grows, every second pixel, and zeros for the new channels.
    Square images of 4 pixels or more; no layer depends on the size.

    Raises:
        ValueError: an argument is no positive integer, or ``image_size`` is under 4.
    """
    check_images(in_channels, num_classes, image_size, SMALLEST)
    net = ResNet20(in_channels, num_classes)
    return finish(net, "resnet20", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
