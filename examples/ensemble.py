"""An ensemble of networks of few bits: one file, one compiled call, and how much the networks disagree.

python examples/ensemble.py      # some seconds; the handwritten digits of scikit-learn
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

TRAIN = 1000


def make_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main(networks: int = 4, epochs: int = 12) -> dict[str, float]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:TRAIN], y[:TRAIN]), batch_size=64, shuffle=True)
    x, y = x[TRAIN:], y[TRAIN:]

    members = [bqnn.pack(bqnn.fit(make_net(seed), loader, epochs=epochs, seed=seed).net) for seed in range(networks)]
    ensemble = bqnn.Ensemble(members)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ensemble.safetensors"
        bqnn.save(ensemble, path)
        print(f"{path.stat().st_size:,} bytes on disk for {networks} networks")
    fast = bqnn.compile(ensemble, x)

    errors = [100 * (logits.argmax(1) != y).float().mean().item() for logits in fast(x)]
    prediction = bqnn.predict(fast, x)
    error = 100 * (prediction.probs.argmax(1) != y).float().mean().item()
    noise = bqnn.predict(fast, torch.rand(500, 64)).mutual_information.mean().item()
    known = prediction.mutual_information.mean().item()
    print(f"error of each {', '.join(f'{each:.2f}' for each in errors)} %; together {error:.2f} %")
    print(f"disagreement {known:.3f} nats on digits, {noise:.3f} on noise")
    return {"error": error, "mean_error": sum(errors) / networks, "known": known, "noise": noise}


if __name__ == "__main__":
    main()
