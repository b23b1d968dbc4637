"""The command `bqnn`, each subcommand from its arguments to its files, output and exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bqnn
from bqnn.cli import main as cli
from bqnn.core.timing import measure_side_by_side
from bqnn.data.splits import normalise
from bqnn.lab import runs
from bqnn.lab.compile_run import calibration
from bqnn.lab.evaluate import find_split, statistics_batches
from bqnn.lab.folder import CHECKPOINT, METRICS, WEIGHTS
from bqnn.lab.recipe import Recipe
from bqnn.lab.train import Trainer
from tests.support.command import Result

EPOCHS = ["--pretrain-epochs", "1", "--deterministic-epochs", "1", "--epochs", "1"]
SHORT = [*EPOCHS, "--validation", "1260", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs, "bayes" and "fpnn", and the packed file of the first; tests change copies."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("bayes", "fpnn"):
        assert cli.main(["train", "--method", method, "--out", str(folder / method), *EPOCHS, "--quiet"]) == 0
    assert cli.main(["pack", str(folder / "bayes")]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained``."""
    for path in trained.rglob("*.*"):
        target = tmp_path / path.relative_to(trained)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def in_new_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bqnn.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_train_writes_a_run_and_a_line_an_epoch(run: Any, tmp_path: Path) -> None:
    result = run("train", "--out", tmp_path / "run", *EPOCHS, "--num-levels", 4, "--threads", torch.get_num_threads())
    assert result.status == 0
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["epoch", f"{i}/3"] for i in (1, 2, 3)]
    assert lines[3:] == [f"{tmp_path / 'run' / WEIGHTS} is written"]
    assert result.err == "", "no progress bar where stderr is no terminal"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [CHECKPOINT, METRICS, WEIGHTS]
    stored = runs.load_run(tmp_path / "run")
    assert stored.recipe == Recipe(num_levels=4, pretrain_epochs=1, deterministic_epochs=1, epochs=1)
    assert len(stored.history) == 3


def test_quiet_prints_nothing(run: Any, tmp_path: Path) -> None:
    assert run("train", "--out", tmp_path, *SHORT) == Result(0, "", "")


def test_every_field_of_a_recipe_is_an_option() -> None:
    values = {
        "model": "resnet20",
        "dataset": "folder:x",
        "method": "fpnn",
        "layer_levels": "conv1=4",
        "estimator": "local",
        "prior": "gaussian",
        "partition": "learned",
        "granularity": "channel",
        "augment": "affine",
        "image_size": 16,
        "validation": 7,
        "slab_share": 0.3,
        "label_smoothing": 0.1,
        "autocast": "bfloat16",
    }
    arguments = []
    for field in fields(Recipe):
        if field.name not in values:
            values[field.name] = field.default + 2
        arguments += [f"--{field.name.replace('_', '-')}", str(values[field.name])]
    options = cli.make_parser().parse_args(["train", "--out", "x", *arguments])
    assert {field.name: getattr(options, field.name) for field in fields(Recipe)} == values
    assert all(values[field.name] != field.default for field in fields(Recipe))
    assert Recipe(**values)


def test_no_option_is_the_recipe_s_default() -> None:
    options = cli.make_parser().parse_args(["train", "--out", "x"])
    assert not [field.name for field in fields(Recipe) if field.name in options]


def test_every_field_has_a_help_text_and_its_default_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(cli.HELP) == {field.name for field in fields(Recipe)}
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, default in asdict(Recipe()).items():
        assert f"{cli.HELP[name]} (default: {'none' if default in (None, '') else default})" in text


def test_none_is_taken_where_a_field_may_be_none() -> None:
    options = cli.make_parser().parse_args(["train", "--out", "x", "--image-size", "none", "--validation", "none"])
    assert (options.image_size, options.validation) == (None, None)


def test_train_does_not_overwrite_a_run(run: Any, folder: Path) -> None:
    before = (folder / "bayes" / WEIGHTS).read_bytes()
    result = run("train", "--out", folder / "bayes", *SHORT, "--seed", 1)
    assert result.status == 2
    assert "go on with --resume, or replace it with --force" in result.err
    assert (folder / "bayes" / WEIGHTS).read_bytes() == before


