"""The part of a page on uncertainty: what `bqnn eval --uncertainty` has left with the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from bqnn.data.corruptions import STRENGTHS
from bqnn.lab.runs import Run
from bqnn.lab.uncertainty_file import read_uncertainty
from bqnn.view.figures import Curve, draw_curves, draw_histograms
from bqnn.view.parts import DASH, LegendLine, Table, legend

SCORES = ("run", "images", "T", "error", "NLL", "Brier", "ECE", "NLL at T", "ECE at T", "AURC", "entropy", "MI")
OUTSIDE = ("run", "images", "AUROC, entropy", "FPR95, entropy", "AUROC, MI", "FPR95, MI")


class _Found(NamedTuple):
    """What was measured of a run, with its place in the order of the page."""

    order: int
    title: str
    result: dict[str, Any]

    @property
    def network(self) -> str:
        """The title of the run and what of it was measured."""
        count = self.result["samples"]
        return f"{self.title}: mean of {count} networks" if count > 1 else self.title


class EntropyPart(NamedTuple):
    """The histograms of one network's entropies."""

    network: str
    legend: list[LegendLine]
    figure: str


class UncertaintyPart(NamedTuple):
    """What ``uncertainty.html`` takes."""

    scores: Table
    outside: Table
    legend: list[LegendLine]
    curves: list[str]
    corruptions: list[str]
    entropies: list[EntropyPart]


def uncertainty_part(runs: Sequence[Run], titles: Sequence[str]) -> UncertaintyPart | None:
    """Tables and figures of the runs that have been measured; None where none has.

    Raises:
        OSError, ValueError: a file of a run can not be read, or is not what `bqnn eval --uncertainty` writes.
    """
    results = [read_uncertainty(run.folder) for run in runs]
    found = [_Found(i, titles[i], result) for i, result in enumerate(results) if result is not None]
    if not found:
        return None
    return UncertaintyPart(
        Table(SCORES, [row for each in found for row in _score_rows(each)], [0, 1]),
        Table(OUTSIDE, [row for each in found for row in _outside_rows(each)], [0, 1]),
        legend((each.order, each.network) for each in found),
        _main_figures(found),
        _corruption_figures(found),
        [_entropies(each) for each in found],
    )


def _score_rows(found: _Found) -> list[list[str]]:
    result = found.result
    rows = {f"clean, {result['split']}": result["clean"], "corrupted": result["mean"]}
    return [[found.network, name, f"{result['temperature']:.2f}", *_score_cells(row)] for name, row in rows.items()]


def _score_cells(row: Mapping[str, float]) -> list[str]:
    likelihood = [f"{row['nll']:.4f}", f"{row['brier']:.4f}", f"{100 * row['ece']:.2f} %"]
    scaled = [f"{row['scaled_nll']:.4f}", f"{100 * row['scaled_ece']:.2f} %"]
    rest = [f"{row['aurc']:.3f} %", f"{row['entropy']:.4f}", f"{row['mutual_information']:.4f}"]
    return [f"{row['error']:.2f} %", *likelihood, *scaled, *rest]


def _outside_rows(found: _Found) -> list[list[str]]:
    rows = []
    for name, by in found.result["ood"].items():
        row = [found.network, name]
        for uncertainty in ("entropy", "mutual_information"):
            each = by.get(uncertainty)
            row += [f"{each['auroc']:.3f}", f"{100 * each['fpr95']:.1f} %"] if each else [DASH, DASH]
        rows.append(row)
    return rows


def _main_figures(found: Sequence[_Found]) -> list[str]:
    def percent(part: str, x: str, y: str, factor: float) -> list[Curve]:
        columns = [(each.order, each.result[part]) for each in found]
        return [Curve([100 * v for v in c[x]], [factor * v for v in c[y]], order) for order, c in columns]

    reliability = percent("reliability", "confidence", "accuracy", 100)
    coverage = percent("coverage", "coverage", "error", 1)
    return [
        draw_curves("u0", "accuracy, %", reliability, x_label="confidence, %", diagonal=True),
        draw_curves("u1", "error, %, of the most confident", coverage, x_label="coverage, %"),
        draw_curves("u2", "error of corrupted images, %", _curves(found, "error"), x_label="strength"),
        draw_curves("u3", "NLL of corrupted images, nats", _curves(found, "nll"), x_label="strength"),
    ]


def _corruption_figures(found: Sequence[_Found]) -> list[str]:
    names = dict.fromkeys(name for each in found for name in each.result["corruptions"])
    drawn = []
    for i, name in enumerate(names):
        those = [each for each in found if name in each.result["corruptions"]]
        drawn.append(draw_curves(f"x{i}", name.replace("_", " "), _curves(those, "error", name), x_label="strength"))
    return drawn


def _curves(found: Sequence[_Found], score: str, name: str | None = None) -> list[Curve]:
    """A score by the strength of a corruption, or of all in the mean, clean images having the strength 0."""
    curves = []
    for each in found:
        corruptions = each.result["corruptions"]
        lists = corruptions.values() if name is None else [corruptions[name]]
        means = [fmean(row[score] for row in rows) for rows in zip(*lists, strict=True)]
        curves.append(Curve([0, *STRENGTHS], [each.result["clean"][score], *means], each.order))
    return curves


def _entropies(found: _Found) -> EntropyPart:
    edges, shares = found.result["entropy"]["edges"], found.result["entropy"]["shares"]
    histograms = [Curve(edges, [100 * share for share in each], i) for i, each in enumerate(shares.values())]
    drawn = draw_histograms(f"e{found.order}", "images by entropy", histograms, "nats", "% of the set")
    return EntropyPart(found.network, legend(enumerate(shares)), drawn)
