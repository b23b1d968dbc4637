"""What the checkpoint of a run holds, and whether it is of the run that reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bqnn.core import checkpoint
from bqnn.lab.recipe import Recipe

# ``threads`` is how many there were: sums over threads depend on it.
FIELDS: dict[str, type] = {
    "recipe": dict,
    "init": bool,
    "epoch": int,
    "history": list,
    "net": dict,
    "optimizer": dict,
    "scheduler": dict,
    "generator": Tensor,
    "torch_generator": Tensor,
    "threads": int,
}


def read_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of a run; raises as :func:`bqnn.core.checkpoint.read_checkpoint` does."""
    return checkpoint.read_checkpoint(path, FIELDS, "bqnn train", device)


def check_progress(state: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises ValueError unless the epoch of a checkpoint is the last of its history, and one of ``recipe``.

    A run that began with a network from elsewhere (``init``) has no history of the first phase.
    """
    start, epoch = recipe.pretrain_epochs if state["init"] else 0, state["epoch"]
    found = [record["epoch"] for record in state["history"]]
    agree = len(found) == epoch - start and found == list(range(start + 1, epoch + 1))
    if not agree or epoch > recipe.total_epochs:
        raise ValueError(
            f"epoch must be that of the history, {start + len(found)} of {recipe.total_epochs}, got {epoch}"
        )
