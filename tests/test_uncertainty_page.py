"""The part of the page on uncertainty: its tables, its figures, and what is not there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run
from bqnn.lab.uncertainty_file import add_uncertainty
from bqnn.view import uncertainty
from bqnn.view.figures import COLOURS, Curve, draw_histograms
from bqnn.view.html import write_html
from bqnn.view.uncertainty import uncertainty_part
from tests.support.measured import measured
from tests.support.page import Page


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Runs that are not trained: one that was not measured, one with four networks, one with a single one."""
    folder = tmp_path_factory.mktemp("runs")
    found = [Run(folder / str(seed), Recipe(seed=seed), [], {}) for seed in range(3)]
    add_uncertainty(found[1], measured(4))
    add_uncertainty(found[2], {**measured(1, ("fog", "rotation")), "split": "validation"})
    return found


@pytest.fixture(scope="module")
def source(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(runs, path)
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed(source: str) -> None:
    page = Page(source)
    assert page.unbalanced == [] and page.tags["script"] == 0
    identifiers = Counter(value for name, value in page.attributes if name == "id")
    assert set(identifiers.values()) == {1}, "an id names one element of the page"
    used = set(re.findall(r"url\(#([^)]*)\)", source))
    assert used and used <= set(identifiers)


def test_figures(source: str) -> None:
    labels = [v for name, v in Page(source).attributes if name == "aria-label"]
    assert labels == [
        "accuracy, %",
        "error, %, of the most confident",
        "error of corrupted images, %",
        "NLL of corrupted images, nats",
        "fog",
        "jpeg",
        "rotation",
        "images by entropy",
        "images by entropy",
    ]


def test_tables(source: str, runs: list[Run]) -> None:
    rows = Page(source).rows
    start = next(i for i, row in enumerate(rows) if row[1:3] == ["images", "T"])
    four, one = f"{runs[1].title}: mean of 4 networks", runs[2].title
    clean = ["0.50 %", "0.5100", "0.5200", "53.00 %", "0.5400", "55.00 %", "0.560 %", "0.5700", "0.5800"]
    mean = ["3.50 %", "3.5100", "3.5200", "353.00 %", "3.5400", "355.00 %", "3.560 %", "3.5700", "3.5800"]
    assert rows[start + 1 : start + 5] == [
        [four, "clean, test", "1.25", *clean],
        [four, "corrupted", "1.25", *mean],
        [one, "clean, validation", "1.25", *clean],
        [one, "corrupted", "1.25", *mean],
    ]
    assert rows[start + 6 : start + 10] == [
        [four, "inverted", "0.750", "50.0 %", "0.750", "50.0 %"],
        [four, "uniform noise", "0.875", "25.0 %", "0.875", "25.0 %"],
        [one, "inverted", "0.750", "50.0 %", "–", "–"],
        [one, "uniform noise", "0.875", "25.0 %", "–", "–"],
    ]


def test_curves_are_of_what_was_measured(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[Curve]] = {}

    def draw(key: str, title: str, curves: list[Curve], *_: object, **options: object) -> str:
        drawn[title] = curves
        return ""

    monkeypatch.setattr(uncertainty, "draw_curves", draw)
    monkeypatch.setattr(uncertainty, "draw_histograms", draw)
    uncertainty_part(runs, ["a", "b", "c"])
    assert [curve.order for curve in drawn["accuracy, %"]] == [1, 2], "the colours of the page"
    assert drawn["accuracy, %"][0][:2] == ([50, 90], [25, 100])
    assert drawn["error, %, of the most confident"][0][:2] == ([50, 100], [0, 3])
    assert drawn["fog"][0][:2] == ([0, 1, 2, 3, 4, 5], [0.5, 1, 2, 3, 4, 5])
    assert [curve.order for curve in drawn["jpeg"]] == [1] and [curve.order for curve in drawn["rotation"]] == [2]
    assert drawn["error of corrupted images, %"][0][:2] == ([0, 1, 2, 3, 4, 5], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    assert drawn["images by entropy"] == [
        Curve([0, 1, 2], [75, 25], 0),
        Curve([0, 1, 2], [50, 50], 1),
        Curve([0, 1, 2], [0, 100], 2),
    ]


def test_runs_that_were_not_measured_have_no_part(runs: list[Run], tmp_path: Path) -> None:
    assert uncertainty_part(runs[:1], ["a"]) is None
    write_html(runs[:1], tmp_path / "page.html")
    assert "Uncertainty" not in (tmp_path / "page.html").read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&$\\frac$'
    result = measured(1, (evil,))
    result["ood"] = {evil: result["ood"]["inverted"]}
    result["entropy"]["shares"] = {"clean": [1.0, 0.0], evil: [0.0, 1.0]}
    run = Run(tmp_path, Recipe(), [], {})
    add_uncertainty(run, result)
    write_html([run], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags["script"] == 0 and page.unbalanced == []
    assert any(evil in row for row in page.rows)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "uncertainty-test.json").write_text("{}")
    with pytest.raises(ValueError, match="uncertainty-test.json is not what bqnn eval --uncertainty writes"):
        write_html([Run(tmp_path, Recipe(), [], {})], tmp_path / "page.html")


def test_histograms_over_each_other() -> None:
    svg = draw_histograms("k", "t", [Curve([0, 1, 2], [3, 1], 0), Curve([0, 1, 2], [1, 3], 1)], "x", "y")
    assert all(svg.count(f"stroke: {colour}") == 1 for colour in COLOURS[:2])
