"""`bqnn train --members` and what follows it: runs of ensembles, resumed, packed and tested."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import bqnn
from bqnn.bayes.layers import bayes_layers
from bqnn.cli import main as cli
from bqnn.data.splits import normalise
from bqnn.lab import runs
from bqnn.lab.ensemble import load_ensemble_run
from bqnn.lab.folder import CHECKPOINT, MEMBERS, METRICS, WEIGHTS, RunLock
from bqnn.lab.train import Trainer

EPOCHS = ["--pretrain-epochs", "2", "--deterministic-epochs", "1", "--epochs", "1"]
SHORT = [*EPOCHS, "--validation", "1180", "--start-sigma", "0.3", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two members with its packed file; tests change copies."""
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    assert cli.main(["train", "--members", "2", "--seed", "3", "--out", str(folder), *SHORT]) == 0
    assert cli.main(["pack", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob(f"*/{WEIGHTS}"))}


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line.split("error")[-1])]


def test_members_begin_with_the_trunk_and_go_their_own_ways(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir() if path.is_dir()) == ["member-0", "member-1", "trunk"]
    trunk = runs.load_run(trained / "trunk")
    assert [record["phase"] for record in trunk.history] == ["full precision"] * 2
    members = [runs.load_run(trained / f"member-{index}") for index in range(2)]
    assert [member.recipe.seed for member in members] == [3, 4]
    for member in members:
        assert [(each["epoch"], each["phase"]) for each in member.history] == [(3, "deterministic"), (4, "bayes")]
    one, other = (runs.load_network(member).state_dict() for member in members)
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])


def test_a_member_is_the_run_that_init_begins(trained: Path, run: Any, tmp_path: Path) -> None:
    init = ["--init", trained / "trunk" / WEIGHTS, "--seed", 4]
    assert run("train", "--out", tmp_path / "alone", *SHORT, *init).status == 0
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == weights(trained)["member-1"]


@pytest.mark.parametrize("epoch", [1, 3, 4], ids=["trunk", "member-0", "member-1"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    trained: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    done: list[int] = []
    original = Trainer._run_epoch

    def stop(self: Trainer, progress: bool) -> dict[str, Any]:
        if len(done) == epoch:
            raise KeyboardInterrupt
        done.append(self.epoch)
        return original(self, progress)

    arguments = ["train", "--members", 2, "--seed", 3, "--out", tmp_path / "run", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_epoch", stop)
        stopped = run(*arguments)
    assert stopped.status == 130 and "--members 2" in stopped.err and stopped.err.strip().endswith("--resume")
    assert "use" in run(*arguments).err or "go on with --resume" in run(*arguments).err
    assert run("train", "--resume", "--out", tmp_path / "run", "--quiet").status == 0
    assert weights(tmp_path / "run") == weights(trained)


def test_what_is_done_is_not_done_again(folder: Path, run: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert run("train", "--resume", "--out", folder, "--quiet").status == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before


def test_lines_begin_with_the_member(run: Any, tmp_path: Path) -> None:
    short = ["--pretrain-epochs", 1, "--deterministic-epochs", 0, "--epochs", 1, "--validation", 1180]
    result = run("train", "--members", 1, "--out", tmp_path / "run", *short)
    assert [line.split()[0] for line in result.out.splitlines()[:-1]] == ["trunk", "member-0"]
    assert result.out.splitlines()[-1] == f"{tmp_path / 'run'} has 1 trained members"


def test_an_init_is_the_trunk(trained: Path, run: Any, tmp_path: Path) -> None:
    arguments = ["train", "--members", 1, "--seed", 3, "--out", tmp_path / "run", *SHORT]
    assert run(*arguments, "--init", trained / "trunk" / WEIGHTS).status == 0
    assert weights(tmp_path / "run")["member-0"] == weights(trained)["member-0"]
    assert runs.load_run(tmp_path / "run" / "trunk").history == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "members.json, trunk, member-0, member-1); go on with --resume", id="used"),
        pytest.param(["--members", "2"], "member-1); go on with --resume", id="used-by-members"),
        pytest.param(["--resume", "--members", "3"], "is of 2 members, now there are 3", id="other-number"),
        pytest.param(["--resume", "--seed", "9"], "is of another recipe: seed was 3, now 9", id="other-recipe"),
        pytest.param(["--force", "--members", "0"], "members must be from 1 to 1000, got 0", id="none"),
        pytest.param(["--force", "--members", "2", "--dataset", "mnst"], "--dataset must be one of", id="data"),
    ],
)
def test_what_is_refused_changes_nothing(folder: Path, run: Any, arguments: list[str], message: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    result = run("train", "--out", folder, "--quiet", *arguments)
    assert result.status == 2 and message in result.err and result.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_members_of_a_run_without(trained: Path, run: Any) -> None:
    result = run("train", "--resume", "--members", 2, "--out", trained / "member-0", "--quiet")
    assert result.status == 2 and "--members can't be given for" in result.err


def test_force_replaces_the_members(folder: Path, run: Any) -> None:
    (folder / "member-1" / "notes.txt").write_text("mine")
    short = ["--pretrain-epochs", 0, "--deterministic-epochs", 0, "--epochs", 0, "--quiet"]
    assert run("train", "--force", "--out", folder, *short).status == 0
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    packed = ["packed.compiled-fp32.safetensors", "packed.compiled-int8.safetensors", "packed.safetensors"]
    assert left == sorted([CHECKPOINT, METRICS, WEIGHTS, "member-1/notes.txt", *packed])
    assert not (folder / "member-0").exists() and not (folder / "trunk").exists()


def test_what_is_left_of_another_ensemble_is_not_taken(folder: Path, run: Any) -> None:
    (folder / MEMBERS).unlink()
    arguments = ["train", "--members", 2, "--seed", 4, "--out", folder, *SHORT]
    assert "has a run (trunk, member-0, member-1)" in run(*arguments).err
    result = run(*arguments, "--resume")
    assert result.status == 2 and f"{folder / 'trunk' / METRICS} is of another recipe: seed was 3, now 4" in result.err


def test_somebody_else_is_writing(folder: Path, run: Any) -> None:
    with RunLock(folder):
        assert "is in use" in run("train", "--resume", "--out", folder, "--quiet").err


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"members": 2}', '{"recipe": {}, "members": true}', '{"recipe": {"seed": "x"}, "members": 2}'],
)
def test_a_damaged_members_file_is_named(folder: Path, run: Any, content: str) -> None:
    (folder / MEMBERS).write_text(content)
    for arguments in (["eval", folder], ["pack", folder], ["train", "--resume", "--out", folder]):
        result = run(*arguments)
        assert result.status == 2
        assert f"{folder / MEMBERS} is not what bqnn train writes" in result.err and result.err.count("\n") == 1


