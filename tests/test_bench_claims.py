"""The bench of the claims: pairs differ in what is claimed, symmetric levels are, and intervals are Student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import claims_lenet5 as bench
from bqnn.bayes.convert import convert
from bqnn.bayes.layers import bayes_layers
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import load_network, load_run

SHORT = Recipe(pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=200)


def drawn_rows(seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Rows with numbers that say which network they are of, and noise that differs by seed alone."""
    rows = []
    for seed in seeds:
        for index, name in enumerate(bench.NETWORKS):
            value = 1.0 + index / 64 + seed / 8
            numbers = dict.fromkeys(("validation_nll", "error", "nll", "noisy_nll"), value)
            rows.append({"network": name, "seed": seed, **numbers})
    return rows


def test_networks_of_a_seed_share_what_they_can_and_symmetric_levels_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BASE", SHORT)
    names = ["M = 3, free", "M = 3, symmetric", "mixture, 0.1", "M = 4, learned"]
    rows = [bench.row_of(name, 1, tmp_path, Path("data")) for name in names]
    assert [row["network"] for row in rows] == names
    folders = {path.parent.name for path in tmp_path.glob("seed-1/*/model.safetensors")}
    shared = {"trunk", "quantized-3-nearest", "quantized-3-nearest-symmetric", "quantized-4-learned"}
    assert folders == shared | {name.replace(" ", "") for name in names}
    for name in names:
        net = load_network(load_run(tmp_path / "seed-1" / name.replace(" ", "")))
        for layer in bayes_layers(net).values():
            levels = layer.levels
            off = (levels + levels.flip(1)).abs().max() / levels.abs().max()
            assert (off < 1e-5) == ("symmetric" in name)
    assert [bench.row_of(name, 1, tmp_path, Path("data")) for name in names] == rows  # kept


def test_each_claim_is_of_networks_that_differ_in_one_thing() -> None:
    rows = drawn_rows()
    for row in rows:
        if row["network"] in ("mixture, 0.3", "Gaussian, 1"):
            row["validation_nll"] = 0.0
    assert [bench.best_weight(rows, prior) for prior in bench.PRIORS] == [0.1, 0.3, 1.0]
    found = list(bench.claims(rows))
    assert len(found) == 11 and all({claim.first, claim.second} <= set(bench.NETWORKS) for claim in found)
    assert [claim.second for claim in found[-2:]] == ["mixture, 0.3", "mixture, 0.3"]
    assert found[-2].first == "Gaussian, 1"
    for claim in found[:8]:
        (first, symmetric), (second, other) = bench.NETWORKS[claim.first], bench.NETWORKS[claim.second]
        mine, its = vars(replace(SHORT, **first)), vars(replace(SHORT, **second))
        assert sum(mine[name] != its[name] for name in mine) + (symmetric != other) == 1


def test_an_interval_is_students() -> None:
    found = bench.Difference.of([1.0, 2.0, 3.0], [0.5, 1.6, 2.7])  # -0.5, -0.4, -0.3
    assert found.mean == pytest.approx(-0.4)
    assert found.half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # of two degrees of freedom
    assert found.verdict == "better"
    assert bench.Difference.of([0.0, 0.0], [0.1, 0.3]).verdict == "nothing shown"
    assert bench.Difference.of([0.0, 0.0], [0.2, 0.20001]).verdict == "worse"


def test_the_table_has_a_line_a_claim() -> None:
    lines = list(bench.table(drawn_rows()))
    assert len(lines) == 2 + 11 and lines[2].startswith("| free levels for symmetric ones, M = 2 | ")
    names = list(bench.NETWORKS)
    step = (names.index("M = 2, free") - names.index("M = 2, symmetric")) / 64
    assert f"| {step:+.2f} ± 0.00, better |" in lines[2]


def test_the_nearest_symmetric_levels_are_the_mean_of_levels_and_their_mirror_image() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5))
    net = convert(net, 4)
    before = net[0].levels.detach().clone()
    bench.make_symmetric_(net)
    torch.testing.assert_close(net[0].levels, (before - before.flip(1)) / 2, rtol=1e-5, atol=1e-6)