def test_force_replaces_a_run_and_leaves_other_files(run: Any, folder: Path) -> None:
    (folder / "bayes" / "notes.txt").write_text("mine")
    assert run("train", "--out", folder / "bayes", "--force", *SHORT, "--seed", 1).status == 0
    assert runs.load_run(folder / "bayes").recipe.seed == 1
    assert (folder / "bayes" / "notes.txt").read_text() == "mine"


def test_force_leaves_no_weights_of_the_run_before(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Trainer, progress: bool) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_run_epoch", stop)
    result = run("train", "--out", folder / "bayes", "--force", *SHORT, "--seed", 1)
    assert result.status == 130
    assert "--force" not in result.err, "to go on must not begin again"
    names = {path.name for path in (folder / "bayes").iterdir() if not path.name.startswith("packed.")}
    assert names == {CHECKPOINT, METRICS}


def test_force_with_a_mistake_keeps_the_run(run: Any, folder: Path) -> None:
    before = (folder / "bayes" / WEIGHTS).read_bytes()
    assert run("train", "--out", folder / "bayes", "--force", "--validation", 10**6).status == 2
    assert (folder / "bayes" / WEIGHTS).read_bytes() == before


def test_resume_takes_the_recipe_of_the_run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("train", "--out", tmp_path / "run", *SHORT, "--num-levels", 5, "--seed", 3)
    run("train", "--out", tmp_path / "whole", *arguments[3:])
    whole_epoch = Trainer._run_epoch

    def stop_in_third(self: Trainer, progress: bool) -> dict[str, Any]:
        if self.epoch == 2:
            raise KeyboardInterrupt
        return whole_epoch(self, progress)

    monkeypatch.setattr(Trainer, "_run_epoch", stop_in_third)
    result = run(*arguments)
    assert result.status == 130
    assert result.out == ""
    again = f"bqnn train --out {tmp_path / 'run'} {' '.join(SHORT)} --num-levels 5 --seed 3 --resume"
    assert result.err.splitlines() == ["bqnn: interrupted", f"bqnn: to go on: {again}"]
    monkeypatch.undo()

    assert run("train", "--out", tmp_path / "run", "--resume", "--seed", 4).status == 2
    assert not (tmp_path / "run" / WEIGHTS).exists()
    assert run("train", "--out", tmp_path / "run", "--resume", "--quiet").status == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bqnn.cli", "train", "--out", str(tmp_path / "a run"), "--epochs", "100000"]
    # A job in the background ignores the signal, and its children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert f"bqnn train --out '{tmp_path / 'a run'}' --epochs 100000 --resume" in err
    assert "Traceback" not in err


