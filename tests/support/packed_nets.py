"""Networks that the tests of packed files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bqnn
from bqnn.engine.pack import pack


class Odd(nn.Module):
    """Layers of every geometry, one of them skipped by convert, and buffers of many dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False)
        self.same = nn.Conv2d(6, 5, (2, 3), padding="same", padding_mode="reflect")
        self.block = nn.Sequential(nn.Flatten(), nn.Linear(60, 7), nn.BatchNorm1d(7))
        self.head = nn.Linear(7, 1)
        self.plain = nn.Linear(1, 3)
        dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int16, torch.complex64)
        for dtype in dtypes:
            self.register_buffer(str(dtype).replace(".", "_"), torch.arange(3).to(dtype))
        self.register_buffer("none_yet", None)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(-0.0))
        self.register_buffer("transposed", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("unsaved", torch.tensor([5.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.head(self.block(self.same(self.conv(x)))))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.norm = nn.BatchNorm1d(6)
        self.norm_again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_again(self.again(self.norm(self.first(x))))


class Apart(Shared):
    """The same names, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(6, 6)
        self.norm_again = nn.BatchNorm1d(6)


def packed_odd(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return pack(bqnn.convert(Odd(), skip=["plain"], **options))
