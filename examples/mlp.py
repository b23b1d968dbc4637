"""A perceptron of one's own: which layers to quantize, and how finely; what became of each; and the packed network.

python examples/mlp.py      # a few seconds; the handwritten digits of scikit-learn
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

TRAIN = 1400


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden + self.second(hidden).relu())


def main(epochs: int = 20) -> dict[str, float]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    loader = DataLoader(TensorDataset(x[:TRAIN], y[:TRAIN]), batch_size=64, shuffle=True)

    torch.manual_seed(0)
    # Two levels where most weights are, a codebook for each class in the last layer.
    overrides = {"second": {"num_levels": 2}, "last": {"num_levels": 4, "granularity": "channel"}}
    held_out = [(x[TRAIN:], y[TRAIN:])]
    result = bqnn.fit(Perceptron(), loader, validation=held_out, epochs=epochs, overrides=overrides, seed=0, log=print)
    print(bqnn.report(result.net))

    small = bqnn.pack(result.net)
    error = 100 * (small(x[TRAIN:]).argmax(1) != y[TRAIN:]).float().mean().item()
    print(small)
    print(f"error of the packed network {error:.2f} %")
    return {"error": error, "fitted": result.history[-1]["validation_error"]}


if __name__ == "__main__":
    main()
