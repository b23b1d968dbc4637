"""VGG-7, the small VGG that papers on low-bit networks report on CIFAR-10."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.models._common import Network, check_images, finish

SMALLEST = 8
WIDTHS = (128, 256, 512)
HIDDEN = 1024


class VGG7(Network):
    """See :func:`vgg7`. ``forward``: [B, in_channels, image_size, image_size] -> logits [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        size = image_size // 8
        self.conv1, self.bn1 = _convolution(in_channels, WIDTHS[0])
        self.conv2, self.bn2 = _convolution(WIDTHS[0], WIDTHS[0])
        self.conv3, self.bn3 = _convolution(WIDTHS[0], WIDTHS[1])
        self.conv4, self.bn4 = _convolution(WIDTHS[1], WIDTHS[1])
        self.conv5, self.bn5 = _convolution(WIDTHS[1], WIDTHS[2])
        self.conv6, self.bn6 = _convolution(WIDTHS[2], WIDTHS[2])
        self.fc1 = nn.Linear(WIDTHS[2] * size * size, HIDDEN, bias=False)
        self.bn7 = nn.BatchNorm1d(HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.max_pool2d(F.relu(self.bn4(self.conv4(x))), 2)
        x = F.relu(self.bn5(self.conv5(x)))
        x = F.max_pool2d(F.relu(self.bn6(self.conv6(x))), 2)
        return self.fc2(F.relu(self.bn7(self.fc1(x.flatten(1)))))


def _convolution(in_channels: int, channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)


def vgg7(in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> VGG7:
    """VGG-7 (Li and Liu 2016): 2x128C3 - MP2 - 2x256C3 - MP2 - 2x512C3 - MP2 - 1024 - num_classes.

    The 3x3 convolutions are padded by 1; every hidden layer is followed by BatchNorm and ReLU. Square images of 8
    pixels or more.

    Raises:
        ValueError: an argument is no positive integer, or ``image_size`` is under 8.
    """
    check_images(in_channels, num_classes, image_size, SMALLEST)
    net = VGG7(in_channels, num_classes, image_size)
    return finish(net, "vgg7", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