def test_a_member_that_is_not_trained_is_named(folder: Path, run: Any) -> None:
    (folder / "member-1" / WEIGHTS).unlink()
    assert f"{folder / 'member-1'} has no {WEIGHTS} yet" in run("pack", folder).err


# --- packing, testing -------------------------------------------------------------------------------------------------


def test_the_packed_file_has_the_members(trained: Path) -> None:
    loaded = bqnn.load(trained / "packed.safetensors")
    assert isinstance(loaded, bqnn.Ensemble) and len(loaded) == 2
    for index, network in enumerate(loaded):
        net = runs.load_network(runs.load_run(trained / f"member-{index}"))
        for name, layer in bayes_layers(net).items():
            assert torch.equal(network.get_submodule(name).decode(), layer.quantized_weight())
            assert network.get_submodule(name).has_posterior
    for precision in ("fp32", "int8"):
        compiled = bqnn.load(trained / f"packed.compiled-{precision}.safetensors")
        assert isinstance(compiled, bqnn.CompiledEnsemble) and compiled.num_networks == 2


def test_pack_says_what_it_wrote(folder: Path, run: Any, tmp_path: Path) -> None:
    result = run("pack", folder, "-o", tmp_path / "net", "--no-compile")
    size = (tmp_path / "net").stat().st_size
    assert result.out.startswith(f"{tmp_path / 'net'}: {size:,} bytes of 2 networks; one at full precision: ")
    info = run("info", tmp_path / "net").out
    assert "2 networks, each lenet5(" in info and "1.fc3" in info
    _, table = info.split("\nlayer", 1)
    rows = [int(line.split()[-1].replace(",", "")) for line in table.splitlines()[1:]]
    assert sum(rows[:-1]) == rows[-1] == size


@pytest.mark.parametrize("what", ["", "packed.safetensors"], ids=["run", "file"])
def test_eval_shows_networks_and_ensemble(folder: Path, run: Any, what: str) -> None:
    result = run("eval", folder / what, "--samples", 4)
    assert result.status == 0, result.err
    head, *lines = result.out.splitlines()
    assert head.endswith("test split of digits, 360 images")
    name = "packed" if what else "quantized"
    names = [line.split("error")[0].strip() for line in lines if "error" in line]
    compiled = ["compiled, fp32", "compiled, int8"] if what else []
    assert names == [f"{name} 0", f"{name} 1", f"{name}, mean of 2", *compiled, "mean of 4 samples"]

    ensemble = load_ensemble_run(folder)
    assert ensemble is not None
    data = runs.load_data(ensemble.recipe, "data")
    x, labels = normalise(data.test.images, data.mean, data.std), data.test.labels
    found = bqnn.predict(ensemble.load(), x)
    nll = float(torch.nn.functional.nll_loss(found.probs.log(), labels))
    error = 100 * float((found.probs.argmax(1) != labels).double().mean())
    assert numbers(lines[2])[:2] == pytest.approx([error, nll], abs=0.006)
    expected = [float(found.entropy.mean()), float(found.mutual_information.mean())]
    assert numbers(lines[3]) == pytest.approx(expected, abs=2e-4)
    stored = [json.loads((folder / f"member-{index}" / METRICS).read_text()).get("test") for index in range(2)]
    if what:
        assert stored == [None, None], "scores are of runs alone"
    else:
        assert [each["nll"] for each in stored] == pytest.approx([numbers(line)[1] for line in lines[:2]], abs=6e-5)


def test_eval_of_a_compiled_ensemble(folder: Path, run: Any) -> None:
    lines = run("eval", folder / "packed.compiled-fp32.safetensors").out.splitlines()
    names = [line.split("error")[0].strip() for line in lines if "error" in line]
    assert names == ["compiled, fp32 0", "compiled, fp32 1", "compiled, fp32, mean of 2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["eval", "{run}", "--samples", "3"], "a multiple of the 2 networks", id="samples"),
        pytest.param(["eval", "{run}", "--samples", "2", "--refresh"], "samples must be more than 2", id="refresh"),
        pytest.param(["report", "{run}"], "it has an ensemble, whose members are runs", id="report"),
    ],
)
def test_mistakes(trained: Path, run: Any, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(run=trained) for argument in arguments))
    assert (result.status, result.out) == (2, "") and message in result.err
