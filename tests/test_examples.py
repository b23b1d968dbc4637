"""The programs of examples/: each runs, and does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]()


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


def test_every_example_is_run() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
