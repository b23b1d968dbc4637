"""`bqnn eval --uncertainty`, from its arguments to its table, its files and the page of the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import bqnn
from bqnn.cli import main as cli
from bqnn.cli.uncertainty import format_table
from bqnn.data.corruptions import CORRUPTIONS
from bqnn.lab import runs, uncertainty
from bqnn.lab.folder import METRICS
from bqnn.lab.uncertainty import measure
from bqnn.lab.uncertainty_file import read_uncertainty
from tests.support.command import Command, Result
from tests.support.measured import measured
from tests.support.page import Page

EPOCHS = ["--pretrain-epochs", "1", "--deterministic-epochs", "1", "--epochs", "1", "--start-sigma", "0.4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with short runs, "bayes", packed and compiled too, and "fpnn", and no data set."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("bayes", "fpnn"):
        options = ["--method", method, "--out", str(folder / method), "--validation", "200", "--quiet"]
        assert cli.main(["train", *options, *EPOCHS]) == 0
    assert cli.main(["pack", str(folder / "bayes")]) == 0
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def evaluated(run: Command, trained: Path) -> Command:
    """Runs `bqnn eval PATH --uncertainty`, without other data sets; every argument becomes a string."""

    def command(path: Path, *arguments: object, flags: tuple[str, ...] = ("--uncertainty",)) -> Result:
        return run("eval", path, *flags, "--data-root", trained / "empty", *arguments)

    return command


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two corruptions only."""
    monkeypatch.setattr(uncertainty, "CORRUPTIONS", {name: CORRUPTIONS[name] for name in ("fog", "contrast")})


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_a_run_from_the_command_to_the_page(evaluated: Command, trained: Path, tmp_path: Path) -> None:
    metrics = (trained / "bayes" / METRICS).read_text()
    output = tmp_path / "found.json"
    result = evaluated(trained / "bayes", "--samples", 2, "--seed", 3, "-o", output)
    assert (result.status, result.err) == (0, "")
    found = json.loads(output.read_text())
    assert read_uncertainty(trained / "bayes") == found
    assert (found["network"], found["split"], found["samples"], found["seed"]) == ("quantized", "test", 2, 3)
    assert (trained / "bayes" / METRICS).read_text() == metrics, "scores of other commands stay"
    run = runs.load_run(trained / "bayes")
    data = runs.load_data(run.recipe, trained / "empty")
    expected = measure(runs.load_network(run), data, samples=2, seed=3, data_root=trained / "empty")
    assert found == {"network": "quantized", **expected}, "the same seeds, the same numbers"

    lines = result.out.splitlines()
    assert lines[0] == f"{trained / 'bayes'}: test split of digits, 360 images"
    assert lines[2].startswith("quantized, mean of 2 networks; T = ")
    assert [line.split()[0] for line in lines[4:17]] == ["clean", *CORRUPTIONS]
    clean = found["clean"]
    factors = {"ece": 100, "scaled_ece": 100}
    assert numbers(lines[4]) == pytest.approx([factors.get(k, 1) * v for k, v in clean.items()], abs=0.005)
    fog = sum(each["error"] for each in found["corruptions"]["fog"]) / 5
    assert numbers(next(line for line in lines if line.startswith("fog")))[0] == pytest.approx(fog, abs=0.005)
    assert lines[-3] == f"cifar10 is not in {trained / 'empty'}: no images of another data set"
    assert lines[-2:] == [f"{trained / 'bayes' / 'uncertainty-test.json'} is written", f"{output} is written"]

    page = tmp_path / "page.html"
    assert cli.main(["report", str(trained / "bayes"), str(trained / "fpnn"), "--no-time", "-o", str(page)]) == 0
    labels = [value for name, value in Page(page.read_text()).attributes if name == "aria-label"]
    assert {"accuracy, %", "images by entropy", *(name.replace("_", " ") for name in CORRUPTIONS)} <= set(labels)


@pytest.mark.usefixtures("few")
def test_full_precision_and_the_validation_split(evaluated: Command, trained: Path) -> None:
    result = evaluated(trained / "fpnn", "--split", "validation")
    assert result.status == 0 and "mutual information\n" not in result.out
    found = read_uncertainty(trained / "fpnn")
    assert found is not None
    assert (found["network"], found["split"], found["images"], found["samples"]) == (
        "full precision",
        "validation",
        200,
        1,
    )


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("file, name", [("packed", "packed"), ("packed.compiled-int8", "compiled, int8")])
def test_a_file(evaluated: Command, trained: Path, tmp_path: Path, file: str, name: str) -> None:
    path, output = trained / "bayes" / f"{file}.safetensors", tmp_path / "found.json"
    before = sorted(each.name for each in path.parent.iterdir())
    result = evaluated(path, "-o", output)
    assert result.status == 0 and result.out.splitlines()[-1] == f"{output} is written"
    assert json.loads(output.read_text())["network"] == name
    assert sorted(each.name for each in path.parent.iterdir()) == before, "what is stored with a run is of the run"


