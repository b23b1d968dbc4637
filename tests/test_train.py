"""Trainer: the same bits from the same seed, whether or not the run was killed on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.layers import bayes_layers
from bqnn.cli import main as cli
from bqnn.cli.commands import has_run
from bqnn.data.splits import Split, load_dataset
from bqnn.lab import runs
from bqnn.lab.evaluate import evaluate
from bqnn.lab.folder import CHECKPOINT, METRICS, WEIGHTS
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer
from bqnn.training.phases import BAYES

# There are 177 training images, so three steps an epoch.
SMALL = Recipe(pretrain_epochs=2, deterministic_epochs=1, epochs=2, batch_size=64, validation=1260, kl_warmup=1.0)
NO_EPOCHS = {"pretrain_epochs": 0, "deterministic_epochs": 0, "epochs": 0}
KILLS = 10


def silent(line: str) -> None:
    pass


def train(recipe: Recipe, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(recipe, folder, **options)
    trainer.run(progress=False, log=silent)
    return trainer


def history(folder: Path) -> list[dict[str, Any]]:
    """The history of a run without its times, which differ from run to run."""
    records = json.loads((folder / METRICS).read_text())["history"]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported what a run needs, so that a kill falls into the run itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bqnn.cli", "sklearn.datasets", "torch._dynamo"])
    return context


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"estimator": "moment", "partition": "learned"}, id="moment-learned"),
        pytest.param({"estimator": "sample", "granularity": "channel"}, id="sample-channel"),
        pytest.param({"estimator": "local", "prior": "gaussian"}, id="local-gaussian"),
        pytest.param({"estimator": "sample", "prior": "mixture", "spike_width": 0.4}, id="sample-mixture"),
        pytest.param({"estimator": "deterministic"}, id="deterministic"),
        pytest.param({"method": "fpnn", "augment": "affine", "weight_decay": 0.01}, id="fpnn-affine"),
        pytest.param({"augment": "flip-crop-cutout", "autocast": "bfloat16", "label_smoothing": 0.2}, id="bfloat16"),
    ],
)
def test_same_seed_same_bits_and_resumed_anywhere_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = replace(SMALL, **changes)
    train(recipe, tmp_path / "first")
    train(recipe, tmp_path / "second")
    for epoch in range(1, 5):
        stopped = Trainer(recipe, tmp_path / "stopped")
        assert stopped.resume() == (epoch > 1)
        assert stopped.epoch == epoch - 1
        with pytest.raises(KeyboardInterrupt):
            stopped.run(progress=False, log=interrupt)
    resumed = Trainer(recipe, tmp_path / "stopped")
    assert resumed.resume()
    resumed.run(progress=False, log=silent)
    weights = (tmp_path / "first" / WEIGHTS).read_bytes()
    for name in ("second", "stopped"):
        assert (tmp_path / name / WEIGHTS).read_bytes() == weights, name
        assert history(tmp_path / name) == history(tmp_path / "first"), name


def interrupt(line: str) -> None:
    """What Ctrl-C does just after an epoch."""
    raise KeyboardInterrupt


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    recipe = replace(SMALL, epochs=0, deterministic_epochs=0, pretrain_epochs=1, method="fpnn")
    train(recipe, tmp_path / "0")
    train(replace(recipe, seed=1), tmp_path / "1")
    first, second = (load_file(tmp_path / name / WEIGHTS)["fc1.weight"] for name in "01")
    assert not torch.equal(first, second)


def train_for(seconds: float, arguments: list[str], used: Any) -> None:
    """Runs the command until it has used so many seconds of CPU time, 0 for no end, and says how many it took.

    Time on the clock would be no share of a run: another process may have the processor for most of it. At its end the
    system sends SIGPROF, which nothing catches, so that the process ends within an instruction, as a kill ends it.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    status = cli.main(arguments)
    used.value = time.process_time()
    sys.exit(status)