def test_init_is_the_first_phase(run: Any, folder: Path, tmp_path: Path) -> None:
    epochs = ("--pretrain-epochs", 2, "--deterministic-epochs", 0, "--epochs", 0, "--quiet")
    result = run("train", "--out", tmp_path / "second", "--init", folder / "fpnn" / WEIGHTS, *epochs)
    assert result.status == 0
    first, second = (load_file(path / WEIGHTS) for path in (folder / "fpnn", tmp_path / "second"))
    assert torch.equal(first["fc1.weight"], second["fc1.weight"])
    assert runs.load_run(tmp_path / "second").history == []


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_eval_of_a_run(run: Any, folder: Path) -> None:
    result = run("eval", folder / "bayes")
    assert result.status == 0
    head, line = result.out.splitlines()
    assert head.endswith("bayes: test split of digits, 360 images")
    found = json.loads((folder / "bayes" / METRICS).read_text())
    assert found["history"] and found["recipe"]
    score = found["test"]
    assert score["images"] == 360
    expected = [score["error"], score["nll"], 100 * score["ece"]]
    assert numbers(line) == pytest.approx(expected, abs=0.005)
    data = runs.load_data(Recipe(), "data")
    net = runs.load_network(runs.load_run(folder / "bayes"))
    logits = net(normalise(data.test.images, data.mean, data.std)).detach()
    assert score["error"] == pytest.approx(100 * float((logits.argmax(1) != data.test.labels).double().mean()))
    assert score["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, data.test.labels)), rel=1e-4)


def test_eval_with_samples_adds_uncertainty(run: Any, folder: Path) -> None:
    result = run("eval", folder / "bayes", "--samples", 3, "--split", "validation")
    assert result.status == 0
    found = runs.load_run(folder / "bayes").scores
    assert list(found) == ["validation"]
    sampled = found["validation"]["sampled"]
    assert sampled["samples"] == 3
    assert 0 < sampled["mutual_information"] < sampled["entropy"] < 2.31
    assert sampled["nll"] != found["validation"]["nll"]
    assert numbers(result.out.splitlines()[-1]) == pytest.approx(
        [sampled["entropy"], sampled["mutual_information"]], abs=1e-4
    )
    run("eval", folder / "bayes", "--samples", 3, "--split", "validation")
    assert runs.load_run(folder / "bayes").scores == found, "the same seed, the same samples"
    run("eval", folder / "bayes", "--samples", 3, "--split", "validation", "--seed", 1)
    assert runs.load_run(folder / "bayes").scores != found


@pytest.mark.parametrize("what", ["bayes", "bayes/packed.safetensors"])
def test_eval_refreshes_the_statistics_of_samples(run: Any, folder: Path, what: str) -> None:
    asked = ("eval", folder / what, "--samples", 3, "--seed", 5)
    own, refreshed = (run(*asked, *more).out.splitlines() for more in ((), ("--refresh",)))
    line = next(index for index, text in enumerate(own) if text.startswith("mean of 3 samples"))
    assert own[:line] == refreshed[:line] and own[line] != refreshed[line]
    assert [index for index, text in enumerate(refreshed) if "mutual information" in text] == [line + 1]

    data, split = runs.load_data(Recipe(), "data"), runs.load_data(Recipe(), "data").test
    net = bqnn.load(folder / what) if what.endswith("tensors") else runs.load_network(runs.load_run(folder / what))
    torch.manual_seed(5)
    given = statistics_batches(data, Recipe().seed, torch.device("cpu"))
    found = bqnn.predict(net, normalise(split.images, data.mean, data.std), samples=3, batches=given)
    error = 100 * float((found.probs.argmax(1) != split.labels).double().mean())
    nll = float(torch.nn.functional.nll_loss(found.probs.log(), split.labels))
    assert numbers(refreshed[line])[:2] == pytest.approx([error, nll], abs=0.006)
    expected = [float(found.entropy.mean()), float(found.mutual_information.mean())]
    assert numbers(refreshed[line + 1]) == pytest.approx(expected, abs=2e-4)


def test_eval_keeps_what_other_splits_gave(run: Any, folder: Path) -> None:
    run("eval", folder / "fpnn")
    run("eval", folder / "fpnn", "--split", "validation")
    assert sorted(runs.load_run(folder / "fpnn").scores) == ["test", "validation"]


def test_eval_of_a_packed_file_is_that_of_its_run(run: Any, folder: Path) -> None:
    file = folder / "bayes" / "packed.safetensors"
    unpacked, packed = run("eval", folder / "bayes"), run("eval", file)
    assert numbers(packed.out.splitlines()[1]) == pytest.approx(numbers(unpacked.out.splitlines()[1]), abs=2e-4)
    alone = folder / "alone.safetensors"
    file.rename(alone)
    assert numbers(run("eval", alone, "--dataset", "digits").out.splitlines()[1]) == numbers(packed.out.splitlines()[1])
    assert run("eval", alone, "--dataset", "digits", "--precision", "int8").status == 0


def test_pack(run: Any, folder: Path, tmp_path: Path) -> None:
    result = run("pack", folder / "bayes", "-o", tmp_path / "net.safetensors")
    assert result.status == 0
    packed, dense = (tmp_path / "net.safetensors").stat().st_size, runs.fpnn_bytes("lenet5", {"image_size": 8})
    line = f"{tmp_path / 'net.safetensors'}: {packed:,} bytes; full precision: {dense:,} bytes; "
    assert result.out.splitlines()[0] == f"{line}{dense / packed:.1f} times smaller"
    assert (folder / "fpnn" / WEIGHTS).stat().st_size - 1500 < dense <= (folder / "fpnn" / WEIGHTS).stat().st_size
    net = bqnn.load(tmp_path / "net.safetensors")
    layers = bqnn.bayes.layers.bayes_layers(runs.load_network(runs.load_run(folder / "bayes")))
    assert len(layers) == 5
    for name, layer in layers.items():
        assert torch.equal(net.get_submodule(name).decode(), layer.quantized_weight())


def lines_of(out: str) -> list[str]:
    """The names in front of the scores."""
    return [line.split("error")[0].strip() for line in out.splitlines()[1:-1]]


def test_eval_of_a_packed_file_tests_what_is_compiled_of_it(run: Any, folder: Path) -> None:
    file = folder / "bayes" / "packed.safetensors"
    result = run("eval", file)
    assert lines_of(result.out) == ["packed", "compiled, fp32", "compiled, int8"]
    packed, fp32, int8 = (numbers(line) for line in result.out.splitlines()[1:4])
    assert fp32 == pytest.approx(packed, abs=0.3)
    assert int8 == pytest.approx(packed, abs=3) and int8 != packed
    times = result.out.splitlines()[-1]
    assert times.startswith("median time of 256 images on the CPU: packed ")
    assert len(numbers(times)) == 3
    alone = run("eval", folder / "bayes" / "packed.compiled-int8.safetensors")
    assert lines_of(alone.out) == ["compiled, int8"]
    assert numbers(alone.out.splitlines()[1]) == int8
    assert json.loads((folder / "bayes" / METRICS).read_text()).get("test") is None, "scores are of the run alone"


def test_eval_of_a_compiled_file_anywhere(run: Any, folder: Path) -> None:
    alone = folder / "alone.safetensors"
    (folder / "bayes" / "packed.compiled-fp32.safetensors").rename(alone)
    assert lines_of(run("eval", alone, "--dataset", "digits").out) == ["compiled, fp32"]
    result = run("eval", alone, "--dataset", "digits", "--precision", "int8")
    assert (result.status, result.out) == (2, "") and "a compiled network" in result.err


def test_pack_compiles_with_the_training_images(run: Any, folder: Path, tmp_path: Path) -> None:
    result = run("pack", folder / "bayes", "-o", tmp_path / "net.safetensors")
    data = runs.load_data(Recipe(), "data")
    x = normalise(data.test.images[:20], data.mean, data.std)
    packed = bqnn.load(tmp_path / "net.safetensors")
    images = calibration(data)
    assert [tuple(batch.shape) for batch in images] == [(128, 1, 8, 8)] * 4
    for line, precision in zip(result.out.splitlines()[2:], ("fp32", "int8"), strict=True):
        file = tmp_path / f"net.compiled-{precision}.safetensors"
        assert line == f"{file}: {file.stat().st_size:,} bytes, compiled for {precision}"
        given = images if precision == "int8" else None
        assert torch.equal(bqnn.load(file)(x), bqnn.compile(packed, x, precision=precision, calibration=given)(x))


def test_pack_without_compiled_networks(run: Any, folder: Path) -> None:
    result = run("pack", folder / "bayes", "--no-compile")
    assert result.status == 0 and len(result.out.splitlines()) == 2
    assert [path.name for path in (folder / "bayes").glob("*compiled*")] == [], "those of another packed file"
    assert lines_of(run("eval", folder / "bayes" / "packed.safetensors").out) == ["packed"]


def test_pack_without_the_training_images(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_data(*_: object) -> None:
        raise FileNotFoundError("the images are elsewhere")

    monkeypatch.setattr(runs, "load_data", no_data)
    result = run("pack", folder / "bayes")
    assert result.status == 0
    assert result.out.splitlines()[-1] == ("not compiled for int8: no images to calibrate on: the images are elsewhere")
    assert [path.name for path in (folder / "bayes").glob("*compiled*")] == ["packed.compiled-fp32.safetensors"]


def test_pack_notices_a_file_that_decodes_to_other_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = runs.load_network(runs.load_run(folder / "bayes"))
    other = runs.load_network(runs.load_run(folder / "bayes"))
    with torch.no_grad():
        other.fc1.weight.neg_()
    monkeypatch.setattr(runs, "pack", lambda _: bqnn.pack(other))
    with pytest.raises(RuntimeError, match="layer 'fc1' .* does not decode"):
        runs.save_packed(net, folder / "net.safetensors")


def test_info_adds_up(run: Any, folder: Path) -> None:
    file = folder / "bayes" / "packed.safetensors"
    result = run("info", file)
    assert result.status == 0
    head, *known, columns = result.out.splitlines()[:6]
    rows = result.out.splitlines()[6:]
    assert "lenet5(in_channels=1, num_classes=10, image_size=8)" in head
    assert known[:2] == ["trained on digits", "images of 8x8 pixels, channels: 1"]
    assert re.fullmatch(r"normalised with mean 0\.3\d+ and std 0\.3\d+, of pixels from 0 to 1", known[2])
    assert known[3] == "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert columns.split()[:3] == ["layer", "kind", "shape"]
    names = ["conv1", "conv2", "fc1", "fc2", "fc3", "posteriors", "other", "header", "file"]
    assert [row.split()[0] for row in rows] == names
    sizes = [int(row.split()[-1].replace(",", "")) for row in rows]
    assert sum(sizes[:-1]) == sizes[-1] == file.stat().st_size
    assert rows[2].split()[1:] == ["linear", "120x256", "3", "1", "yes", "1.62", "6,252"]
    assert sizes[5] == 5 * 36


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_info_of_a_compiled_file_adds_up(run: Any, folder: Path, precision: str) -> None:
    file = folder / "bayes" / f"packed.compiled-{precision}.safetensors"
    rows = [line.split() for line in run("info", file).out.splitlines()[6:]]
    assert [row[1] for row in rows[:-3]] == ["conv2d", "conv2d", "linear", "linear", "linear"]
    sizes = [int(row[-1].replace(",", "")) for row in rows]
    assert sizes[-3] == 0, "all tensors are those of layers"
    assert sum(sizes[:-1]) == sizes[-1] == file.stat().st_size


def test_report_writes_a_page(run: Any, folder: Path, tmp_path: Path) -> None:
    result = run("report", folder / "fpnn", folder / "bayes", "-o", tmp_path / "page.html", "--no-time", "--linear")
    assert result.status == 0
    assert "conv1" in result.out and result.out.splitlines()[-1] == f"{tmp_path / 'page.html'} is written"
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_demo_is_called(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("bqnn.cli.demo.run_demo", lambda *args, **options: called.append((args, options)))
    assert run("demo", "--out", tmp_path / "x").status == 0
    assert called == [((tmp_path / "x",), {"progress": sys.stderr.isatty()})]


MISTAKES = [
    pytest.param(["train", "--out", "{tmp}/x", "--num-levels", "99"], "--num-levels must be from 2 to 16", id="levels"),
    pytest.param(["train", "--out", "{tmp}/x", "--dataset", "mnst"], "--dataset must be one of digits", id="dataset"),
    pytest.param(["train", "--out", "{tmp}/x", "--dataset", "folder:{tmp}/no"], "{tmp}/no", id="no-folder"),
    pytest.param(["train", "--out", "{tmp}/x", "--dataset", "kmnist", "--data-root", "{tmp}"], "kmnist", id="no-data"),
    pytest.param(["train", "--out", "{tmp}/x", "--device", "tpu"], "--device must be cpu", id="device"),
    pytest.param(["train", "--out", "{tmp}/x", "--threads", "0"], "--threads must be at least 1", id="threads"),
    pytest.param(["train", "--out", "{tmp}/x", "--init", "{tmp}/no"], "{tmp}/no", id="no-init"),
    pytest.param(["train", "--out", "{runs}/bayes/metrics.json/x"], "metrics.json/x", id="out-in-a-file"),
    pytest.param(["eval", "{tmp}"], "{tmp} is not the folder of a run", id="no-run"),
    pytest.param(["eval", "{tmp}/no"], "{tmp}/no", id="no-file"),
    pytest.param(["eval", "{runs}/bayes/model.safetensors"], "model.safetensors", id="not-packed"),
    pytest.param(["eval", "{runs}/bayes", "--dataset", "digits"], "--dataset", id="dataset-of-a-run"),
    pytest.param(["eval", "{runs}/bayes", "--samples", "0"], "samples must be at least 1", id="no-sample"),
    pytest.param(["eval", "{runs}/fpnn", "--samples", "2"], "no Bayes layer", id="samples-of-fpnn"),
    pytest.param(["eval", "{runs}/bayes/packed.compiled-int8.safetensors", "--samples", "2"], "samples", id="compiled"),
    pytest.param(["eval", "{runs}/bayes", "--refresh"], "samples must be more than 1", id="nothing-to-refresh"),
    pytest.param(["pack", "{runs}/fpnn"], "full-precision run", id="pack-fpnn"),
    pytest.param(["pack", "{runs}/bayes", "-o", "{tmp}/no/net"], "{tmp}/no/", id="pack-into-nothing"),
    pytest.param(["report", "{tmp}"], "{tmp} is not the folder of a run", id="report-of-nothing"),
    pytest.param(["info", "{runs}/bayes/metrics.json"], "metrics.json", id="info-of-json"),
    pytest.param(["info", "{tmp}/no"], "{tmp}/no", id="info-of-nothing"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    run: Any, trained: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"tmp": tmp_path, "runs": trained}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("bqnn: error: ") and result.err.count("\n") == 1
    assert message.format(**places) in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_real_process(tmp_path: Path) -> None:
    result = in_new_process("info", tmp_path / "no")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("bqnn: error: ") and "Traceback" not in result.stderr


def test_a_backend_that_is_not_there_is_an_error(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "cuda")
    result = run("eval", folder / "bayes")
    assert result.status == 2
    assert result.err.startswith("bqnn: error: ")


def test_a_loss_that_is_nan_is_status_1(run: Any, tmp_path: Path) -> None:
    result = run("train", "--out", tmp_path, *SHORT, "--lr", 1e30)
    assert result.status == 1
    assert result.err.startswith("bqnn: error: the loss of epoch 1 is nan")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["trian"], id="unknown-command"),
        pytest.param(["train"], id="no-out"),
        pytest.param(["train", "--out", "x", "--method", "svm"], id="choice"),
        pytest.param(["train", "--out", "x", "--epochs", "two"], id="type"),
        pytest.param(["train", "--out", "x", "--resume", "--force"], id="resume-and-force"),
        pytest.param(["train", "--out", "x", "--num", "3"], id="abbreviation"),
    ],
)
def test_what_can_not_be_parsed_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: bqnn" in capsys.readouterr().err


def test_threads_are_set(run: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run("info", tmp_path, "--threads", 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"{bqnn.__version__}\n")


@pytest.mark.parametrize(
    "changes, title",
    [
        ({"method": "fpnn"}, "FPNN, lenet5 on digits, seed 0"),
        ({}, "M = 3, moment, spike-and-slab, lenet5 on digits, seed 0"),
        (
            {"prior": "gaussian", "partition": "learned", "granularity": "channel", "seed": 2},
            "M = 3, moment, Gaussian prior, learned partition, a codebook a channel, lenet5 on digits, seed 2",
        ),
        ({"prior": "mixture"}, "M = 3, moment, mixture prior, lenet5 on digits, seed 0"),
        ({"estimator": "deterministic", "num_levels": 5}, "M = 5, deterministic, lenet5 on digits, seed 0"),
    ],
    ids=["fpnn", "default", "all", "mixture", "deterministic"],
)
def test_title_of_a_run(changes: dict[str, Any], title: str) -> None:
    assert runs.Run(Path("x"), replace(Recipe(), **changes), [], {}).title == title


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"recipe": {"size": 1}, "history": []}', '{"recipe": {"lr": -1}, "history": []}']
)
def test_a_damaged_metrics_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / METRICS).write_text(content)
    with pytest.raises(ValueError, match=f"{METRICS} is not what bqnn train writes"):
        runs.load_run(tmp_path)


