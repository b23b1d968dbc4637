"""The bytes of a packed file: a safetensors file in which no byte can change unnoticed.

The metadata of the safetensors header has one key, "bqnn", whose value is compact JSON: what :mod:`bqnn.files.network`
describes, after a field "crc32" of hexadecimal CRC-32s, eight digits each: first that of the header with its length
before it, computed with these eight digits zero, then that of each tensor, in the order of their sorted names.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from bqnn.core.files import FormatError

VERSION = 1
"""Of what every file has. A tensor or a field that files can do without is no new version: whoever does not know it
refuses the file and names it, and a file without it has the bytes that it always had."""
KEY = "bqnn"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

MAX_DIMENSIONS = 64  # of a tensor; torch's own operations take no more
MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
MAX_DEPTH = 8  # of lists and objects in JSON; files have 5
RESERVED = "__metadata__"  # the one name that no tensor can have

_LENGTH_BYTES = 8  # the header's length, little-endian, before the header
_CRC_DIGITS = 8
_BEFORE_CRC = ('{"__metadata__":{"' + KEY + '":' + json.dumps('{"crc32":"')[:-1]).encode()
_CRC_START = _LENGTH_BYTES + len(_BEFORE_CRC)
_LARGEST = (1 << 63) - 1
_PIECE_BYTES = 1 << 20  # read at a time where a tensor is only looked through


class Entry(NamedTuple):
    """Where a tensor lies in the file: ``begin`` and ``end`` count from the start of the file, in bytes."""

    dtype: str
    shape: list[int]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class Contents(NamedTuple):
    """A file whose header agrees with its CRC and whose tensors fill it. They are read from ``source`` on demand."""

    metadata: dict[str, Any]
    entries: dict[str, Entry]
    crc32: dict[str, str]  # of each tensor, by its name
    header_bytes: int
    file_bytes: int
    source: BinaryIO
    prefix: str = ""
    """What the names of a part of the file begin with; who asks for the part names them without it."""
    part: dict[str, Entry] | None = None
    """The tensors of a part by all of their names, without the prefix."""

    def stored_as(self, name: str) -> str:
        """The name under which the file stores the tensor ``name``: another one where it is an alias."""
        full = self.prefix + name
        return self.metadata.get("alias", {}).get(full, full)

    def by_name(self) -> dict[str, Entry]:
        """The tensors by every name that they have."""
        if self.part is not None:
            return self.part
        alias = self.metadata.get("alias", {})
        return self.entries | {name: self.entries[stored] for name, stored in alias.items()}

    def check_tensors(self) -> None:
        """Reads every tensor, a piece at a time; raises FormatError where one differs from its CRC."""
        for name, entry in self.entries.items():
            self.source.seek(entry.begin)
            left, crc = entry.size, 0
            while left and (piece := self.source.read(min(left, _PIECE_BYTES))):
                left, crc = left - len(piece), zlib.crc32(piece, crc)
            self._compare(name, crc)

    def tensor(self, name: str) -> Tensor:
        """A new tensor with what the file holds for ``name``; raises FormatError where it differs from its CRC."""
        entry = self.entries[name]
        self.source.seek(entry.begin)
        data = bytearray(self.source.read(entry.size))
        self._compare(name, zlib.crc32(data))
        dtype = DTYPES[entry.dtype]
        if not data:
            return torch.empty(entry.shape, dtype=dtype)
        # Cloned as bytes: the clone lies where memory of every dtype may lie, the bytes in the file lie anywhere.
        bits = torch.frombuffer(data, dtype=torch.uint8).clone()
        if dtype == torch.bool and int(bits.max()) > 1:
            raise FormatError(f"tensor {name!r} is BOOL and must have bytes of 0 and 1, got {int(bits.max())}")
        return bits.view(dtype).view(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: self.tensor(name) for name in self.entries}

    def _compare(self, name: str, crc: int) -> None:
        if f"{crc:08x}" != self.crc32[name]:
            raise FormatError(f"tensor {name!r} is damaged: its CRC-32 differs")


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The file with ``tensors`` (contiguous, no two in the same memory) and ``metadata`` (JSON-able).

    Raises:
        ValueError: a tensor has a dtype, a name or more dimensions than the file can hold.
    """
    import safetensors.torch

    for name, tensor in tensors.items():
        if name == RESERVED:
            raise ValueError(f"tensor {name!r} must have another name: in a file this one is taken")
        if tensor.dim() > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} must have at most {MAX_DIMENSIONS} dimensions, got {tensor.dim()}")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name!r} must have a dtype that safetensors can hold, got {tensor.dtype}")
    blank = {"crc32": "0" * _CRC_DIGITS * (1 + len(tensors)), "version": VERSION, **metadata}
    text = json.dumps(blank, separators=(",", ":"))
    blob = bytearray(safetensors.torch.save(dict(tensors), metadata={KEY: text}))
    if not blob.startswith(_BEFORE_CRC, _LENGTH_BYTES):
        raise RuntimeError("this version of safetensors writes its header in another order; bqnn can not save with it")
    header_blob, header = _read_header(io.BytesIO(blob), len(blob))
    header_bytes = len(header_blob)
    entries = _read_entries(header, header_bytes, len(blob))
    digits = "".join(_crc32(blob[entries[name].begin : entries[name].end]) for name in sorted(entries))
    after_header_crc = _CRC_START + _CRC_DIGITS
    blob[after_header_crc : after_header_crc + len(digits)] = digits.encode()
    blob[_CRC_START:after_header_crc] = _crc32(blob[:header_bytes]).encode()
    return bytes(blob)


def parse(blob: bytes) -> Contents:
    """Checks every byte of a file that is in memory.

    Raises:
        FormatError: it is not one that :func:`to_bytes` made.
    """
    contents = read(io.BytesIO(blob))
    contents.check_tensors()
    return contents