def test_killed_at_ten_random_moments_a_run_ends_with_the_same_bits(tmp_path: Path, processes: Any) -> None:
    recipe = ["--pretrain-epochs", "4", "--deterministic-epochs", "3", "--epochs", "4", "--kl-warmup", "2"]
    recipe += ["--batch-size", "64", "--validation", "1260", "--threads", "1"]

    used = processes.Value("d")

    def run(folder: Path, *options: str, seconds: float = 0.0) -> int:
        arguments = ["train", "--out", str(folder), "--quiet", *recipe, *options]
        process = processes.Process(target=train_for, args=(seconds, arguments, used))
        process.start()
        process.join()
        return process.exitcode

    run(tmp_path / "warm-up")
    assert run(tmp_path / "whole") == 0
    whole = used.value

    moments = random.Random(2023)
    killed = 0
    for number in range(KILLS):
        folder, moment = tmp_path / str(number), moments.random()
        killed += run(folder, seconds=moment * whole) == -signal.SIGPROF
        where = f"kill {number}, {moment:.2f} of the way"
        # A kill may come before the run begins.
        assert run(folder, *(["--resume"] if has_run(folder) else [])) == 0, where
        assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes(), where
        assert history(folder) == history(tmp_path / "whole"), where
        assert sorted(path.name for path in folder.iterdir()) == [CHECKPOINT, METRICS, WEIGHTS], where
    assert killed > KILLS // 2, "most kills have to meet a run that is still on its way"


def die_in_second_checkpoint(folder: Path) -> None:
    """Ends the process, as a kill does, half-way through the write of the second epoch's checkpoint."""
    whole_save = torch.save

    def save(state: dict[str, Any], path: str) -> None:
        whole_save(state, path)
        if state["epoch"] == 2:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os._exit(9)

    torch.save = save
    train(SMALL, folder)


