"""The record of the sources that have passed the sanitizers: what it holds for, and what ends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import passed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "csrc/cpu/base/vec.h",
        "csrc/cpu/vec.cpp",
        "csrc/bindings/cpu.cpp",
        "csrc/tests/cases.inl",
        *passed.BUILT_WITH,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def record(root: Path) -> Path:
    path = root / "passed.json"
    path.write_text(json.dumps({"sources": passed.digest(root), "instruction_set": "avx2"}))
    return path


def test_the_same_sources_have_passed_here_and_with_fewer_instructions(root: Path, record: Path) -> None:
    assert [passed.have_passed(record, root, level) for level in passed.LEVELS] == [True, True, False]
    assert not passed.have_passed(root / "none.json", root, "scalar")


@pytest.mark.parametrize("change", ["text", "name", "another", "gone", "flags"])
def test_other_sources_have_not(root: Path, record: Path, change: str) -> None:
    kernel = root / "csrc/cpu/vec.cpp"
    if change == "text":
        kernel.write_text("another")
    elif change == "name":
        kernel.rename(kernel.with_name("wide.cpp"))
    elif change == "another":
        (root / "csrc/cpu/empty.h").touch()
    elif change == "gone":
        kernel.unlink()
    else:
        (root / "Makefile").write_text("-O0")
    assert not passed.have_passed(record, root, "avx2")


def test_what_is_no_source_changes_nothing(root: Path, record: Path) -> None:
    (root / "csrc/cpu/notes.md").touch()
    (root / "csrc/cuda").mkdir()
    assert passed.have_passed(record, root, "avx2")


def test_the_instruction_set_is_the_processors(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert passed.instruction_set(cpuinfo) == "scalar"
    for flags, level in (("sse2", "scalar"), ("sse2 avx2", "avx2"), ("avx2 avx512f avx512_vnni", "avx512")):
        cpuinfo.write_text(f"flags\t\t: {flags}\n")
        assert passed.instruction_set(cpuinfo) == level
