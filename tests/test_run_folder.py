"""The folder of a run: its lock, its weights, and what is read of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bqnn.cli import main as cli
from bqnn.lab import runs
from bqnn.lab.folder import LOCK, METADATA, METRICS, WEIGHTS, RunLock, check_history, read_recipe
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer
from tests.support.mutations import MEGABYTES, peak_megabytes

SMALL = Recipe(pretrain_epochs=1, deterministic_epochs=0, epochs=1, batch_size=64, validation=1260)
HOLD = """
import sys
from bqnn.lab.folder import RunLock
lock = RunLock(sys.argv[1])
with lock:
    print(1, flush=True)
    sys.stdin.read()  # until the pipe is closed
"""


def silent(line: str) -> None:
    pass


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, alive, that writes the run in ``tmp_path``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        yield process
        process.kill()


def test_a_lock_leaves_nothing_and_may_be_entered_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new" / "run")
    with lock:
        with lock:
            assert (lock.folder / LOCK).exists()
        with pytest.raises(OSError, match="in use"), RunLock(lock.folder):
            pass
        assert (lock.folder / LOCK).exists()
    assert list(lock.folder.iterdir()) == []
    with RunLock(lock.folder):
        pass


def test_a_run_that_another_process_writes_is_left_alone(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match=f"{tmp_path} is in use: another process is writing this run"):
        Trainer(SMALL, tmp_path).run(progress=False, log=silent)
    for option in ("--resume", "--force", "--quiet"):
        assert cli.main(["train", "--out", str(tmp_path), "--validation", "1260", option]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"bqnn: error: {tmp_path} is in use: another process is writing this run\n"
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_scores_wait_for_nobody_and_are_not_lost(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    text = json.dumps({"recipe": asdict(SMALL), "history": []})
    (tmp_path / METRICS).write_text(text)
    run = runs.load_run(tmp_path)
    with pytest.raises(OSError, match="in use"):
        runs.add_scores(run, "test", {"error": 1.0})
    assert (tmp_path / METRICS).read_text() == text
    holder.kill()
    holder.wait()
    runs.add_scores(run, "validation", {"error": 2.0})
    found = runs.add_scores(run, "test", {"error": 1.0})
    assert found.scores == runs.load_run(tmp_path).scores == {"validation": {"error": 2.0}, "test": {"error": 1.0}}


def test_a_dead_process_holds_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists(), "what it left behind"
    Trainer(replace(SMALL, pretrain_epochs=0, epochs=0), tmp_path).run(progress=False, log=silent)
    assert not (tmp_path / LOCK).exists()


def test_of_many_at_once_one_is_inside(tmp_path: Path) -> None:
    inside, most = [0], [0]
    guard, refused = threading.Lock(), threading.Event()

    def enter() -> None:
        entered = 0
        while entered < 10:
            try:
                with RunLock(tmp_path):
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.0005)
                    with guard:
                        inside[0] -= 1
                    entered += 1
            except OSError:
                refused.set()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    with RunLock(tmp_path):
        for thread in threads:
            thread.start()
        refused.wait()
    for thread in threads:
        thread.join()
    assert most[0] == 1


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    Trainer(replace(SMALL, pretrain_epochs=0, epochs=0), tmp_path).run(progress=False, log=silent)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """Changes tensors and metadata of a run's weights."""
    from safetensors import safe_open

    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, {METADATA: json.dumps(metadata)})


