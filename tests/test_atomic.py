"""write_atomically: the old file or the new one, whatever happens in between."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bqnn.core.files import remove_leftovers, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_text(text: str):
    return lambda path: Path(path).write_text(text)


@pytest.mark.parametrize("old", [None, "old"], ids=["new-file", "replaced-file"])
def test_writes_the_whole_file_and_nothing_else(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "state"
    if old is not None:
        path.write_text(old)
    write_atomically(path, write_text("new"))
    assert path.read_text() == "new"
    assert names(tmp_path) == ["state"]


def test_takes_a_string_as_path(tmp_path: Path) -> None:
    write_atomically(str(tmp_path / "state"), write_text("new"))
    assert (tmp_path / "state").read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def write_half(temporary: str) -> None:
        Path(temporary).write_text("ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write_half)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def write(temporary: str) -> None:
        Path(temporary).write_text("new")
        assert path.read_text() == "old"
        assert Path(temporary).parent == tmp_path, "a file elsewhere may be on a disk that can't be renamed from"

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_mode_is_that_of_an_ordinary_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "state", write_text("new"))
        assert os.umask(0o027) == 0o027, "the umask is as before"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "state", write_text("new"))


def test_leftovers_of_a_killed_write_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".state", ".states.x1", "other.x1", "state", "state.x1"]
    for name in (*kept, ".state.abcd1234", ".state.x"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "state")
    assert names(tmp_path) == sorted(kept)


def test_what_a_killed_write_leaves_is_a_leftover(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint[1].pt"  # a pattern would read these characters
    child = os.fork()
    if child == 0:
        write_atomically(path, lambda temporary: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(names(tmp_path)) == 1
    remove_leftovers(path)
    assert names(tmp_path) == []
