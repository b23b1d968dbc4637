"""LeNet-5 with BatchNorm, and the LeNet of Caffe's MNIST example."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.models._common import Network, check_images, finish

SMALLEST_LENET5 = 8
SMALLEST_CAFFE = 16


class LeNet5(Network):
    """See :func:`lenet5`. ``forward``: [B, in_channels, image_size, image_size] -> logits [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        padding1 = 2 if image_size < 32 else 0
        size = (image_size + 2 * padding1 - 4) // 2
        padding2 = 2 if size < 10 else 0
        size = size + 2 * padding2 - 4
        self.second_pool = size >= 6
        size = size // 2 if self.second_pool else size

        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=padding1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 16, 5, padding=padding2, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(16 * size * size, 120, bias=False)
        self.bn3 = nn.BatchNorm1d(120)
        self.fc2 = nn.Linear(120, 84, bias=False)
        self.bn4 = nn.BatchNorm1d(84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        if self.second_pool:
            x = F.max_pool2d(x, 2)
        x = F.relu(self.bn3(self.fc1(x.flatten(1))))
        x = F.relu(self.bn4(self.fc2(x)))
        return self.fc3(x)


class LeNet5Caffe(Network):
    """See :func:`lenet5_caffe`. ``forward``: [B, in_channels, image_size, image_size] -> logits [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        size = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * size * size, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet5(in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> LeNet5:
    """LeNet-5 (LeCun et al. 1998, fig. 2): conv 6 - pool - conv 16 - pool - 120 - 84 - num_classes.

    Both convolutions are 5x5, the pools 2x2 maxima; every hidden layer is followed by BatchNorm and ReLU. Square images
    of 8 pixels or more. What the layers do at their borders depends on the size of the map they read:

    - the first convolution is padded by 2 where the image is under 32 pixels, so that 28 pixels act as the original 32;
    - the second is padded by 2 where its input is under 10 pixels;
    - the second pool is left out where its input is under 6 pixels.

    So 28 and 32 pixels give the original 400 inputs of the first full layer, and 8 pixels give 256.

    Raises:
        ValueError: an argument is no positive integer, or ``image_size`` is under 8.
    """
    check_images(in_channels, num_classes, image_size, SMALLEST_LENET5)
    net = LeNet5(in_channels, num_classes, image_size)
    return finish(net, "lenet5", in_channels=in_channels, num_classes=num_classes, image_size=image_size)


def lenet5_caffe(in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> LeNet5Caffe:
    """The LeNet of Caffe's MNIST example: conv 20 - pool - conv 50 - pool - 500 - num_classes.

    Both convolutions are 5x5 without padding, the pools 2x2 maxima; the only nonlinearity besides the pools is the ReLU
    after the first full layer; no BatchNorm. Square images of 16 pixels or more.

    Raises:
        ValueError: an argument is no positive integer, or ``image_size`` is under 16.
    """
    check_images(in_channels, num_classes, image_size, SMALLEST_CAFFE)
    net = LeNet5Caffe(in_channels, num_classes, image_size)
    return finish(net, "lenet5_caffe", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
