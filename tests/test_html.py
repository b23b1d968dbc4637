"""The page of write_html: self-contained, escaped, well-formed, and with what is in the runs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import bqnn
from bqnn.bayes.convolutions import BayesConv2d
from bqnn.bayes.layers import BayesLinear
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import Run, add_scores, load_run
from bqnn.lab.train import Trainer
from bqnn.view import figures, html
from bqnn.view.figures import LEVEL, THRESHOLD, Curve, draw_curves, draw_means, draw_occupancy, place_in_codebook
from bqnn.view.html import write_html
from bqnn.view.runs import _phase_starts, data_facts, scores_table
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
    sampled = {"samples": 16, "refreshed": 0, "error": 10.0, "nll": 0.4, "ece": 0.05, "entropy": 0.5}
    scores = {"images": 360, "error": 2.5, "nll": 0.125, "ece": 0.0625}
    add_scores(load_run(folder / "1"), "test", scores | {"sampled": sampled | {"mutual_information": 0.03125}})
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
    curves = ["validation error, %", "quantization loss, %", "means near a level, %"]
    layers = ["conv1, 150", "conv2, 2,400", "fc1, 30,720", "fc2, 10,080", "fc3, 840"]
    assert labels == curves + [f"{layer} weights" for layer in layers * 2]


def tables(source: str, layers: int = 2) -> dict[str, list[list[str]]]:
    """The tables of a page of runs that have test scores, of which so many have a table of their layers."""
    names = ["recipes", "test", "validation", "sizes", *(f"layers {i + 1}" for i in range(layers))]
    return dict(zip(names, Page(source).tables, strict=True))


def test_errors_of_test_and_validation_are_apart_and_have_an_interval(source: str, runs: list[Run]) -> None:
    head, *rows = tables(source)["test"]
    assert head == ["run", "wrong", "error", "95 %", "NLL", "ECE", "MI"]
    assert rows[0] == [runs[1].title, "9 of 360", "2.50 %", "1.32 to 4.68 %", "0.1250", "6.25 %", "–"]
    drawn = f"{runs[1].title}: mean of 16 networks drawn"
    assert rows[1:] == [[drawn, "36 of 360", "10.00 %", "7.31 to 13.53 %", "0.4000", "5.00 %", "0.0312"]]
    head, *rows = tables(source)["validation"]
    assert [row[0] for row in rows] == [run.title for run in runs], "of the last epoch, where nothing else is known"
    for row, run in zip(rows, runs, strict=True):
        error = run.history[-1]["validation_error"]
        assert row[1:3] == [f"{error * 12.6:,.0f} of 1,260", f"{error:.2f} %"]
        assert row[4:] == [f"{run.history[-1]['validation_nll']:.4f}", "–", "–"]


@pytest.mark.parametrize(
    ("scores", "row"),
    [
        pytest.param({"error": 2.0}, ["–", "2.00 %", "–", "–", "–", "–"], id="no-number-of-images"),
        pytest.param({"error": 200.0, "images": 9}, ["–", "200.00 %", "–", "–", "–", "–"], id="no-share"),
        pytest.param({"error": 2.0, "images": 0}, ["–", "2.00 %", "–", "–", "–", "–"], id="no-image"),
        pytest.param({"error": 2.0, "images": 0.5}, ["–", "2.00 %", "–", "–", "–", "–"], id="no-count"),
        pytest.param({"error": float("nan"), "images": 9}, ["–", "nan %", "–", "–", "–", "–"], id="nan"),
    ],
)
def test_scores_that_allow_no_interval_have_none(scores: dict[str, Any], row: list[str], tmp_path: Path) -> None:
    found = scores_table([Run(tmp_path, BAYES, [], {"test": scores})], ["a"], "test")
    assert found is not None and list(found.rows) == [["a", *row]]


def test_no_scores_no_table(tmp_path: Path) -> None:
    assert scores_table([Run(tmp_path, BAYES, [], {})], ["a"], "test") is None


def test_the_set_up_is_said(source: str, runs: list[Run]) -> None:
    text = " ".join(Page(source).text)
    assert "digits: 177 to train on, 1,260 to choose on, 360 to test on" in text
    assert date.today().isoformat() in text and f"bqnn {bqnn.__version__}" in text
    assert f"PyTorch {torch.__version__}" in text and bqnn.cpu_isa() in text
    assert text.count("full-precision network") == 1, "FPNN is spelled out"
    recipes = {row[0]: row[1:] for row in tables(source)["recipes"]}
    assert recipes["field"] == [run.title for run in runs]
    assert recipes["method"] == ["fpnn", "bayes", "bayes", "bayes"] and recipes["num_levels"] == ["3", "3", "4", "3"]
    assert set(recipes) == {"field", *asdict(BAYES)}


def test_runs_of_one_data_set_share_a_line(tmp_path: Path) -> None:
    counts = {"train": 8, "validation": 1, "test": 2}
    same, other = Run(tmp_path, BAYES, [], {}, counts), Run(tmp_path, replace(BAYES, dataset="mnist"), [], {})
    assert data_facts([same, other, same]) == [
        ("Data", "digits: 8 to train on, 1 to choose on, 2 to test on"),
        ("Data", "mnist"),
    ]


def test_sizes(source: str, runs: list[Run]) -> None:
    head, *rows = tables(source)["sizes"]
    assert head == ["run", "bits a weight", "bytes on disk", "smaller", "test time", "of the FPNN's"]
    assert [row[0] for row in rows] == [run.title for run in runs]
    assert rows[0][1:] == ["32.00", rows[0][2], "1.0 ×", "–", "–"]
    assert [row[1] for row in rows[1:3]] == ["1.62", "2.00"]
    assert rows[3][1:] == [*"–––––"], "what is not finished has no size"
    sizes = [int(row[2].replace(",", "")) for row in rows[:3]]
    assert [row[3] for row in rows[:3]] == [f"{sizes[0] / size:.1f} ×" for size in sizes]
    assert sizes[0] > 10 * sizes[1]


def test_table_of_the_layers(source: str) -> None:
    first, second = tables(source)["layers 1"], tables(source)["layers 2"]
    assert [row[0] for row in first] == [row[0] for row in second] == ["layer", "conv1", "conv2", "fc1", "fc2", "fc3"]
    of_first = dict(zip(first[0], first[1], strict=True))
    assert (of_first["shape"], of_first["M"], of_first["bits"]) == ("6×1×5×5", "3", "1.60")
    assert first[1][-1].count("%)") == 3 and second[1][-1] == "6 codebooks"
    assert re.fullmatch(r"0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)", of_first["σ in gaps"])


def test_times_are_measured_against_the_full_precision_network(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "measure_side_by_side", lambda nets, x: [0.002, 0.003, 0.001, 0.0005][: len(nets)])
    write_html(runs[:2], tmp_path / "page.html")
    rows = tables((tmp_path / "page.html").read_text(), layers=1)["sizes"]
    assert rows[1][-2:] == ["3.00 ms", "1"]
    assert rows[2][-2:] == ["3.00 ms", "1.50"]
    assert rows[3] == ["the same, compiled for fp32", *"–––", "1.00 ms", "0.50"]
    assert rows[4] == ["the same, compiled for int8", *"–––", "0.50 ms", "0.25"]


def test_measured_times_are_positive(runs: list[Run], tmp_path: Path) -> None:
    write_html(runs[1:2], tmp_path / "page.html")
    for row in tables((tmp_path / "page.html").read_text(), layers=1)["sizes"][1:]:
        assert float(row[-2].removesuffix(" ms")) > 0 and float(row[-1]) > 0


EVIL = '<script>alert("x")</script>&amp;$\\frac$'


def test_text_is_escaped(tmp_path: Path) -> None:
    record = {
        "epoch": 1,
        "phase": "bayes",
        "validation_error": 5.0,
        "validation_nll": 0.2,
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


def test_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "\udcff", BAYES, [], {})
    write_html([run, run], tmp_path / "page.html", measure=False)
    assert "\\udcff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_same_runs_give_the_same_page(source: str, runs: list[Run], tmp_path: Path) -> None:
    write_html(runs, tmp_path / "again.html", measure=False)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == source


def lines(svg: str, colour: str) -> int:
    return len(re.findall(rf"stroke: {colour}", svg))


def triangles(svg: str) -> int:
    """The marks of levels above the axes: uses of one shape that is filled with their colour."""
    return len(re.findall(rf"<use [^>]*fill: {LEVEL}", svg))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [2, 3, 16])
@pytest.mark.parametrize("log_counts", [True, False], ids=["log", "linear"])
def test_histogram_has_a_line_a_level_and_a_dashed_one_a_threshold(
    num_levels: int, granularity: str, log_counts: bool
) -> None:
    torch.manual_seed(0)
    layer = BayesConv2d(3, 8, 3, num_levels=num_levels, granularity=granularity)
    svg = draw_means("k", "conv<1>", layer, log_counts)
    assert lines(svg, LEVEL) == triangles(svg) == num_levels
    assert lines(svg, THRESHOLD) == num_levels - 1
    assert svg.count("stroke-dasharray") == num_levels - 1
    assert "conv&lt;1&gt;, 216 weights" in svg and "conv<1>" not in svg
    assert figures.TEXT not in svg and "currentColor" in svg
    assert ('class="wide"' in svg) == (num_levels == 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_histogram_of_any_dtype(dtype: torch.dtype) -> None:
    layer = BayesLinear(9, 5, num_levels=3, granularity="channel", dtype=dtype)
    assert lines(draw_means("k", "fc", layer), LEVEL) == 3


@pytest.mark.parametrize("log_counts", [True, False], ids=["log", "linear"])
def test_bars_of_a_packed_layer(log_counts: bool) -> None:
    svg = draw_occupancy("k", "fc", [[-1.0, 0.0, 2.0]], [5, 0, 7], log_counts)
    assert "fc, 12 weights" in svg and lines(svg, LEVEL) == triangles(svg) == 3
    assert lines(svg, figures.MEANS) == 2, "a level that no weight has has no bar"
    several = draw_occupancy("k", "fc", [[-1.0, 0.0], [0.0, 1.0]], [5, 7], log_counts)
    assert "place in the channel" in several and triangles(several) == 2


def drawn_means(layer: BayesLinear, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """The bars of the histogram of a layer, and its text."""
    drawn: dict[str, Any] = {}

    def stairs(axes: object, values: list[float], edges: list[float], **_: object) -> None:
        drawn.update(values=values, edges=edges)

    monkeypatch.setattr("matplotlib.axes.Axes.stairs", stairs)
    return drawn, draw_means("k", "fc", layer)


def test_means_beyond_the_axis_are_counted_and_not_drawn_at_its_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BayesLinear(100, 100, num_levels=2)
    with torch.no_grad():
        layer.mean.copy_(torch.where(torch.arange(10_000).view(100, 100) < 2500, -1.0, 1.0))
        layer.mean[0, 0] = 50.0  # too few so far out for the axis to reach
    layer.set_levels_(torch.tensor([[-1.0, 1.0]]))
    drawn, svg = drawn_means(layer, monkeypatch)
    assert sum(drawn["values"]) == 9_999 and drawn["values"][0] == drawn["values"][-1] == 0
    assert sorted(drawn["values"])[-2:] == [2499, 7500]
    assert -1.2 < drawn["edges"][0] < -1 and 1 < drawn["edges"][-1] < 1.2
    assert "mean; 1 of 10,000 lie beyond the axis" in svg


def test_where_the_axis_reaches_all_means_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, svg = drawn_means(BayesLinear(20, 20, num_levels=3), monkeypatch)
    assert sum(drawn["values"]) == 400 and "beyond" not in svg


def test_place_in_codebook() -> None:
    levels = torch.tensor([[0.0, 1.0, 3.0], [-2.0, 0.0, 2.0]])
    values = torch.tensor([[-1.0, 0.5, 1.0, 2.0, 5.0], [-2.0, -1.0, 0.0, 2.0, 3.0]])
    expected = torch.tensor([[-1.0, 0.5, 1.0, 1.5, 3.0], [0.0, 0.5, 1.0, 2.0, 2.5]])
    assert torch.equal(place_in_codebook(values, levels), expected)


def test_curves_differ_in_colour_then_in_dashes() -> None:
    orders = range(len(figures.COLOURS) * len(figures.DASHES))
    assert len({figures.line_style(order) for order in orders}) == len(orders)
    svg = draw_curves("k", "t", [Curve([1, 2], [1.0, 2.0], 0), Curve([1, 2], [2.0, 1.0], 7)], {1.5: "a<b"})
    assert figures.COLOURS[0] in svg and figures.COLOURS[1] in svg
    assert svg.count("stroke-dasharray") == 2, "of the seventh line, and of the mark"
    assert "a&lt;b" in svg, "the phase that begins at the mark"


def test_curves_say_where_phases_begin(runs: list[Run], source: str) -> None:
    starts = {1.5: "deterministic", 2.5: "bayes"}
    assert _phase_starts(runs[1:2]) == starts and _phase_starts(runs[:1]) == {}
    assert all(source.count(f">{name}<") >= 3 for name in starts.values()), "in each figure of the training"
