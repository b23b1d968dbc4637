"""Checkpoints: altered ones are refused in one line, or resume to the same bits."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.core import checkpoint
from bqnn.core.checkpoint import DIGEST_BYTES, digest_of, write_checkpoint
from bqnn.lab import runs
from bqnn.lab.checkpoint import FIELDS, read_checkpoint
from bqnn.lab.folder import CHECKPOINT, METRICS, WEIGHTS
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer

SMALL = Recipe(pretrain_epochs=1, deterministic_epochs=2, epochs=1, batch_size=64, validation=1260)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checkpoint after the second epoch of a run holds."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(SMALL, folder)

    def stop(line: str) -> None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False, log=stop)
    return read_checkpoint(folder / CHECKPOINT)


@pytest.fixture
def path(state: dict[str, Any], tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / CHECKPOINT, state)
    return tmp_path / CHECKPOINT


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_a_checkpoint_comes_back_and_torch_reads_it_too(path: Path, state: dict[str, Any]) -> None:
    assert set(state) == set(FIELDS)
    assert same(read_checkpoint(path), state)
    assert same(torch.load(path, weights_only=True), state)
    assert zipfile.ZipFile(path).testzip() is None
    assert digest_of(path) == path.read_bytes()[-DIGEST_BYTES:]
    assert digest_of(path.with_name("none")) is None


def altered(draw: random.Random, blob: bytes) -> bytes:
    place = draw.randrange(len(blob))
    return draw.choice(
        [
            lambda: blob[:place] + bytes([blob[place] ^ 1 << draw.randrange(8)]) + blob[place + 1 :],
            lambda: blob[:place],
            lambda: blob + draw.randbytes(draw.randrange(1, 100)),
            lambda: blob[:place] + draw.randbytes(draw.randrange(1, 100)) + blob[place:],
            lambda: draw.randbytes(place % 3000),
            lambda: b"no checkpoint\n" * draw.randrange(100),
        ]
    )()


def test_500_altered_checkpoints(path: Path) -> None:
    blob, draw = path.read_bytes(), random.Random(7)
    for _ in range(500):
        changed = altered(draw, blob)
        assert changed != blob
        path.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def signed(blob: bytes) -> bytes:
    """An archive with a right digest at its end."""
    body = blob[:-2] + checkpoint.COMMENT_BYTES.to_bytes(2, "little") + checkpoint.LABEL
    return body + hashlib.sha256(body).hexdigest().encode()


def archive_of(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bomb() -> bytes:
    """An archive of a few kilobytes whose record says, and is, a gigabyte of zeros."""
    tensor, buffer = torch.zeros(1 << 20), io.BytesIO()
    small = zipfile.ZipFile(io.BytesIO(archive_of({"net": tensor})))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in small.namelist():
            archive.writestr(name, bytes(4 << 20) if name.endswith("data/0") else small.read(name))
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    "blob, message",
    [
        pytest.param(b"", "digest differs", id="empty"),
        pytest.param(b"x" * 5, "digest differs", id="short"),
        pytest.param(pickle.dumps({"epoch": 1}), "digest differs", id="pickle"),
        pytest.param(archive_of({"epoch": 1}), "digest differs", id="of-torch.save"),
        pytest.param(signed(b"text" * 99), "is no checkpoint", id="signed-text"),
        pytest.param(signed(archive_of([1, 2])), "must hold a dict, got list", id="signed-list"),
        pytest.param(signed(archive_of({"recipe": {}})), "must have the field 'init'", id="signed-fields"),
        pytest.param(signed(archive_of({"recipe": Evil()})), "is no checkpoint", id="signed-code"),
        pytest.param(signed(bomb()), "claims to hold more than its size", id="signed-bomb"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, blob: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / CHECKPOINT
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1500
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_or_of_another_type(path: Path, state: dict[str, Any], name: str) -> None:
    for value in (None, "text", [], 1.5):
        wrong = {**state, name: value}
        if value is None:
            del wrong[name]
        if isinstance(value, FIELDS[name]):
            continue
        write_checkpoint(path, wrong)
        with pytest.raises(ValueError, match=f"field '{name}'|{name} must be of type"):
            read_checkpoint(path)


def wrong_shape(state: dict[str, Any]) -> Any:
    moments = state["optimizer"]["state"][0]
    return {**state["optimizer"], "state": {**state["optimizer"]["state"], 0: {**moments, "exp_avg": torch.ones(3)}}}


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda s: {"epoch": 99}, "epoch must be that of the history, 2 of 4, got 99", id="epoch-ahead"),
        pytest.param(lambda s: {"epoch": 10**15}, "epoch must be that of", id="epoch-huge"),
        pytest.param(lambda s: {"epoch": 1}, "epoch must be that of the history, 2 of 4, got 1", id="epoch-behind"),
        pytest.param(lambda s: {"epoch": -1, "history": []}, "epoch must be that of", id="epoch-negative"),
        pytest.param(lambda s: {"history": s["history"][:1]}, "epoch must be that of", id="history-short"),
        pytest.param(lambda s: {"history": s["history"][::-1]}, "epoch must be that of", id="history-order"),
        pytest.param(lambda s: {"history": [{"epoch": 1}, {"epoch": 2}]}, "history must hold records", id="records"),
        pytest.param(lambda s: {"history": [1, 2]}, "history must hold records", id="numbers"),
        pytest.param(lambda s: {"init": True}, "epoch must be that of the history, 3 of 4, got 2", id="init"),
        pytest.param(lambda s: {"recipe": {}}, "of another recipe", id="recipe-empty"),
        pytest.param(lambda s: {"recipe": {**s["recipe"], "seed": 5}}, "seed was 5, now 0", id="recipe-seed"),
        pytest.param(lambda s: {"net": {}}, "is not of this run", id="net-empty"),
        pytest.param(
            lambda s: {"net": {**s["net"], "fc3.bias": torch.zeros(11)}}, "is not of this run.*fc3.bias", id="net-shape"
        ),
        pytest.param(lambda s: {"optimizer": {}}, "is not of this run", id="optimizer-empty"),
        pytest.param(
            lambda s: {"optimizer": wrong_shape(s)},
            "the optimizer has other moments than those of",
            id="optimizer-shape",
        ),
        pytest.param(lambda s: {"scheduler": {"optimizer": 1}}, "the schedule is another one", id="scheduler"),
        pytest.param(lambda s: {"generator": torch.zeros(3)}, "is not of this run", id="generator"),
        pytest.param(lambda s: {"torch_generator": torch.zeros(3, dtype=torch.uint8)}, "not of this", id="state"),
    ],
)
def test_a_whole_checkpoint_of_something_else(path: Path, state: dict[str, Any], change: Any, message: str) -> None:
    write_checkpoint(path, {**state, **change(state)})
    trainer = Trainer(SMALL, path.parent)
    with pytest.raises(ValueError, match=message) as error:
        trainer.resume(silent)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert trainer.resumed_from is None


def test_metrics_that_are_missing_are_made_again(path: Path) -> None:
    assert runs.stored_recipe(path.parent) == SMALL
    trainer = Trainer(SMALL, path.parent)
    assert trainer.resume(silent) and trainer.epoch == 2
    trainer.run(progress=False, log=silent)
    assert len(runs.load_run(path.parent).history) == 4


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", "[" * 100_000, '{"recipe": null, "history": []}', '{"recipe": {}, "history": null}', "NaN"]
    + ['{"recipe": {"lr": "x"}, "history": []}', '{"recipe": {"epochs": true}, "history": []}', "\x00\xff"]
    + ['{"recipe": {}, "history": [1]}', '{"recipe": {}, "history": [], "test": 3}']
    + ['{"recipe": {}, "history": [], "test": {}}', '{"recipe": {}, "history": [], "test": {"error": "x"}}'],
    ids=lambda text: text[:40] or "empty",
)
def test_damaged_metrics_are_one_line(path: Path, text: str) -> None:
    metrics = path.parent / METRICS
    metrics.write_bytes(text.encode("latin-1"))
    for read in (lambda: runs.load_run(path.parent), lambda: Trainer(SMALL, path.parent).resume(silent)):
        with pytest.raises(ValueError, match=f"{metrics} is not what bqnn train writes") as error:
            read()
        assert "\n" not in str(error.value)


def test_metrics_of_another_run_are_refused(path: Path, state: dict[str, Any]) -> None:
    other = {**state["recipe"], "seed": 9}
    (path.parent / METRICS).write_text(json.dumps({"recipe": other, "history": []}))
    with pytest.raises(ValueError, match=f"{METRICS} is of another recipe: seed was 9, now 0"):
        Trainer(SMALL, path.parent).resume(silent)


def test_another_number_of_threads_is_said(path: Path, state: dict[str, Any]) -> None:
    lines: list[str] = []
    assert Trainer(SMALL, path.parent).resume(lines.append)
    assert lines == []
    threads = torch.get_num_threads()
    write_checkpoint(path, {**state, "threads": threads + 3})
    assert Trainer(SMALL, path.parent).resume(lines.append)
    assert len(lines) == 1 and f"{threads + 3} threads, now there are {threads}" in lines[0]


def test_a_run_that_another_has_taken_further_is_not_written(path: Path, state: dict[str, Any]) -> None:
    trainer = Trainer(SMALL, path.parent)
    assert trainer.resume(silent)
    write_checkpoint(path, {**state, "threads": 99})
    before = path.read_bytes()
    with pytest.raises(OSError, match="has been replaced since this run read it"):
        trainer.run(progress=False, log=silent)
    assert path.read_bytes() == before and not (path.parent / WEIGHTS).exists()


FULL = """
import resource, sys
from pathlib import Path
from bqnn.core.checkpoint import write_checkpoint
from bqnn.lab.checkpoint import read_checkpoint
path = Path(sys.argv[1])
state = read_checkpoint(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    write_checkpoint(path, state)
except OSError as error:
    print(error)
"""


def test_a_file_that_can_grow_no_further_is_one_line(path: Path) -> None:
    """The size limit of a process stands in for a full disk: torch.save raises the same RuntimeError."""
    assert path.stat().st_size > 40_000 and resource.RLIMIT_FSIZE is not None
    before = path.read_bytes()
    result = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True)
    assert result.stdout == f"[Errno 27] File too large: '{path}'\n"
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == [CHECKPOINT]


def test_recipe_of_a_checkpoint_that_can_not_be(path: Path, state: dict[str, Any]) -> None:
    write_checkpoint(path, {**state, "recipe": {**state["recipe"], "lr": -1.0}})
    with pytest.raises(ValueError, match=f"{path} is no checkpoint of a run: lr must be positive"):
        runs.stored_recipe(path.parent)
    write_checkpoint(path, {**state, "recipe": replace(SMALL, seed=3).__dict__})
    assert runs.stored_recipe(path.parent) == replace(SMALL, seed=3)
