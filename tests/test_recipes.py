"""The built-in recipes, files of a user's own, and runs that began before a field was there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bqnn import models
from bqnn.cli import main as cli
from bqnn.core.checkpoint import write_checkpoint
from bqnn.lab import recipes, runs
from bqnn.lab.checkpoint import read_checkpoint
from bqnn.lab.folder import ADDED, CHECKPOINT, METADATA, METRICS, WEIGHTS, read_recipe
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import NAMES, load_recipe
from bqnn.lab.train import Trainer

SMALL = Recipe(pretrain_epochs=1, deterministic_epochs=1, epochs=1, validation=1260, batch_size=60, **ADDED)
EXPERIMENTS = {
    "airbench-cifar10": ("airbench", "cifar10"),
    "densenet40-cifar10": ("densenet", "cifar10"),
    "lenet5-caffe-mnist": ("lenet5_caffe", "mnist"),
    "lenet5-digits": ("lenet5", "digits"),
    "lenet5-mnist": ("lenet5", "mnist"),
    "lenet5-mnist-mixture": ("lenet5", "mnist"),
    "resnet20-cifar10": ("resnet20", "cifar10"),
    "vgg7-cifar10": ("vgg7", "cifar10"),
}


def silent(line: str) -> None:
    pass


def test_there_is_a_recipe_for_every_network() -> None:
    found = {name: (load_recipe(name).model, load_recipe(name).dataset) for name in NAMES}
    assert found == EXPERIMENTS
    assert {model for model, _ in found.values()} == set(models.NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_recipe_is_an_example_of_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipes.text_of(name))
    recipe = load_recipe(name)
    assert load_recipe(path) == load_recipe(str(path)) == recipe
    assert recipe.method == "bayes" and all(phase.epochs for phase in recipe.phases)
    assert 0 < len(recipes.summary_of(name)) <= 90 and "\n" not in recipes.summary_of(name)


def test_the_files_of_recipes_are_in_the_package() -> None:
    root = Path(recipes.__file__).parent.parent
    assert sorted(path.stem for path in (root / "recipes").iterdir()) == list(NAMES)
    assert '"recipes/*.toml"' in (root.parent / "setup.py").read_text()


def test_the_recipe_of_the_tables_is_the_default_on_mnist() -> None:
    assert load_recipe("lenet5-mnist") == Recipe(model="lenet5", dataset="mnist", augment="affine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("levels = 3", "recipe has the unknown field 'levels'", id="unknown"),
        pytest.param("num_levels = 3.0", "num_levels of the recipe must be int, got 3.0", id="float"),
        pytest.param("num_levels = true", "num_levels of the recipe must be int, got True", id="bool"),
        pytest.param("lr = '4e-3'", "lr of the recipe must be float, got '4e-3'", id="text"),
        pytest.param("validation = []", r"validation of the recipe must be int or NoneType, got \[\]", id="list"),
        pytest.param("lr = 2020-01-01", "lr of the recipe must be float", id="date"),
        pytest.param("[lr]\na = 1", "lr of the recipe must be float", id="table"),
        pytest.param("lr = -1.0", "lr must be positive, got -1.0", id="value"),
        pytest.param("model = 'alexnet'", "model must be one of .*, got 'alexnet'", id="choice"),
        pytest.param("summary = 3", "summary must be a string, got 3", id="summary"),
        pytest.param("lr 3", "", id="no-toml"),
        pytest.param("lr = 1.0\nlr = 2.0", "", id="twice"),
        pytest.param("a = " + "[" * 5000, "", id="deep"),
        pytest.param("\udcff", "", id="no-text"),
    ],
)
def test_a_bad_file_is_one_line_with_file_and_field(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"^{path} is no recipe: {message}") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
    assert cli.main(["train", "--recipe", str(path), "--out", str(tmp_path / "run")]) == 2
    assert f"bqnn: error: {path} is no recipe: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    for name in ("lenet5", "", "LENET5-MNIST"):
        with pytest.raises(
            ValueError, match=f"recipe must be one of {', '.join(NAMES)}, or a file .toml, got '{name}'"
        ):
            load_recipe(name)
    for name in ("none.toml", f"folder{os.sep}lenet5-mnist"):
        with pytest.raises(FileNotFoundError, match=name):
            load_recipe(name)
    with pytest.raises(IsADirectoryError):
        load_recipe(tmp_path)


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, recipes.summary_of(name)] for name in NAMES]
    assert cli.main(["recipes", "lenet5-mnist"]) == 0
    path = tmp_path / "copy.toml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe("lenet5-mnist")
    assert cli.main(["recipes", "lenet"]) == 2
    assert "recipe must be one of" in capsys.readouterr().err


def test_options_override_the_recipe_and_resume_keeps_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "run"
    file.write_text("batch_size = 60\nvalidation = 1260\npretrain_epochs = 1\ndeterministic_epochs = 0\nepochs = 5")
    words = ["train", "--recipe", str(file), "--epochs", "0", "--num-levels", "4", "--out", str(out), "--quiet"]
    assert cli.main(words) == 0
    expected = replace(SMALL, deterministic_epochs=0, epochs=0, num_levels=4)
    assert runs.load_run(out).recipe == runs.stored_recipe(out) == expected
    assert cli.main([*words, "--resume"]) == cli.main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    assert cli.main([*words[:3], "--out", str(out), "--resume"]) == 2
    err = capsys.readouterr().err
    assert "num_levels was 4, now 3, epochs was 0, now 5" in err, "a file is a whole recipe: left out is the default"


def strip(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe as it was stored before any field was added."""
    return {name: value for name, value in recipe.items() if name not in ADDED}


