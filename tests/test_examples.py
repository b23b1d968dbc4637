"""The programs of examples/: each runs, and does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, **settings: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"](**settings)


def test_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("own_loop.py")
    assert found["error"] < 7.0 and found["near_share"] > 0.95
    assert f"error {found['error']:.2f} %" in capsys.readouterr().out


def test_regression(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("regression.py")
    assert found["noise"] == pytest.approx(0.1, abs=0.03)
    assert 0.9 < found["within"] < 0.99
    assert "within two deviations" in capsys.readouterr().out


def test_image_classification(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("image_classification.py")
    assert found["error"] == pytest.approx(found["fitted"], abs=0.5) and found["error"] < 5.0
    assert "bytes on disk" in capsys.readouterr().out


def test_image_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run("image_folder.py", images=300, epochs=4)
    assert re.search(r"digit-\d/\d+\.jpeg is of the class digit-\d, by \d+ %", capsys.readouterr().out)


def test_resnet18(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("resnet18.py", images=32, epochs=(0, 1, 1))
    assert found["agreement"] > 0.99 and found["smaller"] > 8
    assert "bytes on disk" in capsys.readouterr().out


def test_mlp(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("mlp.py", epochs=12)
    assert found["error"] == pytest.approx(found["fitted"], abs=0.5) and found["error"] < 10.0
    assert "error of the packed network" in capsys.readouterr().out


def test_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("encoder.py", sequences=1000, epochs=(8, 1, 1))
    assert found["right"] > 0.25, "whoever says the same of all is right as often"
    assert "entropy" in capsys.readouterr().out


def test_other_layers(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("other_layers.py")
    assert found["layers"] == ["symbols", "pairs", "memory.ih_l0", "memory.hh_l0", "head"]
    assert found["left"] == ["norm"] and found["right"] > 0.9
    assert "few numbers" in capsys.readouterr().out


def test_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("hugging_face.py", sequences=300, epochs=3)
    assert found["right"] > 0.4
    assert "SequenceClassifierOutput as before" in capsys.readouterr().out


def test_timm_network(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("timm_network.py", images=128, epochs=3)
    assert found["error"] == pytest.approx(found["fitted"], abs=1.0)
    assert "error of the compiled network" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers
def test_lightning_module(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason="Lightning, of the extra lightning, is not installed")
    found = run("lightning_module.py", epochs=8)
    assert found["error"] < 10.0
    out = capsys.readouterr().out
    assert len(re.findall("train_nll", out)) == 8 and "train_kl" in out


def test_scikit_learn(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("scikit_learn.py", epochs=12)
    assert found["right"] > 0.9 and found["packed"] > 0.9
    assert "4 levels:" in capsys.readouterr().out


def test_ensemble(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("ensemble.py", networks=3, epochs=8)
    assert found["error"] <= found["mean_error"] and found["noise"] > found["known"] > 0
    assert "bytes on disk for 3 networks" in capsys.readouterr().out


def test_every_example_is_run() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
