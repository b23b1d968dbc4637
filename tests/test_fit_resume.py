"""fit with a checkpoint: stopped after any epoch, it ends with the bits of a training that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn
from bqnn.core.checkpoint import write_checkpoint

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
CLASSES = (X[:, 0] > 0).long()
EPOCHS = (2, 2, 2)
OPTIONS: dict[str, Any] = {"epochs": EPOCHS, "seed": 3}


def make_net(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))


def loader(target: Tensor = CLASSES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, target), 16, shuffle=True)


def stop_after(epochs: int) -> Callable[[str], None]:
    """What a kill between two epochs does, as a function for ``log``."""
    left = [epochs]

    def log(line: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return log


def without_seconds(result: bqnn.FitResult) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in result.history]


@pytest.mark.parametrize("converted", [False, True])
def test_stopped_after_any_epoch_it_ends_with_the_same_bits(tmp_path: Path, converted: bool) -> None:
    net, options = make_net(), OPTIONS
    if converted:
        net, options = bqnn.convert(net, 4, prior="mixture"), {**OPTIONS, "epochs": (0, 2, 2)}
    held = [(X, CLASSES)]
    whole = bqnn.fit(net, loader(), validation=held, **options)
    path = tmp_path / "fit.pt"
    total = sum(options["epochs"])
    for epoch in range(1, total):
        with pytest.raises(KeyboardInterrupt):
            bqnn.fit(net, loader(), validation=held, checkpoint=path, log=stop_after(1), **options)
        assert len(torch.load(path, weights_only=True)["history"]) == epoch
    for _ in range(2):  # the second time there is nothing left to train
        resumed = bqnn.fit(net, loader(), validation=held, checkpoint=path, **options)
        assert without_seconds(resumed) == without_seconds(whole)
        expected = whole.net.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.net.state_dict().items())


@pytest.mark.parametrize("epochs", [(2, 0, 0), (1, 2, 0)])
def test_the_bits_are_the_same_where_the_last_phases_have_no_epochs(tmp_path: Path, epochs: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"epochs": epochs, "seed": 3, "checkpoint": tmp_path / "fit.pt"}
    whole, again = (bqnn.fit(make_net(), loader(), **options).net.state_dict() for _ in range(2))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_regression_goes_on_with_its_noise(tmp_path: Path) -> None:
    data, net = loader(X[:, :2] + 0.1), make_net()
    whole = bqnn.fit(net, data, task="regression", **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        bqnn.fit(net, data, task="regression", checkpoint=tmp_path / "fit.pt", log=stop_after(2), **OPTIONS)
    resumed = bqnn.fit(net, data, task="regression", checkpoint=tmp_path / "fit.pt", **OPTIONS)
    assert whole.noise_variance is not None and resumed.noise_variance is not None
    assert torch.equal(resumed.noise_variance, whole.noise_variance)
    assert without_seconds(resumed) == without_seconds(whole)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        bqnn.fit(make_net(), loader(), checkpoint=tmp_path / "fit.pt", log=stop_after(2), **OPTIONS)
    return tmp_path / "fit.pt"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lr": 0.1}, r"is of another call: pretrain epochs and rate was \[2, 0.004\], now \[2, 0.1\]"),
        ({"epochs": (2, 2, 3)}, r"bayes epochs and rate was \[2, 0.005\], now \[3, 0.005\]"),
        ({"dataset_size": 50}, "is of another call: samples was 48, now 50"),
        ({"kl_warmup": 0.5}, "is of another call: kl_warmup was 1.0, now 0.5"),
        ({"net": make_net(width=9)}, "is of another network: .*size mismatch"),
        ({"seed": 4}, "is of another call: seed was 3, now 4"),
        ({"prior": "mixture"}, "is of another call: prior was None, now mixture"),
    ],
)
def test_what_resumes_has_to_be_the_same_call(path: Path, changes: dict[str, Any], error: str) -> None:
    arguments = {"net": make_net(), "train": loader(), "checkpoint": path, **OPTIONS, **changes}
    with pytest.raises(ValueError, match=f"{path} .*{error}|{path} {error}"):
        bqnn.fit(**arguments)


def test_damaged_checkpoints_are_one_line(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=f"{path} is damaged, or no checkpoint that bqnn.fit wrote"):
        bqnn.fit(make_net(), loader(), checkpoint=path, **OPTIONS)
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    write_checkpoint(path, {**state, "history": state["history"] * 9})
    with pytest.raises(ValueError, match=f"{path} must have from 1 to 6 epochs, got 18"):
        bqnn.fit(make_net(), loader(), checkpoint=path, **OPTIONS)
    write_checkpoint(path, {**state, "optimizer": {}})
    with pytest.raises(ValueError, match=f"{path} is of another network"):
        bqnn.fit(make_net(), loader(), checkpoint=path, **OPTIONS)


def short_moment(optimizer: dict[str, Any]) -> None:
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)


def no_moment(optimizer: dict[str, Any]) -> None:
    del optimizer["state"][0]["step"]


def moment_of_nothing(optimizer: dict[str, Any]) -> None:
    optimizer["state"][99] = optimizer["state"].pop(0)


def other_rule(optimizer: dict[str, Any]) -> None:
    optimizer["param_groups"][0]["betas"] = (0.9, "much")


@pytest.mark.parametrize("change", [short_moment, no_moment, moment_of_nothing, other_rule])
def test_an_optimizer_of_something_else_is_refused(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state["optimizer"])
    write_checkpoint(path, state)
    with pytest.raises(ValueError, match=f"{path} is of another network: the optimizer has "):
        bqnn.fit(make_net(), loader(), checkpoint=path, **OPTIONS)


@pytest.mark.parametrize("changes", [{"step": 5}, {"last_epoch": 10**9}, {"_last_lr": ["fast"]}, {"total_steps": 7}])
def test_another_schedule_is_refused(path: Path, changes: dict[str, Any]) -> None:
    state = torch.load(path, weights_only=True)
    write_checkpoint(path, {**state, "scheduler": {**state["scheduler"], **changes}})
    with pytest.raises(ValueError, match=f"{path} is of another network: the schedule "):
        bqnn.fit(make_net(), loader(), checkpoint=path, **OPTIONS)
