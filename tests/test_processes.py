"""`torchrun -m bqnn train`: two processes train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bqnn.data.splits import leaves_one
from bqnn.lab.processes import ALONE, Processes, join
from bqnn.training.epoch import Means
from tests.support.processes import ROOT

# No BatchNorm, which has statistics of the images of one process; 1,024 images, so that both have as many in any step.
# In the last phase nothing moves: what two processes say of it must be what one says.
TRAIN = (
    *("train", "--model", "lenet5_caffe", "--image-size", "28", "--validation", "413", "--augment", "affine"),
    *("--pretrain-epochs", "1", "--deterministic-epochs", "2", "--lr", "1e-3", "--deterministic-lr", "1e-3"),
    *("--epochs", "1", "--bayes-lr", "1e-12"),
)


def train(folder: Path, processes: int, *arguments: str) -> str:
    """What a run of so many processes of one thread prints; fails where one of them does."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["bqnn", *TRAIN, "--out", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    weights, histories = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        assert train(folder, processes).count("epoch ") == 4  # the first process alone prints
        weights.append(load_file(folder / "model.safetensors"))
        histories.append(json.loads((folder / "metrics.json").read_text())["history"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=2e-4, msg=name)
    for mine, its in zip(*histories, strict=True):
        noise = 0.1 if mine["phase"] == "bayes" else 1e-3  # each process draws its own
        assert mine["nll"] == pytest.approx(its["nll"], rel=noise)
        assert mine["kl"] == pytest.approx(its["kl"], rel=1e-3)
    assert histories[0][-1]["phase"] == "bayes" and histories[0][-1]["kl"] > 0
    assert histories[0][0]["validation_error"] == pytest.approx(histories[1][0]["validation_error"], abs=0.5)


def test_two_processes_train_an_ensemble_and_go_on_with_it(tmp_path: Path) -> None:
    train(tmp_path / "run", 2, "--members", "2")
    first, second = (load_file(tmp_path / "run" / f"member-{index}" / "model.safetensors") for index in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "run" / "member-1" / "model.safetensors").unlink()
    train(tmp_path / "run", 2, "--members", "2", "--resume")
    again = load_file(tmp_path / "run" / "member-1" / "model.safetensors")
    assert all(torch.equal(again[name], second[name]) for name in second)


def test_each_process_has_its_own_noise_and_the_first_that_of_one_alone() -> None:
    drawn = []
    for processes in (ALONE, Processes(0, 2), Processes(1, 2), Processes(1, 2)):
        torch.manual_seed(3)
        processes.draw_own_noise(7, epoch=len(drawn) // 3)
        drawn.append(torch.randn(4))
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(each.tolist()) for each in drawn}) == 3  # another one in another epoch, too


def test_parts_of_a_batch_are_even_and_no_image_is_in_two() -> None:
    batch = torch.arange(11)
    parts = [Processes(rank, 3).part(batch).tolist() for rank in range(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert ALONE.part(batch).tolist() == batch.tolist()


@pytest.mark.parametrize(
    ("size", "rest", "drops"), [(1, 0, False), (1, 1, True), (1, 2, False), (4, 7, True), (4, 8, False), (4, 0, False)]
)
def test_a_last_batch_of_too_few_images_is_left_out(size: int, rest: int, drops: bool) -> None:
    assert leaves_one(640 + rest, 64, size) == drops


def test_a_batch_that_can_not_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 128"):
        Processes(0, 3).check_batch_size(128)


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # of somebody else's launcher
    assert join("cpu") is ALONE
    means = Means(1.0, 2.0, 3.0)
    assert ALONE.mean(means) is means and ALONE.from_leader(5) == 5 and ALONE.leads
