"""Files that are whole or not there, and files that are read only where they are files."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

RANDOM_DIGITS = 8  # of a temporary name
USUAL_NAME_BYTES = 255  # what a name may take where the system does not say


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Lets ``write(temporary path)`` make a file beside ``path``, then puts it in its place in one step.

    A kill at any moment leaves the old file or the new one. What is written is on the disk before it gets the name. A
    file that is replaced hands on its mode and, as far as the system allows, its owner and group; where ``path`` is a
    symbolic link, the file that it points to is replaced. A new file has the mode of any new file. A hard link to the
    old file keeps the old content.

    Raises:
        OSError: nothing can be written there, or ``path`` is a folder, device, FIFO or socket; the error names
            ``path``, and what was there is still there.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        old = _status(target)
        # Nobody but the owner reads what will replace a private file, not even while it is written.
        temporary = _create_beside(target, 0o666 if old is None else 0o600)
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode if old is None else _hand_on_owner(old, temporary))
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and _is_about(error, target):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def write_content(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Makes ``content``, where it is a text in UTF-8, that of the file ``path``, as :func:`write_atomically` does.

    Raises:
        OSError: as there.
    """
    data = content.encode() if isinstance(content, str) else content
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files that kills left beside ``path``; nobody else may be writing it."""
    target = Path(os.path.realpath(path))
    prefix = _temporary_prefix(target)
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix) and not entry.is_dir():
            entry.unlink(missing_ok=True)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """``path``, opened to be read as bytes.

    Raises:
        OSError: it can not be opened, or is no regular file: a FIFO would be waited for and a device never end.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(file).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def _status(target: Path) -> os.stat_result | None:
    """What the system says of ``target``, None where there is nothing; raises OSError where it is no regular file."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a device, FIFO or socket, which no file can replace", str(target))
    return status


def _temporary_prefix(target: Path) -> str:
    """What the temporary names of ``target`` begin with: its own name, or a digest of one that leaves no room."""
    try:
        limit = os.pathconf(target.parent, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        limit = USUAL_NAME_BYTES
    name = os.fsencode(target.name)
    if len(name) + len("..") + RANDOM_DIGITS <= limit:
        return f".{target.name}."
    return f".{hashlib.sha256(name).hexdigest()[:32]}."


def _is_about(error: OSError, target: Path) -> bool:
    """Whether ``error`` names ``target``, a temporary file of it, or nothing."""
    own = (str(target), str(target.with_name(_temporary_prefix(target))))
    return error.filename is None or os.fsdecode(error.filename).startswith(own)


def _create_beside(target: Path, mode: int) -> str:
    """Creates an empty file with a name of its own; the system takes the process's umask off ``mode``."""
    prefix = _temporary_prefix(target)
    while True:
        temporary = str(target.with_name(prefix + secrets.token_hex(RANDOM_DIGITS // 2)))
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            return temporary
        except FileExistsError:
            continue


def _hand_on_owner(old: os.stat_result, temporary: str) -> int:
    """Gives ``temporary`` owner and group of ``old``, as far as this process may, and returns the mode it should have.

    A group that stays another one gets what everybody had: the old group's permissions were not meant for it.
    """
    mode = stat.S_IMODE(old.st_mode)
    new = os.stat(temporary)
    if (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid):
        return mode
    try:
        os.chown(temporary, old.st_uid, old.st_gid)
        return mode
    except PermissionError:
        mode &= 0o777
    try:
        os.chown(temporary, -1, old.st_gid)
    except PermissionError:
        mode = mode & ~0o070 | (mode & 0o007) << 3
    return mode


class FormatError(ValueError):
    """A file is truncated, altered or not one that bqnn.save wrote; the message names the tensor and what is wrong."""
