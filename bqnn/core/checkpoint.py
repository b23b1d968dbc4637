"""Checkpoints: what torch.save writes, with a digest of all of it at the end, so that no byte changes unnoticed.

The file is a zip archive, as torch.save makes it; the digest, SHA-256 in hexadecimal after a word that says what it is,
is the comment that an archive may end with, so that torch.load reads the file too.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bqnn.core.files import open_regular, write_atomically
from bqnn.core.text import shown

Fields = Mapping[str, type]
"""What a checkpoint holds, and of which type."""
LABEL = b"bqnn sha256 "
DIGEST_BYTES = 64  # hexadecimal
COMMENT_BYTES = len(LABEL) + DIGEST_BYTES
LENGTH_BYTES = 2  # of the comment's length, little-endian, the last thing in an archive that has none
PIECE_BYTES = 1 << 20  # read, or written to see whether that is possible, at a time


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes ``state``, whole or not at all.

    Raises:
        OSError: it can not be written; the checkpoint before is still there.
    """
    write_atomically(path, lambda temporary: _write(temporary, state))


def read_checkpoint(
    path: str | os.PathLike[str], fields: Fields, writer: str, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The state that :func:`write_checkpoint` wrote, its tensors on ``device``; nothing but tensors is unpickled.

    Args:
        fields: that it has to have.
        writer: who writes such checkpoints, for the messages.

    Raises:
        ValueError: the file is damaged, or no checkpoint; one line that names it.
        OSError: it can not be read.
    """
    with open_regular(path) as file:
        blob = file.read()
    if not _is_whole(blob):
        raise ValueError(f"{os.fsdecode(path)} is damaged, or no checkpoint that {writer} wrote: its digest differs")
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            entries = archive.infolist()
        if sum(each.file_size for each in entries) > len(blob):
            raise ValueError("it claims to hold more than its size")
        state = torch.load(io.BytesIO(blob), map_location=device, weights_only=True)
        _check_fields(state, fields)
    except Exception as error:  # torch.load raises what it likes, and whatever it is, it is the file's fault
        raise ValueError(f"{os.fsdecode(path)} is no checkpoint that {writer} wrote: {shown(str(error))}") from error
    return state


def digest_of(path: Path) -> bytes | None:
    """The digest at the end of the checkpoint at ``path``, unchecked; None where there is no file."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - DIGEST_BYTES))
            return file.read()
    except FileNotFoundError:
        return None


def _write(temporary: str, state: Mapping[str, Any]) -> None:
    try:
        torch.save(state, temporary)
    except RuntimeError as error:
        # torch.save does not say why it failed; where the disk is full, another write does.
        with open(temporary, "ab") as file:
            file.write(bytes(PIECE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        raise OSError(errno.EIO, f"torch.save failed: {shown(str(error))}") from error
    with open(temporary, "r+b") as file:
        file.seek(-LENGTH_BYTES, os.SEEK_END)
        if file.read() != bytes(LENGTH_BYTES):
            raise RuntimeError("this version of torch.save ends its archives in another way; bqnn can not save with it")
        file.seek(-LENGTH_BYTES, os.SEEK_END)
        file.write(COMMENT_BYTES.to_bytes(LENGTH_BYTES, "little") + LABEL)
        file.seek(0)
        digest = hashlib.sha256()
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
        file.write(digest.hexdigest().encode())


def _is_whole(blob: bytes) -> bool:
    body, digest = memoryview(blob)[:-DIGEST_BYTES], blob[-DIGEST_BYTES:]
    labelled = blob.endswith(LABEL, 0, len(body))
    return labelled and digest == hashlib.sha256(body).hexdigest().encode()


def _check_fields(state: Any, fields: Fields) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"it must hold a dict, got {type(state).__name__}")
    if missing := [name for name in fields if name not in state]:
        raise ValueError(f"it must have the field {missing[0]!r}")
    for name, kind in fields.items():
        # A bool is an int to isinstance.
        if not isinstance(state[name], kind) or (kind is int and type(state[name]) is not int):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {type(state[name]).__name__}")
