"""The bench of uncertainty: its rows are what bqnn.lab.uncertainty measures, of networks drawn from packed ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bqnn
from bench import uncertainty_lenet5 as bench
from bqnn.data.corruptions import CORRUPTIONS
from bqnn.lab.ensemble import load_ensemble_run
from bqnn.lab.recipe import Recipe
from bqnn.lab.runs import load_run
from bqnn.lab.train import Trainer
from bqnn.lab.uncertainty import measure

SHOWN = ("deterministic", "mixture", "ensemble", "mixture ensemble")
SHORT = Recipe(pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bench.Trained]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: bench.train_network(name, SHORT, folder, Path("data")) for name in bench.NETWORKS}


@pytest.fixture
def rows(
    trained: dict[str, bench.Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[bench.Row]]:
    monkeypatch.setattr(bench, "SAMPLES", 8)
    monkeypatch.setattr("bqnn.lab.uncertainty.CORRUPTIONS", {"fog": CORRUPTIONS["fog"]})
    yield [row for name in SHOWN for row in bench.rows_of(name, trained[name], "test", tmp_path)]


def test_rows_are_what_eval_measures_of_packed_networks(
    rows: list[bench.Row], trained: dict[str, bench.Trained], tmp_path: Path
) -> None:
    expected = [("deterministic", 1), ("mixture", 1), ("mixture", 8), ("ensemble", 4)]
    expected += [("mixture ensemble", 4), ("mixture ensemble", 8)]
    assert [(row["network"], row["samples"]) for row in rows] == expected
    for row in rows:
        run = trained[row["network"]]
        net, samples = bqnn.pack(run.net), 1 if row["samples"] == 4 else row["samples"]
        found = measure(net, run.data, samples=samples, seed=bench.SEED, data_root=tmp_path)
        assert row["temperature"] == pytest.approx(found["temperature"], rel=1e-6)
        assert row["clean"] == pytest.approx(found["clean"], rel=1e-6)
        assert row["mean"] == pytest.approx(found["mean"], rel=1e-6)
        assert row["corruptions"]["fog"] == pytest.approx(found["mean"], rel=1e-6), "there is one corruption"
        assert row["noise"]["nll"] > row["clean"]["nll"]
        bqnn.save(net, tmp_path / "packed.safetensors")
        assert row["bytes"] == (tmp_path / "packed.safetensors").stat().st_size < row["fpnn_bytes"]
        start = f"{row['network']:<15}{row['samples']:>3} seed 0 T {row['temperature']:.2f}  clean: error "
        assert bench.show(row).startswith(start)


def test_no_network_is_tested_twice(
    rows: list[bench.Row], trained: dict[str, bench.Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(bench, "_tested")
    assert bench.rows_of("deterministic", trained["deterministic"], "test", tmp_path) == rows[:1]
    with pytest.raises(NameError):
        bench.rows_of("deterministic", trained["deterministic"], "validation", tmp_path)


def test_networks_of_a_seed_share_their_first_phases(trained: dict[str, bench.Trained]) -> None:
    ensembles = {name: load_ensemble_run(run.folder) for name, run in trained.items()}
    runs = {name: run.runs() if run else [load_run(trained[name].folder)] for name, run in ensembles.items()}
    begun = {name: {run.history[0]["epoch"] for run in each} for name, each in runs.items()}
    single = {"fpnn": {2}, **{key: {3} for key in ("deterministic", "default", "default, M = 2", "mixture")}}
    assert begun == {**single, "ensemble": {2}, "mixture ensemble": {2}}
    assert {run.history[-1]["epoch"] for each in runs.values() for run in each} == {3}
    assert [run.recipe.seed for run in runs["ensemble"]] == [0, 1, 2, 3]


def test_the_table_has_means_over_seeds_and_verdicts_of_what_is_asked(rows: list[bench.Row]) -> None:
    other = [{**row, "seed": 1, "temperature": row["temperature"] + 0.2} for row in rows]
    lines = list(bench.table([*rows, *other]))
    assert lines[0] == (
        "| | deterministic, 1 | mixture, 1 | mixture, 8 | ensemble, 4 | mixture ensemble, 4 | mixture ensemble, 8 |"
    )
    first = f"{rows[0]['temperature'] + 0.1:.2f} ± 0.14"
    assert lines[2].startswith(f"| T | {first} | ")
    labels = [line.split(" | ")[0] for line in lines[3:7]]
    assert labels == [f"| {name}: error %, NLL, ECE %, MI" for name in ("clean", "noise 1.0", "fog", "all corruptions")]
    texts = [verdict.text for verdict in bench.verdicts([*rows, *other])]
    assert len(texts) == 5 and texts[-1].endswith(f"T = {rows[2]['temperature'] + 0.1:.3f}")
    likelihoods = [row["noise"]["nll"] for row in rows]
    assert list(bench.verdicts(rows))[1].measured == pytest.approx(0.75 * likelihoods[0] / likelihoods[2])
    assert list(bench.verdicts(rows[1:])) == [], "there is nothing to compare with"
    fpnn = {**rows[0], "network": "fpnn"}
    found = {verdict.text: verdict.measured for verdict in bench.verdicts([fpnn, *rows[1:]])}
    ratio = rows[0]["mean"]["nll"] / rows[3]["mean"]["nll"]
    assert found["the FPNN's nll on corrupted images, over the ensemble's"] == pytest.approx(ratio)
    assert found["a fifth of the FPNN's bytes, over the ensemble's"] == rows[3]["fpnn_bytes"] / 5 / rows[3]["bytes"]


def test_noise_is_the_same_for_all_networks_and_has_its_deviation(tmp_path: Path) -> None:
    trainer = Trainer(SHORT, tmp_path)
    clean, noisy, again = (torch.cat(list(bench.inputs_of(trainer.data, "test", noise))) for noise in (0.0, 2.0, 2.0))
    assert torch.equal(noisy, again)
    assert float((noisy - clean).std()) == pytest.approx(2, rel=0.02)


def test_only_the_mixture_is_drawn_from(trained: dict[str, bench.Trained], tmp_path: Path) -> None:
    for name in ("fpnn", "default"):
        assert [row["samples"] for row in bench.rows_of(name, trained[name], "validation", tmp_path)] == [1]
