"""The bytes of a packed file: a safetensors file in which no byte can change unnoticed.

The metadata of the safetensors header has one key, "bqnn", whose value is compact JSON: what :mod:`bqnn.files.network`
describes, after a field "crc32" of hexadecimal CRC-32s, eight digits each: first that of the header with its length
before it, computed with these eight digits zero, then that of each tensor, in the order of their sorted names.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.files import FormatError

VERSION = 1
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

_LENGTH_BYTES = 8  # the header's length, little-endian, before the header
_CRC_DIGITS = 8
_BEFORE_CRC = ('{"__metadata__":{"' + KEY + '":' + json.dumps('{"crc32":"')[:-1]).encode()
_CRC_START = _LENGTH_BYTES + len(_BEFORE_CRC)


class Entry(NamedTuple):
    """Where a tensor lies in the file: ``begin`` and ``end`` count from the start of the file, in bytes."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


class Contents(NamedTuple):
    """A file whose bytes are all accounted for and agree with their CRCs."""

    metadata: dict[str, Any]
    entries: dict[str, Entry]
    header_bytes: int
    blob: bytes

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        import safetensors.torch  # here, since only files need it

        try:
            return dict(safetensors.torch.load(self.blob))
        except Exception as error:  # whatever it objects to, it is the file's fault
            raise FormatError(f"safetensors can not read it: {error}") from error


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The file with ``tensors`` (contiguous, no two in the same memory) and ``metadata`` (JSON-able).

    Raises:
        ValueError: a tensor has a dtype that the file can not hold.
    """
    import safetensors.torch

    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name!r} must have a dtype that safetensors can hold, got {tensor.dtype}")
    blank = {"crc32": "0" * _CRC_DIGITS * (1 + len(tensors)), "version": VERSION, **metadata}
    text = json.dumps(blank, separators=(",", ":"))
    blob = bytearray(safetensors.torch.save(dict(tensors), metadata={KEY: text}))
    if not blob.startswith(_BEFORE_CRC, _LENGTH_BYTES):
        raise RuntimeError("this version of safetensors writes its header in another order; bqnn can not save with it")
    header_bytes, header = _read_header(bytes(blob))
    entries = _read_entries(header, header_bytes, len(blob))
    digits = "".join(_crc32(blob[entries[name].begin : entries[name].end]) for name in sorted(entries))
    after_header_crc = _CRC_START + _CRC_DIGITS
    blob[after_header_crc : after_header_crc + len(digits)] = digits.encode()
    blob[_CRC_START:after_header_crc] = _crc32(blob[:header_bytes]).encode()
    return bytes(blob)


def parse(blob: bytes) -> Contents:
    """Checks every byte of a file.

    Raises:
        FormatError: it is not one that :func:`to_bytes` made.
    """
    header_bytes, header = _read_header(blob)
    metadata = _read_metadata(header)
    if metadata.get("version") != VERSION:
        raise FormatError(f"the format version is {metadata.get('version')!r}; this bqnn reads {VERSION}")
    crc32 = metadata.pop("crc32", None)
    if (
        not isinstance(crc32, str)
        or not crc32.isascii()
        or not blob.startswith(_BEFORE_CRC + crc32[:_CRC_DIGITS].encode(), _LENGTH_BYTES)
    ):
        raise FormatError("the header does not start with its CRC-32")
    blank = bytearray(blob[:header_bytes])
    blank[_CRC_START : _CRC_START + _CRC_DIGITS] = b"0" * _CRC_DIGITS
    if _crc32(blank) != crc32[:_CRC_DIGITS]:
        raise FormatError("the header is damaged: its CRC-32 differs")
    entries = _read_entries(header, header_bytes, len(blob))
    if len(crc32) != _CRC_DIGITS * (1 + len(entries)):
        raise FormatError(f"the header has {len(entries)} tensors but CRC-32s of {len(crc32) // _CRC_DIGITS - 1}")
    for index, name in enumerate(sorted(entries), start=1):
        stored = crc32[_CRC_DIGITS * index : _CRC_DIGITS * (index + 1)]
        if _crc32(blob[entries[name].begin : entries[name].end]) != stored:
            raise FormatError(f"tensor {name!r} is damaged: its CRC-32 differs")
    return Contents(metadata, entries, header_bytes, blob)


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
    return value


def _read_header(blob: bytes) -> tuple[int, dict[str, Any]]:
    """The bytes of the header with its length, and the header."""
    if len(blob) < _LENGTH_BYTES:
        raise FormatError(f"it has {len(blob)} bytes, too few for the length of a header")
    header_bytes = _LENGTH_BYTES + int.from_bytes(blob[:_LENGTH_BYTES], "little")
    if header_bytes > len(blob):
        raise FormatError(f"it has {len(blob)} bytes, its header alone would end at {header_bytes}")
    return header_bytes, _parse_json("header", blob[_LENGTH_BYTES:header_bytes])


def _read_metadata(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or list(metadata) != [KEY] or not isinstance(metadata[KEY], str):
        raise FormatError(f"its metadata must be the text {KEY!r} alone; bqnn.save did not write this file")
    return _parse_json(f"metadata {KEY!r}", metadata[KEY])


def _read_entries(header: dict[str, Any], header_bytes: int, file_bytes: int) -> dict[str, Entry]:
    """The tensors, which have to fill the file from the header to its end, without holes or overlaps."""
    entries = {name: _read_entry(name, value, header_bytes) for name, value in header.items() if name != "__metadata__"}
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
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise FormatError(f"tensor {name!r} of shape {shape!s:.80} and dtype {dtype} can not take {end - begin} bytes")
    return Entry(dtype, shape, header_bytes + begin, header_bytes + end)