def test_weights_that_claim_a_large_network_cost_nothing(finished: Path) -> None:
    sizes = {"in_channels": 65_000, "num_classes": 65_000, "image_size": 60_000}
    rewrite(finished, lambda tensors, metadata: metadata.update(factory=["lenet5", sizes]))
    before, started = peak_megabytes(), time.process_time()
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit its recipe: tensor .* must have the shape"):
        runs.load_network(runs.load_run(finished))
    assert peak_megabytes() - before < MEGABYTES and time.process_time() - started < 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors, metadata: tensors.pop("fc3.bias"), "does not fit its recipe: tensor 'fc3.bias'"),
        (lambda tensors, metadata: tensors.update(more=torch.ones(1)), "does not fit its recipe: tensor 'more'"),
        (lambda tensors, metadata: tensors.update({"fc3.bias": torch.ones(11)}), "'fc3.bias' must have the shape"),
        (lambda tensors, metadata: metadata.update(factory=None), "is not what bqnn train writes"),
        (lambda tensors, metadata: metadata.update(factory=["lenet5", 3]), "does not fit its recipe: factory"),
        (lambda tensors, metadata: metadata.update(factory=["vgg7", {}]), "is of another recipe"),
        (lambda tensors, metadata: metadata.update(recipe=[]), "is of another recipe"),
        (lambda tensors, metadata: metadata.clear(), "is not what bqnn train writes"),
    ],
    ids=["missing", "more", "shape", "no-factory", "arguments", "other-network", "recipe", "nothing"],
)
def test_weights_of_something_else_are_one_line(finished: Path, change: Any, message: str) -> None:
    rewrite(finished, change)
    with pytest.raises(ValueError, match=f"{WEIGHTS} {message}|{WEIGHTS}.*{message}") as error:
        runs.load_network(runs.load_run(finished))
    assert "\n" not in str(error.value)


def test_weights_are_read_as_they_are(finished: Path) -> None:
    net = runs.load_network(runs.load_run(finished))
    stored = {name: tensor.clone() for name, tensor in load_file(finished / WEIGHTS).items()}
    state = net.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    assert all(parameter.requires_grad for parameter in net.parameters()) and not net.training
    (finished / WEIGHTS).write_bytes(bytes((finished / WEIGHTS).stat().st_size))
    assert all(torch.equal(state[name], stored[name]) for name in stored), "not a view of the file"


@pytest.mark.parametrize("value", [True, "3", 3.0, None, [3]])
def test_a_recipe_s_types_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="num_levels of the recipe must be int"):
        read_recipe({"num_levels": value})
    with pytest.raises(ValueError, match="unknown field 'levels'"):
        read_recipe({"levels": 3})
    assert read_recipe({"lr": 1, "image_size": None}) == replace(Recipe(), lr=1)
    assert read_recipe(asdict(SMALL)) == SMALL


def test_a_run_says_how_many_images_it_had(finished: Path) -> None:
    run = runs.load_run(finished)
    sizes = {"train": 1437 - SMALL.validation, "validation": SMALL.validation, "test": 360}
    assert run.images == sizes
    assert runs.load_run(runs.add_scores(run, "test", {"error": 1.0}).folder).images == sizes
    stored = json.loads((finished / METRICS).read_text())
    del stored["images"]
    (finished / METRICS).write_text(json.dumps(stored))
    assert runs.load_run(finished).images == {}, "of a run that is older"


@pytest.mark.parametrize(
    "images", [3, None, [], {"train": 3}, {"train": 1, "validation": 1, "test": 1.5}]
    + [{"train": 1, "validation": 1, "test": count} for count in (-1, True, "3", 2**53 + 1)],
)  # fmt: skip
def test_numbers_of_images_are_checked(images: Any, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps({"recipe": asdict(SMALL), "history": [], "images": images}))
    with pytest.raises(ValueError, match=f"{METRICS} is not what bqnn train writes: images"):
        runs.load_run(tmp_path)


def test_the_records_of_training_are_those_that_are_asked_for(tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tmp_path)
    trainer.run(progress=False, log=silent)
    assert check_history(trainer.history) == runs.load_run(tmp_path).history
    for name in trainer.history[0]:
        wrong = [{**trainer.history[0], name: "x" if name != "phase" else 3}]
        with pytest.raises(ValueError, match=f"{name} of a record"):
            check_history(wrong)
