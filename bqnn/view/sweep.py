"""What a sweep has found: a table, and a picture of its trials."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

from bqnn.core.extras import needs
from bqnn.core.files import write_atomically, write_content
from bqnn.lab.sweep import Sweeper

TABLE, PICTURE = "sweep.json", "sweep.svg"
SIZE = (5.0, 3.2)  # inches


def write_sweep(sweeper: Sweeper) -> str:
    """Writes sweep.json, a row a trial, and sweep.svg into the sweep's folder; returns the table as text.

    The best trials are marked; of two objectives those are the Pareto front. The picture shows it, or of one objective
    the best value after each trial. It is drawn once two trials have values.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file can not be written.
    """
    trials = sweeper.trials()
    write_content(sweeper.folder / TABLE, json.dumps([trial._asdict() for trial in trials], indent=1))
    if sum(trial.values is not None for trial in trials) > 1:
        _draw(sweeper)
    names, objectives = list(sweeper.sweep.search), sweeper.sweep.minimize
    lines = [["trial", *names, *objectives, ""]]
    for trial in trials:
        values = ["failed"] * len(objectives) if trial.values is None else map(_shown, trial.values.values())
        chosen = [_shown(trial.parameters[name]) for name in names]
        lines.append([str(trial.number), *chosen, *values, "best" if trial.best else ""])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value).removesuffix(".0")


def _draw(sweeper: Sweeper) -> None:
    with needs("report"):
        from matplotlib.figure import Figure

    axes = (figure := Figure(SIZE)).subplots()
    trials = sweeper.trials()
    if len(sweeper.sweep.minimize) == 1:
        points = sorted((trial.number, *trial.values.values()) for trial in trials if trial.values)
        least = list(accumulate((y for _, y in points), min))
        axes.step([x for x, _ in points], least, where="post", label="best so far")
        axes.set(xlabel="trial", ylabel=sweeper.sweep.minimize[0])
    else:
        points = [tuple(trial.values.values()) for trial in trials if trial.values]
        front = sorted(tuple(trial.values.values()) for trial in trials if trial.values and trial.best)
        axes.step(*zip(*front), where="post", marker="o", label="Pareto front")
        axes.set(xlabel=sweeper.sweep.minimize[0], ylabel=sweeper.sweep.minimize[1])
    axes.plot(*zip(*points), ".", color="grey", zorder=0, label="trials")
    axes.legend(frameon=False)
    write_atomically(
        sweeper.folder / PICTURE, lambda temporary: figure.savefig(temporary, format="svg", bbox_inches="tight")
    )
