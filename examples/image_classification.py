"""Images in one call: train a convolutional network with fit, pack it, save it, and ask it how sure it is.

python examples/image_classification.py      # a few seconds; the handwritten digits of scikit-learn, 8x8 pixels
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

TRAIN = 1400


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def load() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Training data, and images and labels that are held out; pixels from 0 to 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:TRAIN], order[TRAIN:]
    return TensorDataset(images[train], labels[train]), (images[held_out], labels[held_out])


def main() -> dict[str, Any]:
    train, (images, labels) = load()
    loader = DataLoader(train, batch_size=64, shuffle=True)
    torch.manual_seed(0)
    result = bqnn.fit(make_net(), loader, validation=[(images, labels)], epochs=12, num_levels=3, seed=0, log=print)
    print(bqnn.report(result.net))

    small = bqnn.pack(result.net)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        bqnn.save(small, path)
        print(f"{path.stat().st_size:,} bytes on disk")
        small = bqnn.load(path, model=make_net())
    prediction = bqnn.predict(small, images)
    error = 100 * (prediction.probs.argmax(1) != labels).float().mean().item()
    unsure = prediction.entropy.argmax().item()
    print(f"error of the packed network {error:.2f} %; least sure of image {unsure}, which is a {labels[unsure]}")
    return {"error": error, "fitted": result.history[-1]["validation_error"]}


if __name__ == "__main__":
    main()
