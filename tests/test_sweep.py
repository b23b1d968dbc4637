"""Sweeps: what their files may say, and that trials are run once each, whoever works on them and is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bqnn.cli.main import main
from bqnn.lab.recipe import Recipe
from bqnn.lab.sweep import Range, Sweep, Sweeper, load_sweep
from bqnn.lab.train import Trainer
from bqnn.view.sweep import write_sweep
from tests.support.processes import ROOT

SMALL = Recipe(pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=1260, batch_size=60)
FILE = """
trials = 3
[fixed]
pretrain_epochs = 1
deterministic_epochs = 1
epochs = 1
validation = 1260
batch_size = 60
[search]
num_levels = [2, 3]
bayes_lr = { low = 1e-3, high = 1e-2, log = true }
[search.layer_levels]
conv1 = [4, 8]
"""


def silent(line: str) -> None:
    pass


def test_a_file_says_what_is_varied(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(FILE)
    sweep = load_sweep(tmp_path / "s.toml")
    assert sweep.base == SMALL and sweep.trials == 3 and sweep.minimize == ("error", "bytes")
    assert sweep.search == {
        "num_levels": (2, 3),
        "bayes_lr": Range(1e-3, 1e-2, True),
        "layer_levels.conv1": (4, 8),
    }
    recipe = sweep.recipe({"num_levels": 2, "bayes_lr": 2e-3, "layer_levels.conv1": 8})
    assert recipe == replace(SMALL, num_levels=2, bayes_lr=2e-3, layer_levels="conv1=8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trials = ", "is no sweep: "),
        ("tries = 3", "unknown field 'tries'"),
        ("trials = '3'", "trials must be of type int"),
        ("[search]\nnum_levels = [2]", "must have the field 'trials'"),
        ("trials = 0\n[search]\nnum_levels = [2]", "trials must be"),
        ("trials = 3", "search must have a field"),
        ("trials = 3\n[search]\nlevels = [2]", "unknown field 'levels'"),
        ("trials = 3\n[search]\nnum_levels = [2, 17]", "num_levels must be"),
        ("trials = 3\n[search]\nnum_levels = []", "num_levels of search must be a list"),
        ("trials = 3\n[search]\nlr = { low = 2.0, high = 1.0 }", "low < high"),
        ("trials = 3\n[search]\nlr = { low = 0.0, high = 1.0, log = true }", "low > 0"),
        ("trials = 3\n[search]\nlr = { low = 1.0 }", "lr of search must be a list"),
        ("trials = 3\n[search.layer_levels]\nconv1 = [1]", "layer_levels of conv1 must be"),
        ("trials = 3\nsampler = 'all'\n[search]\nnum_levels = [2]", "sampler must be one of search, grid"),
        ("trials = 3\nsampler = 'grid'\n[search]\nnum_levels = [2]", "trials can't be given of a grid"),
        ("sampler = 'grid'\n[search]\nlr = { low = 1.0, high = 2.0 }", "lists alone where sampler is grid"),
        ("trials = 3\nminimize = ['error', 'time']\n[search]\nnum_levels = [2]", "minimize must be one or two"),
        ("trials = 3\n[fixed]\nmethod = 'fpnn'\n[search]\nlr = [0.1]", "minimize can't have bytes"),
        ("trials = 3\nrecipe = 'lenet'\n[search]\nnum_levels = [2]", "recipe must be one of"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_line(text: str, said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "s.toml").write_text(text)
    assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_grid_is_run_as_a_whole_and_its_best_are_a_front(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "s.toml").write_text(FILE.replace("trials = 3", "sampler = 'grid'").replace("bayes_lr", "# bayes_lr"))
    assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0].split() == ["trial", "num_levels", "layer_levels.conv1", "error", "bytes"]
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert sorted(tuple(row["parameters"].values()) for row in rows) == [(2, 4), (2, 8), (3, 4), (3, 8)]
    values = [tuple(row["values"].values()) for row in rows]
    for row, mine in zip(rows, values):
        worse = any(other != mine and all(a <= b for a, b in zip(other, mine)) for other in values)
        assert row["best"] == (not worse)
    for row in rows:
        folder = tmp_path / "out" / f"trial-{row['number']}"
        assert row["values"]["bytes"] == (folder / "packed.safetensors").stat().st_size
        assert (
            json.loads((folder / "metrics.json").read_text())["history"][-1]["validation_error"]
            == (row["values"]["error"])
        )
    assert (tmp_path / "out" / "sweep.svg").read_text().count("<svg") == 1
    assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == lines  # nothing was left to run


def test_a_trial_that_was_stopped_is_gone_on_with_and_ends_as_it_would_have(tmp_path: Path) -> None:
    sweep = Sweep(SMALL, {"num_levels": (2, 3), "bayes_lr": Range(1e-3, 1e-2, True)}, 3, minimize=("nll",))
    Sweeper(sweep, tmp_path / "whole").run(False, silent)

    def stop(line: str) -> None:
        if line.startswith("trial-1") and "epoch 2/3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sweeper(sweep, tmp_path / "parts").run(False, stop)
    resumed = Sweeper(sweep, tmp_path / "parts")
    resumed.run(False, silent)
    assert resumed.trials() == Sweeper(sweep, tmp_path / "whole").trials()
    assert len({trial.parameters["bayes_lr"] for trial in resumed.trials()}) == 3
    with pytest.raises(ValueError, match="has the trials of another sweep"):
        Sweeper(replace(sweep, minimize=("error",)), tmp_path / "parts")
    assert "best" in write_sweep(resumed)


def test_processes_share_the_trials_and_one_that_is_killed_leaves_its_own(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(FILE.replace("trials = 3", "trials = 6"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bqnn", "sweep", str(tmp_path / "s.toml"), "--out", str(out), "--threads", "1"]
    workers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    deadline = time.monotonic() + 120
    while not (out / "trial-0").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    assert workers[1].wait(timeout=240) == 0
    workers[0].wait()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240).returncode == 0
    rows = json.loads((out / "sweep.json").read_text())
    assert sorted(row["number"] for row in rows) == list(range(6)) and all(row["values"] for row in rows)
    assert len({row["parameters"]["bayes_lr"] for row in rows}) == 6


def test_a_trial_that_diverges_is_a_failure_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer.run

    def diverging(self: Trainer, *arguments: Any) -> Any:
        if self.recipe.num_levels == 3:
            raise FloatingPointError("the loss of epoch 1 is nan")
        return run(self, *arguments)

    monkeypatch.setattr(Trainer, "run", diverging)
    sweeper = Sweeper(Sweep(SMALL, {"num_levels": (3, 2)}, 2, sampler="grid"), tmp_path)
    sweeper.run(False, silent)
    good, failed = sweeper.trials()
    assert good.parameters == {"num_levels": 2} and good.best and good.values is not None
    assert failed.parameters == {"num_levels": 3} and failed.values is None and not failed.best
    assert "failed" in write_sweep(sweeper)


@pytest.mark.parametrize("text", ["conv1", "conv1=", "=3", "conv1=3 conv1=4", "conv1=1", "conv1=17", "conv1=x"])
def test_levels_of_layers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="layer_levels"):
        Recipe(layer_levels=text)


def test_levels_of_layers_are_those_of_the_network(tmp_path: Path) -> None:
    trainer = Trainer(replace(SMALL, layer_levels="conv1=8 fc3=5", num_levels=2), tmp_path)
    net = trainer.run(False, silent)
    assert [layer.num_levels for layer in net.modules() if hasattr(layer, "num_levels")] == [8, 2, 2, 2, 5]
    with pytest.raises(ValueError, match="layer_levels names conv9, which is no layer of lenet5"):
        Trainer(replace(SMALL, layer_levels="conv9=8"), tmp_path / "other")
