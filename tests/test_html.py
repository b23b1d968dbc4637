"""The page of write_html: self-contained, escaped, well-formed, and with what is in the runs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.bayes.convolutions import BayesConv2d
from bqnn.bayes.layers import BayesLinear
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run, add_scores, load_run
from bqnn.lab.train import Trainer
from bqnn.view import figures, html
from bqnn.view.figures import LEVEL, THRESHOLD, Curve, draw_curves, draw_means, place_in_codebook
from bqnn.view.html import write_html
from tests.support.page import Page

BAYES = Recipe(pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=1260)
FPNN = replace(BAYES, method="fpnn")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Full precision, spike-and-slab, Gaussian prior with a codebook a channel, and one that is not finished."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = [FPNN, BAYES, replace(BAYES, prior="gaussian", granularity="channel", num_levels=4)]
    for number, recipe in enumerate(recipes):
        Trainer(recipe, folder / str(number)).run(progress=False, log=lambda line: None)
    unfinished = Trainer(replace(BAYES, seed=1), folder / "3")
    with pytest.raises(KeyboardInterrupt):
        unfinished.run(progress=False, log=stop)
    add_scores(load_run(folder / "1"), "test", {"error": 12.25})
    return [load_run(folder / str(number)) for number in range(4)]


def stop(line: str) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def source(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(runs, path, measure=False)
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed(source: str) -> None:
    page = Page(source)
    assert page.unbalanced == []
    assert source.startswith("<!DOCTYPE html>")
    identifiers = Counter(value for name, value in page.attributes if name == "id")
    assert identifiers and set(identifiers.values()) == {1}, "an id names one element of the page"
    used = {value[1:] for name, value in page.attributes if name == "xlink:href" and value}
    used |= set(re.findall(r"url\(#([^)]*)\)", source))
    assert used <= set(identifiers), "what is referred to is there"


def test_page_needs_nothing_else(source: str) -> None:
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    references = [v for name, v in page.attributes if name in ("src", "href", "xlink:href", "data") and v]
    assert all(reference.startswith("#") for reference in references)
    assert not re.search(r"@import|url\((?!#)", source)
    namespaces = {value for name, value in page.attributes if name.startswith("xmlns")}
    assert set(re.findall(r"https?://[^\"' <]*", source)) == namespaces
    assert len(source) < 400_000


def test_one_figure_a_layer_and_three_of_all_runs(source: str) -> None:
    labels = [v for name, v in Page(source).attributes if name == "aria-label"]
    curves = ["validation accuracy, %", "quantization loss, %", "means near a level, %"]
    layers = ["conv1, 150", "conv2, 2,400", "fc1, 30,720", "fc2, 10,080", "fc3, 840"]
    assert labels == curves + [f"{layer} weights" for layer in layers * 2]


def test_table_of_the_runs(source: str, runs: list[Run]) -> None:
    head, *rows = Page(source).rows[:5]
    assert head[:4] == ["run", "accuracy", "split", "bits a weight"]
    assert [row[0] for row in rows] == [run.title for run in runs]
    validation = [100 - run.history[-1]["validation_error"] for run in runs]
    assert rows[0][1:] == [f"{validation[0]:.2f} %", "validation", "32.00", rows[0][4], "1.0 ×", "–", "–"]
    assert rows[1][1:4] == ["87.75 %", "test", "1.62"]
    assert rows[2][1:4] == [f"{validation[2]:.2f} %", "validation", "2.00"]
    assert rows[3][1:] == [f"{validation[3]:.2f} %", "validation", *"–––––"], "what is not finished has no size"
    sizes = [int(row[4].replace(",", "")) for row in rows[:3]]
    assert [row[5] for row in rows[:3]] == [f"{sizes[0] / size:.1f} ×" for size in sizes]
    assert sizes[0] > 10 * sizes[1]


def test_table_of_the_layers(source: str) -> None:
    rows = Page(source).rows[5:]
    assert [row[0] for row in rows] == ["layer", "conv1", "conv2", "fc1", "fc2", "fc3"] * 2
    assert rows[1][1:4] == ["6×1×5×5", "3", "1.60"]
    assert rows[1][9].count("%)") == 3
    assert rows[7][9] == "6 codebooks"
    assert re.fullmatch(r"0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)", rows[1][8])


def test_times_are_measured_against_the_full_precision_network(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "measure_side_by_side", lambda nets, x: [0.002, 0.003, 0.001, 0.0005][: len(nets)])
    write_html(runs[:2], tmp_path / "page.html")
    rows = Page((tmp_path / "page.html").read_text()).rows
    assert rows[1][-2:] == ["3.00 ms", "1"]
    assert rows[2][-2:] == ["3.00 ms", "1.50"]
    assert rows[3] == ["the same, compiled for fp32", *"–––––", "1.00 ms", "0.50"]
    assert rows[4] == ["the same, compiled for int8", *"–––––", "0.50 ms", "0.25"]


def test_measured_times_are_positive(runs: list[Run], tmp_path: Path) -> None:
    write_html(runs[1:2], tmp_path / "page.html")
    for row in Page((tmp_path / "page.html").read_text()).rows[1:4]:
        assert float(row[-2].removesuffix(" ms")) > 0 and float(row[-1]) > 0


EVIL = '<script>alert("x")</script>&amp;$\\frac$'


def test_text_is_escaped(tmp_path: Path) -> None:
    record = {
        "epoch": 1,
        "phase": "bayes",
        "validation_error": 5.0,
        "quantization_loss": 0.0,
        "near_share": None,
    }
    run = Run(tmp_path / EVIL.replace("/", ""), replace(BAYES, dataset=f"folder:{EVIL}"), [record], {})
    write_html([run, run], tmp_path / "page.html", measure=False)
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags["script"] == 0
    assert page.unbalanced == []
    assert sum(f"lenet5 on folder:{EVIL}" in text for text in page.text) >= 3
    assert any(str(run.folder) in text for text in page.text), "runs of one title are told apart by their folders"


def test_a_run_without_an_epoch_has_no_curve(tmp_path: Path) -> None:
    write_html([Run(tmp_path, BAYES, [], {})], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert "<svg" not in source and BAYES.dataset in source


def test_no_run_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_html([], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_same_runs_give_the_same_page(source: str, runs: list[Run], tmp_path: Path) -> None:
    write_html(runs, tmp_path / "again.html", measure=False)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == source


def lines(svg: str, colour: str) -> int:
    return len(re.findall(rf"stroke: {colour}", svg))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [2, 3, 16])
@pytest.mark.parametrize("log_counts", [True, False], ids=["log", "linear"])
def test_histogram_has_a_line_a_level_and_a_dashed_one_a_threshold(
    num_levels: int, granularity: str, log_counts: bool
) -> None:
    torch.manual_seed(0)
    layer = BayesConv2d(3, 8, 3, num_levels=num_levels, granularity=granularity)
    svg = draw_means("k", "conv<1>", layer, log_counts)
    assert lines(svg, LEVEL) == num_levels
    assert lines(svg, THRESHOLD) == num_levels - 1
    assert svg.count("stroke-dasharray") == num_levels - 1
    assert "conv&lt;1&gt;, 216 weights" in svg and "conv<1>" not in svg
    assert figures.TEXT not in svg and "currentColor" in svg


def test_histogram_of_spikes_counts_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BayesLinear(100, 100, num_levels=2)
    with torch.no_grad():
        layer.mean.copy_(torch.where(torch.arange(10_000).view(100, 100) < 2500, -1.0, 1.0))
        layer.mean[0, 0] = 50.0  # too few so far out for the axis to reach
    layer.set_levels_(torch.tensor([[-1.0, 1.0]]))
    drawn: dict[str, Any] = {}

    def stairs(axes: object, values: list[float], edges: list[float], **_: object) -> None:
        drawn.update(values=values, edges=edges)

    monkeypatch.setattr("matplotlib.axes.Axes.stairs", stairs)
    draw_means("k", "fc", layer)
    assert sum(drawn["values"]) == 10_000
    assert sorted(drawn["values"])[-2:] == [2499, 7500]
    assert -1.2 < drawn["edges"][0] < -1 and 1 < drawn["edges"][-1] < 1.2


def test_place_in_codebook() -> None:
    levels = torch.tensor([[0.0, 1.0, 3.0], [-2.0, 0.0, 2.0]])
    values = torch.tensor([[-1.0, 0.5, 1.0, 2.0, 5.0], [-2.0, -1.0, 0.0, 2.0, 3.0]])
    expected = torch.tensor([[-1.0, 0.5, 1.0, 1.5, 3.0], [0.0, 0.5, 1.0, 2.0, 2.5]])
    assert torch.equal(place_in_codebook(values, levels), expected)


def test_curves_differ_in_colour_then_in_dashes() -> None:
    orders = range(len(figures.COLOURS) * len(figures.DASHES))
    assert len({figures.line_style(order) for order in orders}) == len(orders)
    svg = draw_curves("k", "t", [Curve([1, 2], [1.0, 2.0], 0), Curve([1, 2], [2.0, 1.0], 7)], [1.5])
    assert figures.COLOURS[0] in svg and figures.COLOURS[1] in svg
    assert svg.count("stroke-dasharray") == 1
