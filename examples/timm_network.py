"""A network of timm, pretrained=False, in three phases: any of its convolutional ones will do, pretrained ones too.

python examples/timm_network.py [NAME]      # half a minute; needs the extra: pip install 'bqnn[examples]'
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import bqnn

SIZE = 32


def make_net(name: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise SystemExit("this example needs timm: pip install 'bqnn[examples]'") from error
    return timm.create_model(name, pretrained=False, num_classes=10, in_chans=1)


def main(name: str = "test_resnet", images: int = 600, epochs: int = 8) -> dict[str, float]:
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    x, y = F.interpolate(pixels, size=SIZE, mode="bilinear"), torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:images], y[:images]), batch_size=64, shuffle=True)
    held_out = x[-300:], y[-300:]

    torch.manual_seed(0)
    net = make_net(name)
    result = bqnn.fit(net, loader, validation=[held_out], epochs=epochs, num_levels=4, seed=0, log=print)
    print(bqnn.report(result.net))
    fast = bqnn.compile(bqnn.pack(result.net), held_out[0])
    print(fast)
    error = 100 * (fast(held_out[0]).argmax(1) != held_out[1]).float().mean().item()
    print(f"error of the compiled network {error:.2f} %")
    return {"error": error, "fitted": result.history[-1]["validation_error"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
