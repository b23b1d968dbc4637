"""Files that are whole or not there."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Lets ``write(temporary path)`` make a file beside ``path``, then puts it in its place in one step.

    A kill at any moment leaves the old file or the new one. What is written is on the disk before it gets the name.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files that kills left beside ``path``; nobody else may be writing it."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class FormatError(ValueError):
    """A file is truncated, altered or not one that bqnn.save wrote; the message names the tensor and what is wrong."""