def read(source: BinaryIO) -> Contents:
    """Checks the header of a file: whatever it claims is held against the size of the file before it takes memory.

    Raises:
        FormatError: it is not one that :func:`to_bytes` made.
    """
    file_bytes = source.seek(0, os.SEEK_END)
    header_blob, header = _read_header(source, file_bytes)
    metadata = _read_metadata(header)
    version = metadata.get("version")
    if type(version) is not int or version != VERSION:  # True and 1.0 are equal to 1, and no version
        raise FormatError(f"the format version is {version!r:.80}; this bqnn reads {VERSION}")
    crc32 = metadata.pop("crc32", None)
    if (
        not isinstance(crc32, str)
        or not crc32.isascii()
        or not header_blob.startswith(_BEFORE_CRC + crc32[:_CRC_DIGITS].encode(), _LENGTH_BYTES)
    ):
        raise FormatError("the header does not start with its CRC-32")
    blank = bytearray(header_blob)
    blank[_CRC_START : _CRC_START + _CRC_DIGITS] = b"0" * _CRC_DIGITS
    if _crc32(blank) != crc32[:_CRC_DIGITS]:
        raise FormatError("the header is damaged: its CRC-32 differs")
    entries = _read_entries(header, len(header_blob), file_bytes)
    if len(crc32) != _CRC_DIGITS * (1 + len(entries)):
        raise FormatError(f"the header has {len(entries)} tensors but CRC-32s of {len(crc32) // _CRC_DIGITS - 1}")
    each = {
        name: crc32[_CRC_DIGITS * index : _CRC_DIGITS * (index + 1)]
        for index, name in enumerate(sorted(entries), start=1)
    }
    return Contents(metadata, entries, each, len(header_blob), file_bytes, source)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether ``value``, read from JSON, is an integer from ``least`` to what 64 bits hold."""
    return type(value) is int and least <= value < 1 << 63


def _crc32(data: bytes | bytearray) -> str:
    return f"{zlib.crc32(data):08x}"


def _parse_json(what: str, text: bytes | str) -> dict[str, Any]:
    """A JSON object; a key that comes twice, NaN and too deep a nesting are refused."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key comes twice")
        return result

    def no_constants(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the {what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"the {what} must be a JSON object, got {type(value).__name__}")
    layer: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    if layer:
        raise FormatError(f"the {what} is nested deeper than {MAX_DEPTH} levels")
    return value


def _read_header(source: BinaryIO, file_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the header with its length before it, and the header."""
    source.seek(0)
    length = source.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        raise FormatError(f"it has {file_bytes} bytes, too few for the length of a header")
    header_bytes = int.from_bytes(length, "little")
    if _LENGTH_BYTES + header_bytes > file_bytes:
        raise FormatError(f"it has {file_bytes} bytes, its header alone would end at {_LENGTH_BYTES + header_bytes}")
    if header_bytes > MAX_HEADER_BYTES:
        raise FormatError(f"its header has {header_bytes} bytes; {MAX_HEADER_BYTES} are the most that it may have")
    text = source.read(header_bytes)
    return length + text, _parse_json("header", text)


def _read_metadata(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get(RESERVED)
    if not isinstance(metadata, dict) or list(metadata) != [KEY] or not isinstance(metadata[KEY], str):
        raise FormatError(f"its metadata must be the text {KEY!r} alone; bqnn.save did not write this file")
    return _parse_json(f"metadata {KEY!r}", metadata[KEY])


def _read_entries(header: dict[str, Any], header_bytes: int, file_bytes: int) -> dict[str, Entry]:
    """The tensors, which have to fill the file from the header to its end, without holes or overlaps."""
    entries = {name: _read_entry(name, value, header_bytes) for name, value in header.items() if name != RESERVED}
    position, before = header_bytes, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            relation = "overlaps" if entry.begin < position else "leaves a hole after"
            raise FormatError(f"tensor {name!r} {relation} {before}: it begins at {entry.begin}, not at {position}")
        if entry.end > file_bytes:
            raise FormatError(f"tensor {name!r} is cut off: it ends at {entry.end}, the file at {file_bytes}")
        position, before = entry.end, f"tensor {name!r}"
    if position != file_bytes:
        raise FormatError(f"{file_bytes - position} bytes follow {before}, the last thing in the header")
    return entries


def _read_entry(name: str, value: Any, header_bytes: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r} must have dtype, shape and data_offsets, got {value!r:.80}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"tensor {name!r} must have one of the dtypes {', '.join(DTYPES)}, got {dtype!r:.80}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(is_count(number) for number in numbers):
            raise FormatError(f"the {key} of tensor {name!r} must be counts, got {numbers!r:.80}")
    if len(offsets) != 2:
        raise FormatError(f"the data_offsets of tensor {name!r} must be two, got {offsets!r:.80}")
    begin, end = offsets
    if not _takes(shape, DTYPES[dtype].itemsize, end - begin):
        raise FormatError(f"tensor {name!r} of shape {shape!s:.80} and dtype {dtype} can not take {end - begin} bytes")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"tensor {name!r} has {len(shape)} dimensions; {MAX_DIMENSIONS} are the most it may have")
    return Entry(dtype, shape, header_bytes + begin, header_bytes + end)


def _takes(shape: list[int], itemsize: int, size: int) -> bool:
    """Whether a tensor takes ``size`` bytes; it multiplies no further than that, for the numbers may be of any size."""
    empty = 0 in shape
    most = _LARGEST if empty else size  # the strides of an empty tensor have to fit 64 bits, too
    product = itemsize
    for count in shape:
        product *= max(count, 1)
        if product > most:
            return False
    return size == (0 if empty else product)
