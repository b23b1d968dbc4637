"""autocast and label_smoothing of a recipe: where they act, and what stays float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bqnn.cli import main as cli
from bqnn.lab.folder import METRICS
from bqnn.lab.precision import autocast
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer

SMALL = Recipe(pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=1260, batch_size=60)


def silent(line: str) -> None:
    pass


def outputs_of(trainer: Trainer) -> set[tuple[bool, torch.dtype]]:
    """Whether the last layer was training, and the dtype of its output, of every pass of a run."""
    seen: set[tuple[bool, torch.dtype]] = set()
    trainer.net.fc3.register_forward_hook(lambda layer, _, y: seen.add((layer.training, y.dtype)))
    trainer.run(progress=False, log=silent)
    return seen


def test_without_autocast_all_is_float32(tmp_path: Path) -> None:
    assert outputs_of(Trainer(SMALL, tmp_path)) == {(True, torch.float32), (False, torch.float32)}


@pytest.mark.parametrize("estimator", ["moment", "sample"])
def test_autocast_computes_in_bfloat16_and_keeps_float32(estimator: str, tmp_path: Path) -> None:
    trainer = Trainer(replace(SMALL, autocast="bfloat16", estimator=estimator), tmp_path)
    assert outputs_of(trainer) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    kept = [*trainer.net.parameters(), *(p.grad for p in trainer.net.parameters()), *trainer.net.buffers()]
    moments = [m for state in trainer.optimizer.state.values() for m in state.values()]
    assert {tensor.dtype for tensor in (*kept, *moments) if tensor.is_floating_point()} == {torch.float32}
    assert all(record["validation_nll"] < 2.4 for record in trainer.history)


def test_eval_of_a_run_computes_in_the_dtype_of_its_training(tmp_path: Path) -> None:
    trainer = Trainer(replace(SMALL, autocast="bfloat16"), tmp_path)
    trainer.run(progress=False, log=silent)
    assert cli.main(["eval", str(tmp_path), "--split", "validation"]) == 0
    scores = json.loads((tmp_path / METRICS).read_text())["validation"]
    assert scores["nll"] == trainer.history[-1]["validation_nll"]


def test_a_device_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with autocast(replace(SMALL, autocast="bfloat16"), "cuda"):
        assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
    with autocast(replace(SMALL, autocast="bfloat16"), "cpu"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16


@pytest.mark.parametrize("method", ["fpnn", "bayes"])
def test_label_smoothing_mixes_the_mean_over_classes_into_the_training_loss(method: str, tmp_path: Path) -> None:
    """The smoothed loss is linear in the share; with next to no learning rate the logits are the same for all."""

    def first_epoch(share: float) -> dict[str, Any]:
        recipe = replace(SMALL, method=method, lr=1e-12, deterministic_lr=1e-12, bayes_lr=1e-12, label_smoothing=share)
        trainer = Trainer(recipe, tmp_path / str(share))
        trainer.run(progress=False, log=silent)
        return trainer.history[1]

    none, quarter, half = map(first_epoch, (0.0, 0.25, 0.5))
    assert half["nll"] != pytest.approx(none["nll"], rel=1e-2)
    assert quarter["nll"] == pytest.approx((none["nll"] + half["nll"]) / 2, rel=1e-5)
    assert half["validation_nll"] == pytest.approx(none["validation_nll"], rel=1e-4), "tests are not smoothed"


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_bad_label_smoothing_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing must be at least 0 and less than 1, got {value}"):
        replace(SMALL, label_smoothing=value)