def test_death_in_the_middle_of_a_checkpoint_leaves_a_whole_one(tmp_path: Path, processes: Any) -> None:
    folder = tmp_path / "run"
    process = processes.Process(target=die_in_second_checkpoint, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 9
    leftovers = [path for path in folder.iterdir() if path.name.startswith(f".{CHECKPOINT}.")]
    assert len(leftovers) == 1
    trainer = Trainer(SMALL, folder)
    assert trainer.resume()
    assert trainer.epoch == 1
    trainer.run(progress=False, log=silent)
    assert not leftovers[0].exists()
    assert (folder / WEIGHTS).exists()


def test_an_error_in_a_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train(replace(SMALL, deterministic_epochs=0, epochs=0), tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def fail(state: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        trainer.save_checkpoint()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, METRICS, WEIGHTS]


def test_resume_without_a_checkpoint_is_a_beginning(tmp_path: Path) -> None:
    assert not Trainer(SMALL, tmp_path / "none").resume()


@pytest.mark.parametrize("name, value", [("seed", 1), ("lr", 0.5), ("num_levels", 4), ("epochs", 3)])
def test_resume_with_another_recipe_names_what_differs(tmp_path: Path, name: str, value: float) -> None:
    recipe = replace(SMALL, **NO_EPOCHS)
    train(recipe, tmp_path)
    trainer = Trainer(replace(recipe, **{name: value}), tmp_path)
    with pytest.raises(ValueError, match=f"{name} was {getattr(recipe, name)!r}, now {value!r}"):
        trainer.resume()


def test_a_run_that_has_ended_resumes_to_the_same_files(tmp_path: Path) -> None:
    train(SMALL, tmp_path)
    path = tmp_path / METRICS
    path.write_text(json.dumps({**json.loads(path.read_text()), "test": {"error": 3.0}}))
    weights = (tmp_path / WEIGHTS).read_bytes()
    trainer = Trainer(SMALL, tmp_path)
    assert trainer.resume()
    trainer.run(progress=False, log=silent)
    assert (tmp_path / WEIGHTS).read_bytes() == weights
    assert json.loads(path.read_text())["test"] == {"error": 3.0}, "what eval has found stays"


@pytest.mark.parametrize(
    "changes, name",
    [
        pytest.param({"lr": 1e30}, "lr", id="full-precision"),
        pytest.param({"deterministic_lr": 1e30, "pretrain_epochs": 1}, "deterministic_lr", id="deterministic"),
        pytest.param({"bayes_lr": 1e30, "pretrain_epochs": 1, "deterministic_epochs": 0}, "bayes_lr", id="bayes"),
    ],
)
def test_a_loss_that_is_not_finite_raises(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    trainer = Trainer(replace(SMALL, **changes), tmp_path)
    with pytest.raises(FloatingPointError, match=f"epoch {1 + (name != 'lr')} .* smaller {name} "):
        trainer.run(progress=False, log=silent)
    assert not (tmp_path / WEIGHTS).exists()
    again = Trainer(trainer.recipe, tmp_path)
    assert again.resume()
    assert all(torch.isfinite(tensor).all() for tensor in again.net.state_dict().values())


def test_without_validation_images(tmp_path: Path) -> None:
    trainer = train(replace(SMALL, validation=0, pretrain_epochs=1, epochs=1, batch_size=512), tmp_path)
    assert len(trainer.data.validation) == 0
    assert len(trainer.history) == 3
    for record in trainer.history:
        assert (record["validation_error"], record["validation_nll"]) == (None, None)


def test_phases_and_records(tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = Trainer(SMALL, tmp_path)
    trainer.run(progress=False, log=lines.append)
    assert [record["phase"] for record in trainer.history] == ["full precision"] * 2 + ["deterministic"] + ["bayes"] * 2
    assert [record["epoch"] for record in trainer.history] == [1, 2, 3, 4, 5]
    assert [record["quantization_loss"] is None for record in trainer.history] == [True, True, False, False, False]
    assert [record["kl"] > 0 for record in trainer.history] == [False, False, False, True, True]
    assert [line.split()[:2] for line in lines] == [["epoch", f"{i}/5"] for i in range(1, 6)]
    assert "validation error" in lines[0] and "near a level" not in lines[0] and "near a level" in lines[2]
    assert not trainer.net.training
    last = trainer.history[-1]
    assert evaluate(trainer.net, trainer.data.validation, trainer.data).error == last["validation_error"]
    assert 0 < last["near_share"] < 1 and 0 < last["quantization_loss"] < 1


def test_phases_with_no_epochs_write_the_quantized_network(tmp_path: Path) -> None:
    trainer = train(replace(SMALL, **NO_EPOCHS), tmp_path)
    assert len(bayes_layers(trainer.net)) == 5
    assert "conv1.raw_levels" in load_file(tmp_path / WEIGHTS)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 21])
def test_any_number_of_steps_can_be_trained(tmp_path: Path, steps: int) -> None:
    trainer = Trainer(replace(SMALL, **NO_EPOCHS | {"pretrain_epochs": steps}, batch_size=177), tmp_path)
    assert trainer.steps_an_epoch == 1
    rates = []
    for _ in range(steps):
        rates.append(trainer.scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert all(0 < rate <= trainer.recipe.lr * (1 + 1e-9) for rate in rates)
    if steps > 2:
        assert max(rates) > 0.5 * trainer.recipe.lr > rates[-1]


@pytest.mark.parametrize(
    "batch_size, steps, dropped",
    [pytest.param(176, 1, True, id="one-left"), pytest.param(175, 2, False, id="two-left"), (177, 1, False)],
)
def test_a_last_batch_of_one_image_is_left_out(tmp_path: Path, batch_size: int, steps: int, dropped: bool) -> None:
    trainer = Trainer(replace(SMALL, **NO_EPOCHS | {"pretrain_epochs": 1}, batch_size=batch_size), tmp_path)
    assert len(trainer.data.train) == 177
    assert (trainer.steps_an_epoch, trainer.drop_last) == (steps, dropped)
    trainer.run(progress=False, log=silent)


def test_init_takes_the_place_of_the_first_phase(tmp_path: Path) -> None:
    first = replace(SMALL, method="fpnn", deterministic_epochs=0, epochs=0)
    weights = train(first, tmp_path / "first").folder / WEIGHTS
    trainer = Trainer(SMALL, tmp_path / "second", init=weights)
    assert trainer.epoch == 2
    for name, layer in bayes_layers(trainer.net).items():
        assert torch.equal(layer.mean, load_file(weights)[f"{name}.weight"])
    trainer.run(progress=False, log=silent)
    assert [record["epoch"] for record in trainer.history] == [3, 4, 5]

    weights.unlink()
    stopped = Trainer(SMALL, tmp_path / "second")
    assert stopped.resume(), "the checkpoint has what init gave"
    with pytest.raises(FileNotFoundError):
        Trainer(SMALL, tmp_path / "third", init=weights)


def test_init_takes_the_place_of_the_first_two_phases(tmp_path: Path) -> None:
    shared = train(replace(SMALL, epochs=0), tmp_path / "shared").folder / WEIGHTS
    recipe = replace(SMALL, prior="mixture", start_sigma=0.25)
    trainer = Trainer(recipe, tmp_path / "third", init=shared)
    assert (trainer.epoch, trainer.phase) == (3, BAYES)
    given = load_file(shared)
    for name, layer in bayes_layers(trainer.net).items():
        assert torch.equal(layer.mean, given[f"{name}.weight"]), "the means are those of the file"
        gap = layer.levels.diff().amin()
        assert torch.allclose(layer.log_sigma2.exp().sqrt(), 0.25 * gap), "the variances begin as the recipe says"
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False, log=interrupt)
    shared.unlink()
    again = Trainer(recipe, tmp_path / "third")
    assert again.resume(), "the checkpoint has what init gave"
    again.run(progress=False, log=silent)
    assert [record["epoch"] for record in again.history] == [4, 5]


def test_without_its_checkpoint_a_run_is_not_begun_again(tmp_path: Path) -> None:
    recipe = replace(SMALL, **NO_EPOCHS, method="fpnn")
    weights = train(recipe, tmp_path).folder / WEIGHTS
    (tmp_path / CHECKPOINT).unlink()
    before = weights.read_bytes()
    with pytest.raises(ValueError, match=f"{CHECKPOINT} is not there, but {WEIGHTS} and {METRICS} of its run"):
        Trainer(recipe, tmp_path).resume()
    assert weights.read_bytes() == before


def test_init_for_a_run_that_began_without_raises(tmp_path: Path) -> None:
    recipe = replace(SMALL, **NO_EPOCHS, method="fpnn")
    train(recipe, tmp_path)
    with pytest.raises(ValueError, match="init can't be given"):
        Trainer(recipe, tmp_path, init=tmp_path / WEIGHTS).resume()


def test_init_that_does_not_fit_raises(tmp_path: Path) -> None:
    recipe = replace(SMALL, **NO_EPOCHS)
    quantized = train(recipe, tmp_path / "quantized").folder / WEIGHTS
    text = tmp_path / "text"
    text.write_text("not weights")
    for other, file in ((replace(recipe, num_levels=5), quantized), (recipe, text)):
        with pytest.raises(
            ValueError, match=f"init must be a full-precision lenet5 or one of {other.num_levels} levels"
        ):
            Trainer(other, tmp_path / "run", init=file)
    with pytest.raises(ValueError, match=r"init must be a full-precision lenet5, got"):
        Trainer(replace(recipe, method="fpnn"), tmp_path / "run", init=quantized)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"method": "bayesian"}, "method must be one of bayes, fpnn"),
        ({"model": "lenet"}, "model must be one of .*lenet5"),
        ({"estimator": "mean"}, "estimator must be one of moment"),
        ({"prior": "laplace"}, "prior must be one of"),
        ({"spike_width": 0.0}, "spike_width must be from 0.001"),
        ({"slab_share": 1.0}, "slab_share must be from 1e-06"),
        ({"start_sigma": 0.0}, "start_sigma must be from 0.001"),
        ({"partition": "equal"}, "partition must be one of"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"augment": "mixup"}, "augment must be one of"),
        ({"num_levels": 17}, "num_levels must be from 2 to 16"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_that_can_not_be_is_refused_at_once(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Recipe(**changes)


def test_a_mixture_keeps_its_numbers_and_its_means_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []

    def watched(layer: BayesLayer, bound: Callable[[BayesLayer], None] = BayesLayer.bound_means_) -> None:
        before = layer.mean.detach().clone()
        bound(layer)
        moved.append(not torch.equal(layer.mean, before))

    monkeypatch.setattr(BayesLayer, "bound_means_", watched)
    recipe = replace(SMALL, prior="mixture", spike_width=0.4, slab_share=0.2, start_sigma=0.3, bayes_lr=0.5)
    train(recipe, tmp_path / "run")
    assert runs.load_run(tmp_path / "run").recipe == recipe
    net = runs.load_network(runs.load_run(tmp_path / "run"))
    for layer in bayes_layers(net).values():
        assert (layer.prior, layer.spike_width, layer.slab_share, layer.start_sigma) == ("mixture", 0.4, 0.2, 0.3)
        levels = layer.levels.detach()
        gap = levels.diff(dim=1).amin().item()
        low, high = levels[0, 0].item() - gap, levels[0, -1].item() + gap
        least, most = layer.mean.min().item(), layer.mean.max().item()
        assert low - 1e-6 <= least and most <= high + 1e-6
    assert any(moved), "no mean went beyond its bound"


def test_evaluate_by_hand() -> None:
    data = load_dataset("digits")
    split = Split(data.test.images[:4], torch.tensor([0, 1, 2, 2]))
    logits = torch.zeros(4, 10)
    logits[range(4), [0, 1, 2, 3]] = 2.0
    score = evaluate(lambda x: logits[: len(x)], split, data)
    assert score.error == 25.0
    normaliser = torch.tensor(9.0 + torch.e**2).log()
    assert score.nll == pytest.approx(float(normaliser - 2.0 * 3 / 4), rel=1e-5)
    assert score.predictions.tolist() == [0, 1, 2, 3]
    assert torch.equal(score.logits, logits)
