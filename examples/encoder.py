"""A transformer encoder of torch on sequences: its linear layers at few bits, its attention at full precision.

python examples/encoder.py      # some seconds; sequences of symbols, of which the first is to be counted
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

LENGTH, SYMBOLS, MOST = 12, 6, 5


class Encoder(nn.Module):
    """How often the first symbol of a sequence comes again in it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, MOST + 1)

    def forward(self, sequences: Tensor) -> Tensor:
        hidden = self.layers(self.symbols(sequences) + self.places)
        return self.head(hidden[:, 0])


def draw(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences int64 [number, LENGTH] and counts int64 [number], up to MOST."""
    sequences = torch.randint(0, SYMBOLS, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
    return sequences, (sequences[:, 1:] == sequences[:, :1]).sum(1).clamp(max=MOST)


def main(sequences: int = 4000, epochs: Any = 12) -> dict[str, float]:
    loader = DataLoader(TensorDataset(*draw(sequences, seed=1)), batch_size=64, shuffle=True)
    x, y = draw(500, seed=2)
    torch.manual_seed(0)
    net = Encoder()
    # nn.MultiheadAttention is named here so that nothing else becomes of it than is said above.
    skip = [nn.MultiheadAttention, "head"]
    rates: dict[str, Any] = {"lr": 2e-3, "deterministic_lr": 2e-3, "bayes_lr": 2e-3, "max_grad_norm": 1.0}
    options = {"validation": [(x, y)], "num_levels": 4, "skip": skip, "seed": 0, "log": print}
    result = bqnn.fit(net, loader, epochs=epochs, **rates, **options)

    small = bqnn.pack(result.net)
    prediction = bqnn.predict(small, x)
    is_right = prediction.probs.argmax(1) == y
    right = is_right.float().mean().item()
    sure, unsure = (prediction.entropy[where].mean().item() for where in (is_right, ~is_right))
    print(f"counts right {100 * right:.1f} %; entropy {sure:.2f} nats where right, {unsure:.2f} where not")
    return {"right": right}


if __name__ == "__main__":
    main()
