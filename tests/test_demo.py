"""The demonstration: in short, and once as a user runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bqnn
from bqnn.cli import demo
from bqnn.cli import main as cli
from bqnn.cli.demo import format_table, run_demo
from bqnn.files import network
from bqnn.lab.recipes import load_recipe
from bqnn.lab.runs import load_run

SHORT = replace(load_recipe("lenet5-digits"), pretrain_epochs=2, deterministic_epochs=1, epochs=1)


def test_short_demo(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_demo(tmp_path, SHORT, log=lines.append)
    assert list(result) == ["fpnn", "packed", "compiled-fp32", "compiled-int8"]
    file = tmp_path / "packed.safetensors"
    assert result["packed"]["bytes"] == file.stat().st_size
    assert result["fpnn"]["bytes"] > 10 * result["packed"]["bytes"]
    assert result["fpnn"]["bits"] == 32 and 1.6 <= result["packed"]["bits"] < 1.63
    assert all(row["seconds"] > 0 for row in result.values())
    assert result["compiled-fp32"]["accuracy"] == pytest.approx(result["packed"]["accuracy"], abs=0.3)
    assert result["compiled-int8"]["accuracy"] == pytest.approx(result["packed"]["accuracy"], abs=3)
    for precision in ("fp32", "int8"):
        path, row = tmp_path / f"packed.compiled-{precision}.safetensors", result[f"compiled-{precision}"]
        assert row["bytes"] == path.stat().st_size and row["bits"] == pytest.approx(result["packed"]["bits"])
        assert isinstance(bqnn.load(path), bqnn.CompiledNetwork)
    assert "<svg" in (tmp_path / "report.html").read_text()
    bayes, fpnn = load_run(tmp_path / "bayes"), load_run(tmp_path / "fpnn")
    assert bayes.recipe == SHORT and fpnn.recipe == replace(SHORT, method="fpnn")
    assert [record["epoch"] for record in bayes.history] == [3, 4], "the first phase is shared"
    assert [100 - run.scores["test"]["error"] for run in (fpnn, bayes)] == pytest.approx(
        [result["fpnn"]["accuracy"], result["packed"]["accuracy"]]
    )
    assert len(network.info(file)["layers"]) == 5
    assert isinstance(bqnn.load(file).fc1, bqnn.PackedLinear)
    text = "\n".join(lines)
    assert "agree on all 360 test images" in text
    assert format_table(result, 3, 360, demo.BATCH) in text


def test_the_demo_can_be_run_again(tmp_path: Path) -> None:
    first = run_demo(tmp_path, SHORT, log=lambda line: None)
    (tmp_path / "bayes" / "notes.txt").write_text("mine")
    second = run_demo(tmp_path, SHORT, log=lambda line: None)
    for name in ("accuracy", "bits", "bytes"):
        assert [row[name] for row in first.values()] == [row[name] for row in second.values()]
    assert (tmp_path / "bayes" / "notes.txt").read_text() == "mine"


def test_predictions_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_bias(net: torch.nn.Module, path: Path, metadata: bqnn.Metadata) -> torch.nn.Module:
        packed = bqnn.pack(net)
        network.save(packed, path)
        packed.fc3.bias += 100 * torch.eye(10)[0]
        return packed

    monkeypatch.setattr(demo, "save_packed", other_bias)
    with pytest.raises(RuntimeError, match=r"disagree on \d+ of 360 images"):
        run_demo(tmp_path, SHORT, log=lambda line: None)


def test_table() -> None:
    result = {
        "fpnn": {"accuracy": 98.0, "bits": 32.0, "bytes": 1000, "seconds": 0.002},
        "packed": {"accuracy": 97.5, "bits": 1.6, "bytes": 100, "seconds": 0.001},
        "compiled-int8": {"accuracy": 97.0, "bits": 1.6, "bytes": 125, "seconds": 0.0002},
    }
    _, dense, packed, compiled, note = format_table(result, 3, 360, 256).splitlines()
    assert dense.split() == ["FPNN", "98.00", "%", "32.00", "1,000", "1.0", "x", "2.00", "1.00"]
    assert packed.split() == ["M", "=", "3,", "packed", "97.50", "%", "1.60", "100", "10.0", "x", "1.00", "0.50"]
    assert compiled.split() == ["compiled,", "int8", "97.00", "%", "1.60", "125", "8.0", "x", "0.20", "0.10"]
    assert "360" in note and "256" in note


def test_the_demo_itself_is_within_a_point_of_full_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    dense = next(row for row in rows if row[:1] == ["FPNN"])
    packed = next(row for row in rows if row[:4] == ["M", "=", "3,", "packed"])
    integers = next(row for row in rows if row[:2] == ["compiled,", "int8"])
    accuracies = float(dense[1]), float(packed[4])
    assert accuracies[0] > 96.0
    assert accuracies[1] >= accuracies[0] - 1.0
    assert float(integers[2]) >= accuracies[1] - 1.0
