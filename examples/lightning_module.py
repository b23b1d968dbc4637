"""A LightningModule and a Trainer, and the three phases as one callback.

python examples/lightning_module.py      # some seconds; needs the extra: pip install 'bqnn[lightning]'
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn
from bqnn.lightning import ThreePhases

TRAIN = 1400


class Classifier(pl.LightningModule):
    """As it is without quantization; the callback makes its own optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("error", 100 * (self(x).argmax(1) != y).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Print(pl.Callback):
    """A line for each epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        found = {name: f"{value.item():.4g}" for name, value in trainer.callback_metrics.items()}
        print(trainer.current_epoch + 1, *(f"{name} {value}" for name, value in found.items()), sep="  ")


def main(epochs: int = 20) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    pl.seed_everything(0)
    order = torch.randperm(len(x))
    data = TensorDataset(x[order], y[order])
    parts = torch.utils.data.Subset(data, range(TRAIN)), torch.utils.data.Subset(data, range(TRAIN, len(data)))
    loaders = DataLoader(parts[0], 64, shuffle=True), DataLoader(parts[1], 512)

    module = Classifier()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [ThreePhases(num_levels=3), Print()]
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(module, *loaders)

    small = bqnn.pack(module.net.eval())
    images, labels = next(iter(loaders[1]))
    error = 100 * (small(images).argmax(1) != labels).float().mean().item()
    print(f"error of the packed network {error:.2f} %")
    return {"error": error}


if __name__ == "__main__":
    main()
