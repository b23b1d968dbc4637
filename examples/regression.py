"""A regression of few bits that says how far off it may be: by the noise of the data, and by its weights.

    python examples/regression.py      # some seconds; a curve in one dimension

The noise variance is estimated in training and on held-out data; the prior "mixture" lets the data decide how
uncertain the weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

NOISE = 0.1  # deviation


def curve(x: Tensor) -> Tensor:
    return torch.sin(3 * x)


def draw(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [samples, 1] from -1.5 to 1.5, and y [samples, 1] with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.rand(samples, 1, generator=generator) - 1.5
    return x, curve(x) + NOISE * torch.randn(x.shape, generator=generator)


def main() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    loader = DataLoader(TensorDataset(*draw(800, seed=1)), batch_size=64, shuffle=True)
    held_out = draw(400, seed=2)
    # The first layer, of one input, stays as it is: 64 weights.
    options: dict[str, Any] = {"num_levels": 8, "prior": "mixture", "estimator": "sample", "skip": ["0"]}
    result = bqnn.fit(net, loader, validation=[held_out], task="regression", epochs=60, seed=0, log=print, **options)

    x = torch.linspace(-1.5, 1.5, 7).unsqueeze(1)
    asked = {"task": "regression", "noise_variance": result.noise_variance, "seed": 0}
    found = bqnn.predict(result.net, x, 32, **asked)
    print("     x    true    mean  deviation: of the weights, in all")
    for row in zip(x, curve(x), *found):
        print("{:6.2f}  {:6.3f}  {:6.3f}  {:25.3f}  {:6.3f}".format(*(each.item() for each in row)))

    inputs, targets = held_out
    found = bqnn.predict(result.net, inputs, 32, **asked)
    within = ((targets - found.mean).abs() < 2 * found.deviation).float().mean().item()
    print(f"noise {result.noise_variance.sqrt().item():.3f}; {100 * within:.0f} % within two deviations")
    return {"noise": result.noise_variance.sqrt().item(), "within": within}


if __name__ == "__main__":
    main()
