"""ResNet-18 of torchvision, from random weights, on small images: trained, packed, saved and compiled.

python examples/resnet18.py      # half a minute; the handwritten digits of scikit-learn

A trained network starts just so, and its first phase needs no epochs: fit(net, loader, epochs=(0, 10, 4)).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet, resnet18

import bqnn


def make_net() -> ResNet:
    """With a stem for small images: neither a stride nor pooling before the first block."""
    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net


def load() -> tuple[Tensor, Tensor]:
    """Images [number, 3, 8, 8], pixels from -1 to 1, and labels, in random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 8 - 1
    return images.expand(-1, 3, -1, -1), torch.tensor(digits.target)[order]


def main(images: int = 512, epochs: Any = (1, 2, 1)) -> dict[str, float]:
    x, y = load()
    held_out = x[-100:], y[-100:]
    loader = DataLoader(TensorDataset(x[:images], y[:images]), batch_size=32, shuffle=True)
    torch.manual_seed(0)
    result = bqnn.fit(make_net(), loader, validation=[held_out], epochs=epochs, num_levels=3, seed=0, log=print)

    small = bqnn.pack(result.net)
    fast = bqnn.compile(small, held_out[0][:1])
    logits, expected = fast(held_out[0]), small(held_out[0])
    agreement = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.safetensors"
        bqnn.save(fast, path)
        size, full = path.stat().st_size, sum(each.nbytes for each in make_net().state_dict().values())
    print(f"{size:,} bytes on disk for {full:,}; compiled and packed agree on {100 * agreement:.0f} % of the images")
    return {"agreement": agreement, "smaller": full / size}


if __name__ == "__main__":
    main()