def test_added_fields_have_what_old_runs_had_whatever_the_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ADDED) < {field.name for field in fields(Recipe)}
    monkeypatch.setitem(ADDED, "start_sigma", 0.3)
    assert read_recipe(strip(asdict(SMALL))) == replace(SMALL, start_sigma=0.3)
    assert read_recipe({**strip(asdict(SMALL)), "start_sigma": 0.2}) == replace(SMALL, start_sigma=0.2)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run after its first epoch, written as before the fields of ADDED were there."""
    trainer = Trainer(SMALL, tmp_path)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False, log=stop)
    state = read_checkpoint(tmp_path / CHECKPOINT)
    write_checkpoint(tmp_path / CHECKPOINT, {**state, "recipe": strip(state["recipe"])})
    metrics = json.loads((tmp_path / METRICS).read_text())
    (tmp_path / METRICS).write_text(json.dumps({**metrics, "recipe": strip(metrics["recipe"])}))
    return tmp_path


def test_an_old_run_is_resumed_with_what_it_had(old_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert runs.stored_recipe(old_run) == SMALL
    whole = Trainer(SMALL, tmp_path_factory.mktemp("whole"))
    whole.run(progress=False, log=silent)
    trainer = Trainer(SMALL, old_run)
    assert trainer.resume(silent) and trainer.epoch == 1
    trainer.run(progress=False, log=silent)
    expected = whole.net.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.net.state_dict().items())
    assert read_checkpoint(old_run / CHECKPOINT)["recipe"] == asdict(SMALL)


def test_an_old_run_is_not_of_a_recipe_that_it_could_not_have(old_run: Path) -> None:
    with pytest.raises(ValueError, match="is of another recipe: spike_width was 0.25, now 0.5"):
        Trainer(replace(SMALL, spike_width=0.5), old_run).resume(silent)


def test_weights_of_an_old_run_are_read(tmp_path: Path) -> None:
    recipe = replace(SMALL, pretrain_epochs=0, deterministic_epochs=0, epochs=0)
    trainer = Trainer(recipe, tmp_path)
    trainer.run(progress=False, log=silent)
    metadata = {METADATA: json.dumps({"recipe": strip(asdict(recipe)), "factory": trainer.net.factory})}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata)
    assert runs.load_network(runs.load_run(tmp_path)).state_dict().keys() == trainer.net.state_dict().keys()
