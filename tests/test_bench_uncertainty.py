"""The bench of uncertainty: its rows are what bqnn.lab.uncertainty measures, of the network and of its posterior."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import uncertainty_lenet5 as bench
from bqnn.data.corruptions import CORRUPTIONS
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer
from bqnn.lab.uncertainty import measure

SHORT = Recipe(pretrain_epochs=1, deterministic_epochs=0, epochs=1, start_sigma=0.4, validation=200)


def test_rows_are_what_eval_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SAMPLES", 2)
    monkeypatch.setattr("bqnn.lab.uncertainty.CORRUPTIONS", {"fog": CORRUPTIONS["fog"]})
    trainer = bench.train("x", SHORT, Path("data"), tmp_path)
    rows = list(bench.rows_of("x", trainer, "test"))
    assert [row["samples"] for row in rows] == [1, 2]
    for row in rows:
        found = measure(trainer.net, trainer.data, samples=row["samples"], seed=bench.SEED, data_root=tmp_path)
        assert row["temperature"] == pytest.approx(found["temperature"], rel=1e-6)
        assert row["clean"] == pytest.approx(found["clean"], rel=1e-6)
        assert row["noise"]["nll"] > row["clean"]["nll"]
        assert bench.show(row).startswith(f"x{'':14}{row['samples']:>3} T {row['temperature']:.2f}  clean: error ")


def test_noise_is_the_same_for_all_networks_and_has_its_deviation(tmp_path: Path) -> None:
    trainer = Trainer(SHORT, tmp_path)
    clean, noisy, again = (torch.cat(list(bench.inputs_of(trainer.data, "test", noise))) for noise in (0.0, 2.0, 2.0))
    assert torch.equal(noisy, again)
    assert float((noisy - clean).std()) == pytest.approx(2, rel=0.02)


def test_a_network_without_a_posterior_has_one_row(tmp_path: Path) -> None:
    trainer = bench.train("x", replace(SHORT, method="fpnn"), Path("data"), tmp_path)
    assert [row["samples"] for row in bench.rows_of("x", trainer, "validation")] == [1]