@pytest.mark.usefixtures("few")
def test_a_packed_file_is_its_run(evaluated: Command, trained: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "run.json", tmp_path / "file.json"]
    for path, output in zip((trained / "bayes", trained / "bayes" / "packed.safetensors"), outputs):
        assert evaluated(path, "-o", output).status == 0
    of_run, of_file = (json.loads(output.read_text()) for output in outputs)
    for score in ("error", "nll", "entropy"):
        assert of_file["mean"][score] == pytest.approx(of_run["mean"][score], rel=1e-3)


@pytest.mark.usefixtures("few")
def test_a_file_of_an_ensemble(evaluated: Command, trained: Path, tmp_path: Path) -> None:
    net = runs.load_network(runs.load_run(trained / "bayes"))
    networks = [bqnn.pack(bqnn.sample(net, seed)) for seed in range(2)]
    bqnn.save(bqnn.compile(networks, torch.zeros(2, 1, 8, 8)), tmp_path / "both.safetensors")
    result = evaluated(tmp_path / "both.safetensors", "--dataset", "digits", "-o", tmp_path / "found.json")
    assert result.status == 0 and "compiled, fp32, mean of 2 networks" in result.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == 2 and found["clean"]["mutual_information"] > 0


MISTAKES = [
    pytest.param("fpnn", ["--samples", "2"], "no Bayes layer with a posterior", id="samples-of-fpnn"),
    pytest.param("certain.safetensors", ["--dataset", "digits", "--samples", "2"], "posterior", id="no-posterior"),
    pytest.param("bayes", ["--samples", "0"], "samples must be at least 1", id="no-sample"),
    pytest.param("bayes", ["--samples", "2", "--seed", "-1"], "seed must be from 0", id="seed"),
    pytest.param("alone.safetensors", [], "--dataset or --data must say what to test", id="unknown-data-set"),
    pytest.param("alone.safetensors", ["--dataset", "kmnist"], "kmnist is not in", id="no-data"),
    pytest.param("bayes", ["-o", "{tmp}/no/found.json"], "{tmp}/no", id="output-into-nothing"),
]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("path, arguments, message", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    evaluated: Command, trained: Path, tmp_path: Path, path: str, arguments: list[str], message: str
) -> None:
    (trained / "alone.safetensors").write_bytes((trained / "bayes" / "packed.safetensors").read_bytes())
    net = bqnn.load(trained / "alone.safetensors")
    bqnn.save(bqnn.sample(net), trained / "certain.safetensors")
    result = evaluated(trained / path, *(each.format(tmp=tmp_path) for each in arguments))
    assert result.status == 2
    assert result.err.startswith("bqnn: error: ") and result.err.count("\n") == 1
    assert message.format(tmp=tmp_path) in result.err
    assert list(tmp_path.iterdir()) == []


def test_output_needs_uncertainty(evaluated: Command, trained: Path, tmp_path: Path) -> None:
    result = evaluated(trained / "bayes", "-o", tmp_path / "x.json", flags=())
    assert (result.status, result.out) == (2, "")
    assert result.err == "bqnn: error: --output is for --uncertainty\n"


def test_a_run_without_validation_images(evaluated: Command, tmp_path: Path) -> None:
    options = ["--method", "fpnn", "--validation", "0", "--pretrain-epochs", "0", "--deterministic-epochs", "0"]
    assert cli.main(["train", "--out", str(tmp_path), "--quiet", *options, "--epochs", "0"]) == 0
    result = evaluated(tmp_path)
    assert (result.status, result.out) == (2, "")
    assert "the validation split of digits is empty" in result.err


def test_table() -> None:
    lines = format_table(measured(1, ("fog",))).splitlines()
    assert lines[0] == "quantized; T = 1.250, of the least NLL on validation images"
    assert numbers(lines[2]) == [0.5, 0.51, 0.52, 53, 0.54, 55, 0.56, 0.57], "one network has no MI"
    assert lines[3].startswith("fog") and numbers(lines[3])[0] == 3, "the mean of 1 to 5"
    assert lines[4].startswith("all corruptions") and numbers(lines[4])[0] == 3.5
    assert [numbers(line) for line in lines[-2:]] == [[0.75, 50], [0.875, 25]]
    assert len({len(line) for line in lines[1:5]}) == 1, "columns stand under each other"
