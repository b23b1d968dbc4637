"""What a call of fit asks for: shares of epochs, and every argument that can not be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bqnn
from bqnn.training.plan import share_epochs

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 20, 100])
@pytest.mark.parametrize("converted", [False, True])
def test_shares_of_epochs(total: int, converted: bool) -> None:
    shares = share_epochs(total, converted)
    assert sum(shares) == total and min(shares) >= 0 and shares[2] >= 1
    assert not (converted and shares[0])
    if total % 20 == 0 and not converted:
        assert shares == (6 * total // 20, 10 * total // 20, 4 * total // 20)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"net": 3}, "net must be an nn.Module, got 3"),
        ({"net": nn.ReLU()}, "net has no layer to convert"),
        ({"train": 3}, "train must be an iterable of batches .inputs, target., got 3"),
        ({"train": X}, "train must be an iterable of batches .* got Tensor"),
        ({"train": TensorDataset(X, Y)}, "train must be an iterable of batches .* got TensorDataset"),
        ({"train": iter(BATCHES)}, "train must begin anew every epoch, .* got an iterator"),
        ({"train": []}, "train must have a batch and a sample at least, got 0 and 0"),
        ({"train": [X]}, "train must yield pairs .inputs, target., got Tensor"),
        ({"train": [(X, Y, Y)]}, "train must yield pairs .inputs, target., got tuple of 3"),
        ({"train": [(X, 3)]}, r"train must yield targets that are tensors \[batch, ...\], got int"),
        ({"train": [(X, torch.tensor(3))]}, "train must yield targets .* got a scalar tensor"),
        ({"validation": 3}, "validation must be an iterable"),
        ({"validation": iter(BATCHES)}, "validation must begin anew every epoch"),
        ({"validation": []}, "validation must yield at least one sample"),
        ({"task": "ranking"}, "task must be one of classification, regression, got 'ranking'"),
        ({"epochs": 0}, "epochs must be from 1 to .* got 0"),
        ({"epochs": 2.5}, "epochs must be an int, got float"),
        ({"epochs": (1, 2)}, r"epochs must be one number, or one for each of three phases, got \(1, 2\)"),
        ({"epochs": (1, -1, 2)}, "epochs must be at least 0"),
        ({"epochs": (0, 0, 0)}, "epochs must be at least 0, and 1 together"),
        ({"epochs": (1, 1.5, 2)}, "each of epochs must be an int, got float"),
        (
            {"net": bqnn.convert(make_net()), "epochs": (1, 1, 1)},
            "epochs must begin with 0 for a net with Bayes layers",
        ),
        ({"net": bqnn.convert(make_net()), "num_levels": 4}, "num_levels can't be given for a net that has Bayes"),
        ({"net": bqnn.convert(make_net()), "prior": "mixture"}, "prior can't be given for a net that has Bayes"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"deterministic_lr": math.nan}, "deterministic_lr must be positive and finite, got nan"),
        ({"bayes_lr": "high"}, "bayes_lr must be a number, got str"),
        ({"codebook_lr": -1.0}, "codebook_lr must be at least 0"),
        ({"variance_lr": math.inf}, "variance_lr must be at least 0 and finite, got inf"),
        ({"weight_decay": -1e-3}, "weight_decay must be at least 0"),
        ({"kl_warmup": -1.0}, "kl_warmup must be at least 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"autocast": torch.float16}, "autocast must be None or torch.bfloat16, .* got torch.float16"),
        ({"num_levels": 17}, "num_levels must be from 2 to 16, got 17"),
        ({"prior": "laplace"}, "prior must be one of"),
        ({"skip": ["fc"]}, "skip names modules that the network does not have: fc"),
        ({"dataset_size": 0}, "dataset_size must be from 1 to"),
        ({"dataset_size": 4.5}, "dataset_size must be an int, got float"),
        ({"seed": -1}, "seed must be from 0"),
        ({"checkpoint": 3}, "checkpoint must be a path, got 3"),
        ({"checkpoint": "none/such/file"}, "checkpoint must be a file in a folder that is there, got none/such/file"),
        ({"log": 3}, "log must be a function that takes a line, as print does, got 3"),
        ({"task": "regression"}, "target must have the shape of the network's output"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_can_not_be_is_refused(changes: dict[str, Any], error: str) -> None:
    arguments = {"net": make_net(), "train": BATCHES, **changes}
    with pytest.raises((TypeError, ValueError), match=error):
        bqnn.fit(**arguments)
