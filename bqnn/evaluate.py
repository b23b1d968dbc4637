"""evaluate: how a classifier does on a split of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.data import Split, Splits, batches, normalise

EVAL_BATCH = 1000


@dataclass(frozen=True)
class Score:
    """How a network does on a split."""

    error: float  # percent of the images
    nll: float  # nats an image
    predictions: Tensor  # int64 [N]
    logits: Tensor  # float32 [N, classes]


def device_of(net: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU for one that has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


@torch.no_grad()
def evaluate(net: Callable[[Tensor], Tensor], split: Split, data: Splits, batch_size: int = EVAL_BATCH) -> Score:
    """Error and negative log likelihood of a classifier on a split; a module is put into evaluation mode."""
    device = torch.device("cpu")
    if isinstance(net, nn.Module):
        device = device_of(net.eval())
    outputs = [
        net(normalise(images, data.mean, data.std).to(device)).float().cpu() for images, _ in batches(split, batch_size)
    ]
    logits = torch.cat(outputs)
    predictions = logits.argmax(1)
    error = (predictions != split.labels).double().mean().item() * 100.0
    return Score(error, F.cross_entropy(logits, split.labels).item(), predictions, logits)
