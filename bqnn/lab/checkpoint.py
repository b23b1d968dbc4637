"""What the checkpoint of a run holds, and whether it is of the run that reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

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


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a run, on the CPU; raises as :func:`bqnn.core.checkpoint.read_checkpoint` does."""
    return checkpoint.read_checkpoint(path, FIELDS, "bqnn train")


def check_progress(state: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises ValueError unless the epoch of a checkpoint is the last of its history, and one of ``recipe``.

    A run that began with a network from elsewhere (``init``) has no history of the first phase, or of the first two.
    """
    first, second, _ = (phase.epochs for phase in recipe.phases)
    starts = (first, first + second) if state["init"] else (0,)
    found, epoch = [record["epoch"] for record in state["history"]], state["epoch"]
    agree = epoch - len(found) in starts and found == list(range(epoch - len(found) + 1, epoch + 1))
    if not agree or epoch > recipe.total_epochs:
        raise ValueError(
            f"epoch must be that of the history, {starts[0] + len(found)} of {recipe.total_epochs}, got {epoch}"
        )
