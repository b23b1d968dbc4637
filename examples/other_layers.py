"""Layers beside linear ones and images: an embedding, a convolution along a sequence and an LSTM, all at few bits.

python examples/other_layers.py      # some seconds; sequences of symbols, in which a pair is to be counted
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

LENGTH, SYMBOLS, MOST = 16, 4, 3


class Counter(nn.Module):
    """How often symbol 0 is followed by symbol 1."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.pairs = nn.Conv1d(width, width, 2)
        self.memory = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, MOST + 1)

    def forward(self, sequences: Tensor) -> Tensor:
        found = self.pairs(self.symbols(sequences).transpose(1, 2)).relu()
        counted, _ = self.memory(found.transpose(1, 2))
        return self.head(self.norm(counted[:, -1]))


def draw(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences int64 [number, LENGTH] and counts int64 [number], up to MOST."""
    sequences = torch.randint(0, SYMBOLS, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
    return sequences, ((sequences[:, :-1] == 0) & (sequences[:, 1:] == 1)).sum(1).clamp(max=MOST)


def main(sequences: int = 2000, epochs: Any = 12) -> dict[str, Any]:
    loader = DataLoader(TensorDataset(*draw(sequences, seed=1)), batch_size=64, shuffle=True)
    x, y = draw(500, seed=2)
    torch.manual_seed(0)
    result = bqnn.fit(Counter(), loader, validation=[(x, y)], epochs=epochs, num_levels=4, seed=0, log=print)

    report = bqnn.report(result.net)
    print(report)  # each layer, and what is left at full precision and why
    small = bqnn.pack(result.net)  # the LSTM is still torch's, which reads packed weights
    right = (bqnn.predict(small, x).probs.argmax(1) == y).float().mean().item()
    print(f"counts right {100 * right:.1f} %")
    layers, left = ([each.name for each in part] for part in (report.layers, report.left))
    return {"right": right, "layers": layers, "left": left}


if __name__ == "__main__":
    main()
