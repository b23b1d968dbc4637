"""What the command says: in the words that were typed, with what a misspelt one may have meant, and on Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bqnn.cli import main as cli
from bqnn.core.text import duration, suggestion
from bqnn.lab.folder import CHECKPOINT
from bqnn.lab.progress import describe
from bqnn.lab.train import Trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
OUT = ["train", "--out", "{tmp}/x"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param([*OUT, "--num-levels", "99"], "--num-levels must be from 2 to 16, got 99", id="levels"),
        pytest.param([*OUT, "--lr", "-1"], "--lr must be positive, got -1.0", id="lr"),
        pytest.param([*OUT, "--bayes-lr", "inf"], "--bayes-lr must be positive, got inf", id="infinite"),
        pytest.param([*OUT, "--lr", "nan"], "--lr must be positive, got nan", id="nan"),
        pytest.param([*OUT, "--batch-size", "0"], "--batch-size must be positive, got 0", id="batch"),
        pytest.param([*OUT, "--codebook-lr", "-1"], "--codebook-lr must be at least 0, got -1.0", id="codebook"),
        pytest.param([*OUT, "--variance-lr", "-1"], "--variance-lr must be at least 0, got -1.0", id="variance"),
        pytest.param([*OUT, "--weight-decay", "-1"], "--weight-decay must be at least 0, got -1.0", id="decay"),
        pytest.param([*OUT, "--kl-warmup", "-1"], "--kl-warmup must be at least 0, got -1.0", id="warm-up"),
        pytest.param([*OUT, "--dataset", "mnits"], "--dataset must be one of digits, ", id="data-set"),
        pytest.param([*OUT, "--dataset", "mnits"], "got 'mnits'; did you mean mnist?", id="close-data-set"),
        pytest.param([*OUT, "--recipe", "lenet5-digts"], "did you mean lenet5-digits?", id="recipe"),
        pytest.param([*OUT, "--dataset", "folder:{tmp}/one"], "--dataset must have two classes or more", id="class"),
        pytest.param([*OUT, "--dataset", "folder:{tmp}/odd"], "; pass --image-size", id="sizes"),
        pytest.param(
            [*OUT, "--recipe", "{tmp}/a.toml"], "a.toml is no recipe: num_levels must be", id="field-of-a-file"
        ),
        pytest.param(["train", "--out", "{tmp}/m4", "--resume"], "m4 has no run to resume", id="resume-nothing"),
        pytest.param(["train", "--out", "{tmp}/runs/m4", "--resume"], "; did you mean m3?", id="resume-close"),
        pytest.param(["train", "--out", "{tmp}/no/m4", "--resume"], "m4 has no run to resume", id="resume-nowhere"),
    ],
)
def test_a_message_has_the_words_that_were_typed(run: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    make_mistakes(tmp_path)
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (result.status, result.out) == (2, "")
    assert message in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "no").exists()


def make_mistakes(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    for folder, size in (("one/cat", 6), ("odd/cat", 6), ("odd/dog", 9)):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (size, size)).save(tmp_path / folder / f"{index}.png")
    (tmp_path / "a.toml").write_text("num_levels = 99")
    for name in ("m3", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "m3" / CHECKPOINT).touch()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "did you mean train?"),
        (["train", "--out", "x", "--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        (["train", "--out", "x", "--epoch=3"], "did you mean --epochs?"),
        (["train", "--out", "x", "--method", "bayse"], "did you mean bayes?"),
        (["predict", "x", "y", "--sample", "3"], "did you mean --samples?"),
        (["info", "x", "y"], "unrecognized arguments: y\n"),
    ],
)
def test_misspelt_words(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith(f"usage: bqnn {arguments[0]}" if arguments[1:] else "usage: bqnn")


def test_suggestions_and_durations() -> None:
    assert suggestion("lenet", ["lenet5", "vgg7"]) == "; did you mean lenet5?"
    assert suggestion("x", ["lenet5"]) == "" == suggestion("x", [])
    assert [duration(each) for each in (0.2, 59.4, 59.6, 90, 3599, 7800)] == [
        "0 s", "59 s", "1 min", "2 min", "1 h 0 min", "2 h 10 min",
    ]  # fmt: skip


def test_an_epoch_in_a_line() -> None:
    record = {"epoch": 3, "phase": "bayes", "loss": 9.0, "nll": 0.25, "kl": 12345.6, "seconds": 30.0}
    record |= {"validation_error": 1.5, "validation_nll": 0.3, "quantization_loss": 0.01, "near_share": 0.9}
    line = describe(record, 20)
    assert line.startswith("epoch  3/20  bayes           nll 0.2500  kl 12,346 nats  validation error 1.50 %")
    assert line.endswith("30.0 s  about 8 min left") and "9.0" not in line
    other = describe({**record, "epoch": 20, "phase": "full precision", "quantization_loss": None}, 20)
    assert "kl" not in other and other.endswith("30.0 s")


def test_ctrl_c_before_there_is_a_run_names_none_to_resume(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", stop)
    result = run("train", "--out", tmp_path / "x")
    assert (result.status, result.err) == (130, "bqnn: interrupted\n")


def test_ctrl_c_while_importing_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bqnn").mkdir()
    (tmp_path / "bqnn" / "__init__.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    script = "import sys; from bqnn_command import main; sys.exit(main())"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "bqnn: interrupted\n")
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["scripts"] == {"bqnn": "bqnn_command:main"}