def test_an_empty_split_is_named() -> None:
    data = runs.load_data(Recipe(validation=0), "data")
    with pytest.raises(ValueError, match="validation split of digits is empty"):
        find_split(data, "validation")


def test_damaged_or_alien_weights_are_named(folder: Path) -> None:
    run = runs.load_run(folder / "bayes")
    (run.folder / WEIGHTS).write_bytes((folder / "fpnn" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=f"{WEIGHTS} is of another recipe"):
        runs.load_network(run)
    (run.folder / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not what"):
        runs.load_network(run)
    (run.folder / WEIGHTS).unlink()
    assert not run.finished
    with pytest.raises(FileNotFoundError, match="--resume"):
        runs.load_network(run)


def test_networks_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append("slow")
        clock[0] += 2.0
        return x

    def fast(x: torch.Tensor) -> torch.Tensor:
        calls.append("fast")
        clock[0] += 1.0
        return x

    assert measure_side_by_side([slow, fast], torch.zeros(1), repeats=3) == [2.0, 1.0]
    assert calls == ["slow", "fast"] * 5


def test_console_script_is_this_command() -> None:
    script = Path(sys.executable).with_name("bqnn")
    if not os.access(script, os.X_OK):
        pytest.skip("the package is not installed with its console script")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"{bqnn.__version__}\n"
