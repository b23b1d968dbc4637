"""write_atomically: the old file or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from bqnn.core.files import open_regular, remove_leftovers, write_atomically, write_content


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


@pytest.mark.parametrize("content", ["n\u00e4her\n", "n\u00e4her\n".encode()], ids=["text", "bytes"])
def test_a_content_is_written_as_a_whole(tmp_path: Path, content: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    write_content(path, content)
    assert path.read_bytes() == "n\u00e4her\n".encode() and names(tmp_path) == ["state"]

    def fail(*paths: object) -> None:
        raise OSError(errno.EIO, "it fails", str(path))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="it fails"):
        write_content(path, "new")
    assert path.read_bytes() == "n\u00e4her\n".encode() and names(tmp_path) == ["state"]


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


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444, 0o751])
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    path.chmod(mode)
    write_atomically(path, write_text("new"))
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_will_replace_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    path.chmod(0o644)

    def write(temporary: str) -> None:
        assert stat.S_IMODE(os.stat(temporary).st_mode) == 0o600
        Path(temporary).write_text("new")

    write_atomically(path, write)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_that_is_replaced_hands_on_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    os.chown(path, 1234, 4321)
    write_atomically(path, write_text("new"))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@pytest.mark.parametrize("mode, kept", [(0o640, 0o600), (0o664, 0o644), (0o4755, 0o755)])
def test_a_group_that_can_not_be_kept_gets_no_more_than_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, kept: int
) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    path.chmod(mode)
    before, status = path.stat(), os.stat

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    def of_somebody_else(name: object, *args: object, **options: object) -> object:
        found = status(name, *args, **options)  # type: ignore[arg-type]
        if Path(str(name)) == path:
            values = list(found)
            values[4:6] = [before.st_uid + 1, before.st_gid + 1]
            return os.stat_result(values)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "chown", refuse)
        patch.setattr(os, "stat", of_somebody_else)
        write_atomically(path, write_text("new"))
    assert stat.S_IMODE(path.stat().st_mode) == kept


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for target in ("data/state", "data/new"):
        link = tmp_path / f"link-to-{Path(target).name}"
        link.symlink_to(target)
        if target == "data/state":
            (tmp_path / target).write_text("old")
        write_atomically(link, write_text("new"))
        assert link.is_symlink() and (tmp_path / target).read_text() == "new"
    assert names(tmp_path / "data") == ["new", "state"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="round"):
        write_atomically(tmp_path / "round", write_text("new"))
    assert (tmp_path / "round").is_symlink()


NAMES = ["a" * 255, "a" * 247, "a" * 245, "模" * 84, "\udcff" * 255]


@pytest.mark.parametrize("name", NAMES, ids=["255-bytes", "247-bytes", "245-bytes", "84-characters", "no-utf8"])
def test_every_name_that_the_system_takes_is_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    write_atomically(path, write_text("new"))
    assert path.read_text() == "new" and names(tmp_path) == [name]
    child = os.fork()
    if child == 0:
        write_atomically(path, lambda temporary: os._exit(9))
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 2
    remove_leftovers(path)
    assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_the_one_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / ("a" * 256), write_text("new"))
    assert error.value.errno == errno.ENAMETOOLONG and error.value.filename == str(tmp_path / ("a" * 256))


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(path))
        server.close()
    else:
        path = Path("/dev/null")
    before = path.stat()
    with pytest.raises(OSError, match=f"device, FIFO or socket.*{path}|Is a directory.*{path}"):
        write_atomically(path, write_text("new"))
    assert (path.stat().st_mode, path.stat().st_ino) == (before.st_mode, before.st_ino)
    assert names(tmp_path) == ([] if kind == "device" else ["state"])


def test_the_process_s_umask_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mask: int) -> int:
        raise AssertionError("the umask is the whole process's, other threads' too")

    monkeypatch.setattr(os, "umask", refuse)
    write_atomically(tmp_path / "state", write_text("new"))
    write_atomically(tmp_path / "state", write_text("newer"))


def test_two_writers_leave_the_file_of_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    texts = [str(number) * 10_000 for number in range(4)]

    def write_often(text: str) -> None:
        for _ in range(25):
            write_atomically(path, write_text(text))
            assert path.read_text() in texts

    threads = [threading.Thread(target=write_often, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and names(tmp_path) == ["state"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def fill(temporary: str) -> None:
        with open(temporary, "wb", buffering=0) as file, open("/dev/full", "wb", buffering=0) as full:
            file.write(b"ne")
            full.write(b"w")

    with pytest.raises(OSError) as error:
        write_atomically(path, fill)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and names(tmp_path) == ["state"]


def test_a_file_is_opened_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"old")
    with open_regular(tmp_path / "state") as file:
        assert file.read() == b"old"
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "fifo", "not a regular"),
        (Path("/dev/zero"), "not a regular"),
        (tmp_path, "Is a"),
    ):
        with pytest.raises(OSError, match=f"{message}.*{path}"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
