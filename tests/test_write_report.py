"""bqnn.write_report: a page on any network of the user's, packed or not."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bqnn
from tests.support.page import Page

EVIL = '<script>alert("x")</script>&amp;$\\frac$'


def net(granularity: str = "tensor") -> nn.Module:
    """A convolution of three levels, and a layer of sixteen; the last stays at full precision."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
    return bqnn.convert(layers, 3, skip=["4"], overrides={"3": {"num_levels": 16}}, granularity=granularity)


def page_of(network: nn.Module, tmp_path: Path, **options: Any) -> Page:
    bqnn.write_report(network, tmp_path / "page.html", **options)
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.unbalanced == [] and source.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    return page


def labels(page: Page) -> list[str | None]:
    return [value for name, value in page.attributes if name == "aria-label"]


def test_a_bayes_network(tmp_path: Path) -> None:
    page = page_of(net(), tmp_path)
    (head, conv, linear) = page.rows
    assert head[:6] == ["layer", "shape", "M", "bits", "bytes", "dead"] and head[6:9] == ["near", "loss", "σ in gaps"]
    assert conv[:3] == ["0", "4×1×3×3", "3"] and linear[:3] == ["3", "8×16", "16"]
    assert linear[-1].count("%)") == 16
    assert labels(page) == ["0, 36 weights", "3, 128 weights"]
    assert [v for name, v in page.attributes if name == "class" and v == "wide"] == ["wide"], "of sixteen levels"
    text = " ".join(page.text)
    found = bqnn.report(net())
    assert f"164 weights in 2 layers, {found.bits:.2f} bits a weight" in text
    assert f"{found.nbytes} bytes; in float32 656" in text
    assert "18 other parameters" in text
    assert f"bqnn {bqnn.__version__}" in text and "Sequential" in page.text


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_packed_network_has_bars_and_no_means(granularity: str, tmp_path: Path) -> None:
    packed = bqnn.pack(net(granularity))
    page = page_of(packed, tmp_path, log_counts=False)
    head, conv, _ = page.rows
    assert head == ["layer", "shape", "M", "bits", "bytes", "dead", "levels (share of weights)"]
    assert (conv[-1] == "4 codebooks") == (granularity == "channel")
    assert labels(page) == ["0, 36 weights", "3, 128 weights"]
    assert "σ" not in " ".join(page.text)


def test_a_network_of_both_kinds_has_dashes_for_what_is_packed(tmp_path: Path) -> None:
    both = nn.Sequential(bqnn.pack(bqnn.convert(nn.Linear(4, 4), 3)), bqnn.BayesLinear(4, 4, num_levels=3))
    _, packed, bayes = page_of(both, tmp_path).rows
    assert packed[6:9] == ["–"] * 3 and "–" not in bayes[6:9]


def test_a_deterministic_layer_has_no_deviation(tmp_path: Path) -> None:
    _, row = page_of(bqnn.BayesLinear(4, 4, estimator="deterministic"), tmp_path).rows
    assert row[0] == "net" and row[8] == "–"


def test_names_and_titles_are_escaped(tmp_path: Path) -> None:
    evil = nn.Sequential(OrderedDict({EVIL.replace(".", ""): bqnn.BayesLinear(4, 4)}))
    page = page_of(evil, tmp_path, title=EVIL)
    assert page.rows[1][0] == EVIL
    assert labels(page) == [f"{EVIL}, 16 weights"]
    assert page.text.count(EVIL) == 2, "the heading, and the name of the layer"
    assert any(f"bqnn: {EVIL}" in text for text in page.text)


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    network = net().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    page_of(network, tmp_path)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"net": 3}, TypeError, "net must be an nn.Module, got 3", id="net"),
        pytest.param({"net": nn.Linear(2, 2)}, ValueError, "no Bayes layer and no packed layer", id="no-layer"),
        pytest.param({"path": 3}, TypeError, "path must be a path, got 3", id="path"),
        pytest.param({"title": 3}, TypeError, "title must be a string or None, got 3", id="title"),
        pytest.param({"log_counts": "no"}, TypeError, "log_counts must be", id="log-counts"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        bqnn.write_report(**{"net": net(), "path": tmp_path / "page.html", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_mean_that_is_not_finite_leaves_no_page(tmp_path: Path) -> None:
    layer = bqnn.BayesLinear(2, 2)
    with torch.no_grad():
        layer.mean[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        bqnn.write_report(layer, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
