"""What a page says of runs before it looks at their networks: data, recipes, errors, and the curves of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from bqnn.lab.folder import IMAGES
from bqnn.lab.metrics import error_interval
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run
from bqnn.view.facts import Fact
from bqnn.view.figures import Curve, draw_curves
from bqnn.view.parts import DASH, Table

SCORES = ("run", "wrong", "error", "95 %", "NLL", "ECE", "MI")
IN_WORDS = {"train": "to train on", "validation": "to choose on", "test": "to test on"}


def data_facts(runs: Sequence[Run]) -> list[Fact]:
    """A line for each data set, and each way in which it was split."""
    lines: dict[str, None] = {}
    for run in runs:
        counts = [f"{run.images[name]:,} {IN_WORDS[name]}" for name in IMAGES if name in run.images]
        lines[": ".join([run.recipe.dataset, *([", ".join(counts)] if counts else [])])] = None
    return [("Data", line) for line in lines]


def recipes_table(runs: Sequence[Run], titles: Sequence[str]) -> Table:
    """All fields of all recipes: a row a field, a column a run."""
    names = [field.name for field in fields(Recipe)]
    rows = [[name, *("none" if (v := getattr(run.recipe, name)) is None else str(v) for run in runs)] for name in names]
    return Table(["field", *titles], rows, range(len(runs) + 1))


def scores_table(runs: Sequence[Run], titles: Sequence[str], split: str) -> Table | None:
    """Errors on a split, of no run None: what `bqnn eval` found, or on the validation split the last epoch."""
    rows = []
    for run, title in zip(runs, titles, strict=True):
        scores = _scores(run, split)
        if scores is None:
            continue
        images = scores.get("images", run.images.get(split))
        rows.append(_score_row(title, scores, images))
        if isinstance(drawn := scores.get("sampled"), dict) and "error" in drawn:
            samples = drawn.get("samples", 0)
            rows.append(_score_row(f"{title}: mean of {samples:g} networks drawn", drawn, images))
    return Table(SCORES, rows, [0]) if rows else None


def _scores(run: Run, split: str) -> Mapping[str, Any] | None:
    if split in run.scores:
        return run.scores[split]
    if split == "validation" and run.history and run.history[-1]["validation_error"] is not None:
        last = run.history[-1]
        return {"error": last["validation_error"], "nll": last["validation_nll"]}
    return None


def _score_row(name: str, scores: Mapping[str, Any], images: Any) -> list[str]:
    error, row = scores["error"], [name, DASH, f"{scores['error']:.2f} %", DASH]
    # Scores are of a file that anybody may have written.
    if isinstance(images, int) and images >= 1 and 0.0 <= error <= 100.0:
        low, high = error_interval(error, images)
        row[1], row[3] = f"{error * images / 100:,.0f} of {images:,}", f"{low:.2f} to {high:.2f} %"
    nll, ece, information = (scores.get(score) for score in ("nll", "ece", "mutual_information"))
    row.append(DASH if nll is None else f"{nll:.4f}")
    row.append(DASH if ece is None else f"{100 * ece:.2f} %")
    row.append(DASH if information is None else f"{information:.4f}")
    return row


def draw_history(runs: Sequence[Run]) -> list[str]:
    """Figures of what training recorded, by epoch, of all runs; without those that no run has."""

    def collect(value: Callable[[dict[str, Any]], float | None]) -> list[Curve]:
        curves = []
        for order, run in enumerate(runs):
            points = [(record["epoch"], y) for record in run.history if (y := value(record)) is not None]
            if points:
                curves.append(Curve([x for x, _ in points], [y for _, y in points], order))
        return curves

    def percent(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda record: None if record[name] is None else 100 * record[name]

    loss = collect(percent("quantization_loss"))
    figures = (
        ("validation error, %", collect(lambda record: record["validation_error"]), False),
        ("quantization loss, %", loss, all(min(curve.y) > 0 for curve in loss)),
        ("means near a level, %", collect(percent("near_share")), False),
    )
    marks = _phase_starts(runs)
    return [
        draw_curves(f"c{i}", title, curves, marks, logarithmic)
        for i, (title, curves, logarithmic) in enumerate(figures)
        if curves
    ]


def _phase_starts(runs: Sequence[Run]) -> dict[float, str]:
    """The phases that begin after an epoch of any run, by the place half-way to the next epoch."""
    found: dict[float, dict[str, None]] = {}
    for run in runs:
        for before, after in zip(run.history, run.history[1:], strict=False):
            if before["phase"] != after["phase"]:
                found.setdefault(before["epoch"] + 0.5, {})[after["phase"]] = None
    return {place: ", ".join(names) for place, names in sorted(found.items())}
