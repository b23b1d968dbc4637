"""The command against what it is given: batches of one image, names that a terminal obeys, messages without an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bqnn
from bqnn.cli import main as cli
from bqnn.core.checkpoint import write_checkpoint
from bqnn.data.splits import Split, Splits, leaves_one
from bqnn.engine.pack import pack
from bqnn.files import network
from bqnn.lab.checkpoint import read_checkpoint
from bqnn.lab.evaluate import statistics_batches
from bqnn.lab.folder import CHECKPOINT, METRICS, WEIGHTS
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer

SHORT = ["--pretrain-epochs", "1", "--deterministic-epochs", "1", "--epochs", "1"]


def splits(count: int) -> Splits:
    """A data set of ``count`` training images of noise and no others."""
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    empty = Split(images[:0], labels[:0])
    return Splits("noise", Split(images, labels), empty, empty, tuple("0123456789"), 1, 8, (0.5,), (0.3,))


@pytest.mark.parametrize(
    "model, count", [("lenet5", 2), ("lenet5", 3), ("lenet5", 501), ("lenet5", 513), ("lenet5", 1001), ("resnet20", 3)]
)
def test_no_number_of_images_leaves_one_to_batchnorm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, model: str
) -> None:
    monkeypatch.setattr("bqnn.lab.train.load_dataset", lambda *args, **options: splits(count))
    recipe = Recipe(model=model, pretrain_epochs=1, deterministic_epochs=0, epochs=1, batch_size=512)
    trainer = Trainer(recipe, tmp_path)
    sizes = [len(x) for x in statistics_batches(trainer.data, 0, trainer.device)]
    assert min(sizes) > 1 and sum(sizes) >= count - 1
    trainer.run(progress=False, log=lambda line: None)
    assert (tmp_path / WEIGHTS).exists()


def test_which_batches_are_of_one_image() -> None:
    assert [leaves_one(count, 4) for count in range(1, 7)] == [True, False, False, False, True, False]
    assert not leaves_one(3, 1), "with batches of one, there would be none left"


@pytest.mark.parametrize(
    "count, batch_size, message",
    [(1, 8, "dataset must have at least 2 images to train on, got 1"), (9, 1, "batch_size must be at least 2")],
)
def test_training_on_single_images_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, batch_size: int, message: str
) -> None:
    monkeypatch.setattr("bqnn.lab.train.load_dataset", lambda *args, **options: splits(count))
    with pytest.raises(ValueError, match=message):
        Trainer(Recipe(batch_size=batch_size), tmp_path)


class Named(nn.Module):
    """A network whose layers have names that a terminal would obey, and one that is long."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"\x1b[2J\x1b]0;owned\x07": nn.Linear(2, 2), "x" * 5000: nn.Linear(2, 2)})


def test_info_prints_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network.save(pack(bqnn.convert(Named())), tmp_path / "net")
    assert cli.main(["info", str(tmp_path / "net")]) == 0
    out = capsys.readouterr().out
    assert all(each.isprintable() for each in out.replace("\n", ""))
    assert "\\x1b[2J\\x1b]0;owned\\x07" in out
    assert max(map(len, out.splitlines())) < 250


@pytest.mark.parametrize("text", ["\x1b[2Jx", "a" * 10**6, ""], ids=["escapes", "long", "empty"])
def test_an_error_is_one_short_line_that_prints(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> None:
        raise ValueError(text)

    monkeypatch.setattr(network, "info", fail)
    assert cli.main(["info", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and len(err) < 1100 and err[:-1].isprintable() and len(err) > len("bqnn: error: \n")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted after its second epoch."""
    whole_epoch = Trainer._run_epoch

    def stop_in_third(self: Trainer, progress: bool) -> dict[str, Any]:
        if self.epoch == 2:
            raise KeyboardInterrupt
        return whole_epoch(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_epoch", stop_in_third)
        assert cli.main(["train", "--out", str(tmp_path), "--quiet", "--validation", "1260", *SHORT]) == 130
    return tmp_path


def test_resume_without_metrics_takes_the_recipe_of_the_checkpoint(stopped: Path) -> None:
    (stopped / METRICS).unlink()
    assert cli.main(["train", "--out", str(stopped), "--resume", "--quiet"]) == 0
    recipe = json.loads((stopped / METRICS).read_text())["recipe"]
    assert (recipe["validation"], recipe["epochs"]) == (1260, 1)


def test_resume_with_other_threads_says_that_bytes_differ(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = read_checkpoint(stopped / CHECKPOINT)
    write_checkpoint(stopped / CHECKPOINT, {**state, "threads": 64})
    capsys.readouterr()
    assert cli.main(["train", "--out", str(stopped), "--resume"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "was written with 64 threads" in lines[0] and lines[0].endswith("the bytes will differ")
    assert len(lines) == 3, "the line, the epoch, and where the weights are"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_resume_of_a_damaged_checkpoint_is_one_line(
    stopped: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / CHECKPOINT
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 4
    path.write_bytes({"flip": bytes(blob), "cut": bytes(blob[:999]), "empty": b"", "text": b"text"}[damage])
    capsys.readouterr()
    assert cli.main(["train", "--out", str(stopped), "--resume", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"bqnn: error: {path} is damaged")
    assert not (stopped / WEIGHTS).exists()
