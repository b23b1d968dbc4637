"""What bqnn.core.machine says of the processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import bqnn
from bqnn.core import machine


def test_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    text = "processor\t: 0\nmodel name\t: Some CPU: fast\ncpu family\t: 6\nmodel\t\t: 207\nstepping\t: 2\n\nbogus\n"
    (tmp_path / "cpuinfo").write_text(text)
    assert machine.cpuinfo()["model name"] == "Some CPU: fast"
    assert machine.describe_cpu() == {
        "cpu": "Some CPU: fast",
        "cpu_family_model_stepping": ["6", "207", "2"],
        "cpu_isa": bqnn.cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def test_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path)  # a folder: it can not be read
    assert machine.cpuinfo() == {}
    found = machine.describe_cpu()
    assert found["cpu"] and found["cpu_family_model_stepping"] == [None] * 3


def test_versions() -> None:
    expected = {"python": platform.python_version(), "torch": torch.__version__, "bqnn": bqnn.__version__}
    assert machine.versions() == expected
