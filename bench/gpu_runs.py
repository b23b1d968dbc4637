"""Training runs on a GPU, by the command and its recipes, with a checkpoint an epoch that a later call goes on from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.gpu_checks import finished
from bench.gpu_rows import Row, Unfinished
from bqnn.lab.folder import CHECKPOINT
from bqnn.lab.runs import Run, load_run

RECIPES: Mapping[str, Sequence[str]] = {"vgg7-cifar10": (), "densenet40-cifar10": ()}
"""By name, with the options of `bqnn train` that override fields of it."""
LEAST_SECONDS = 45.0
"""A run is not begun with less time left: it would not come to its first checkpoint."""


def run_rows(
    recipe: str, options: Sequence[str], runs: Path, data: Path, seconds: float, environment: Mapping[str, str]
) -> Iterator[Row]:
    """A run in a folder of its name in ``runs``, or the rest of it: its error, and what an epoch took.

    Raises:
        Unfinished: it did not come to its end within ``seconds``; it says how far it came.
    """
    folder = runs / recipe
    if seconds < LEAST_SECONDS:
        raise Unfinished(f"{seconds:.0f} s are too few to begin with")
    command = [sys.executable, "-m", "bqnn", "train", "--recipe", recipe, "--out", str(folder)]
    command += ["--data-root", str(data), *options]
    if (folder / CHECKPOINT).exists():
        command.append("--resume")
    status, output = finished(command, seconds, environment)
    if status == 0:
        yield Row("train", recipe, said=_summary(load_run(folder)))
    elif (folder / CHECKPOINT).exists() and "bqnn: error" not in output:
        raise Unfinished(_summary(load_run(folder)))
    else:
        yield Row("train", recipe, said=f"exit {status}: {output.strip()[-500:]}", failed=True)


def _summary(run: Run) -> str:
    """Epochs, seconds, and the error and nearness that the last epoch has left on the validation images."""
    last = run.history[-1]
    seconds = sum(record["seconds"] for record in run.history)
    figures = {name: last[name] for name in ("validation_error", "near_share") if last[name] is not None}
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
    return f"{len(run.history)} epochs, {seconds:.0f} s, {told}"
