"""Damaged, alien and forged files: each one a FormatError that says what is wrong."""

from __future__ import annotations

import io as bytes_io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bqnn
from bqnn import models
from bqnn.core.files import FormatError
from bqnn.engine.pack import pack
from bqnn.files import container
from bqnn.files.network import info, load, save


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return pack(bqnn.convert(models.lenet5()))


@pytest.fixture
def lenet_file(lenet: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save(lenet, path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Changes metadata and tensors of a file and writes it with right CRCs, as no damage but a person could."""
    contents = container.parse(path.read_bytes())
    metadata, tensors = dict(contents.metadata), contents.tensors()
    del metadata["version"]
    change(metadata, tensors)
    path.write_bytes(container.to_bytes(tensors, metadata))


@pytest.fixture(scope="module")
def small_blob(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "net"
    save(pack(bqnn.convert(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))), path)
    return path.read_bytes()


def test_every_changed_byte_is_noticed(small_blob: bytes, tmp_path: Path) -> None:
    path, draw = tmp_path / "net", random.Random(0)
    for index in range(len(small_blob)):
        damaged = bytearray(small_blob)
        damaged[index] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            info(path)


def test_500_damaged_files(lenet_file: Path, tmp_path: Path) -> None:
    blob, path, draw = lenet_file.read_bytes(), tmp_path / "damaged", random.Random(1)

    def change(data: bytearray) -> bytes:
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        return bytes(data)

    damages: list[Callable[[], bytes]] = [
        lambda: change(bytearray(blob)),
        lambda: change(bytearray(blob[:3000])) + blob[3000:],
        lambda: blob[: draw.randrange(len(blob))],
        lambda: blob + draw.randbytes(draw.randrange(1, 9)),
        lambda: draw.randbytes(draw.randrange(2000)),
    ]
    for case in range(500):
        path.write_bytes(damages[case % len(damages)]())
        with pytest.raises(FormatError, match=str(path)):
            load(path)


@pytest.mark.parametrize("name", ["conv1.codes", "fc1.codes", "fc3.levels", "fc3.bias", "bn2.running_var"])
def test_a_damaged_tensor_is_named(name: str, lenet_file: Path) -> None:
    entry = container.parse(lenet_file.read_bytes()).entries[name]
    blob = bytearray(lenet_file.read_bytes())
    blob[entry.end - 1] ^= 1
    lenet_file.write_bytes(blob)
    with pytest.raises(FormatError, match=f"tensor '{name}' is damaged"):
        load(lenet_file)


def test_a_cut_tensor_is_named(lenet_file: Path) -> None:
    blob = lenet_file.read_bytes()
    entries = container.parse(blob).entries
    last = max(entries, key=lambda name: entries[name].end)
    lenet_file.write_bytes(blob[:-1])
    with pytest.raises(FormatError, match=f"tensor '{last}' is cut off"):
        load(lenet_file)


def alien_safetensors() -> bytes:
    return safetensors.torch.save({"weight": torch.ones(3)}, metadata={"format": "pt"})


def alien_zip() -> bytes:
    buffer = bytes_io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", "x")
    return buffer.getvalue()


def alien_torch() -> bytes:
    buffer = bytes_io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    return buffer.getvalue()


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 7, id="7-bytes"),
        pytest.param(b"\x00" * 8, id="no-header"),
        pytest.param(b"\xff" * 100, id="endless-header"),
        pytest.param(alien_safetensors(), id="safetensors"),
        pytest.param(safetensors.torch.save({"weight": torch.ones(3)}), id="safetensors-without-metadata"),
        pytest.param(pickle.dumps({"weight": [1.0]}), id="pickle"),
        pytest.param(alien_zip(), id="zip"),
        pytest.param(alien_torch(), id="torch.save"),
        pytest.param(b"#!/bin/sh\necho no network\n" * 5, id="text"),
        pytest.param(with_header(b"[" * 100_000), id="deep-nesting"),
        pytest.param(with_header(b"[]"), id="list"),
        pytest.param(with_header(b'{"a":1,"a":2}'), id="duplicate-key"),
        pytest.param(with_header(b'{"a":' + b"9" * 5000 + b"}"), id="long-number"),
        pytest.param(with_header(b'{"a":NaN}'), id="NaN"),
        pytest.param(with_header(b"\xff{}"), id="no-utf8"),
        pytest.param(with_header(b'{"__metadata__":{"bqnn":"[]"}}'), id="metadata-list"),
        pytest.param(with_header(b'{"__metadata__":{"bqnn":"{}"}}'), id="metadata-empty"),
        pytest.param(with_header(b'{"__metadata__":{"bqnn":"{\\"version\\":1,\\"crc32\\":\\"\\"}"}}'), id="no-crc"),
        pytest.param(
            with_header(b'{"__metadata__":{"bqnn":"{\\"crc32\\":\\"\\\\ud800\\",\\"version\\":1}"}}'),
            id="crc-surrogate",
        ),
        pytest.param(with_header(b'{"__metadata__":{"bqnn":"{\\"crc32\\":7,\\"version\\":1}"}}'), id="crc-number"),
        pytest.param(
            with_header('{"__metadata__":{"bqnn":"{\\"crc32\\":\\"ÿÿ\\",\\"version\\":1}"}}'.encode()), id="crc-text"
        ),
    ],
)
def test_alien_files(blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "alien"
    path.write_bytes(blob)
    for read in (load, info):
        with pytest.raises(FormatError, match=str(path)):
            read(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    for read in (load, info):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def header_with(blob: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """``blob`` with another header, whose own CRC is right."""
    contents = container.parse(blob)
    header = json.loads(blob[8 : contents.header_bytes])
    change(header)
    text = bytearray(json.dumps(header, separators=(",", ":")).encode())
    start = container._CRC_START
    whole = bytearray(len(text).to_bytes(8, "little") + text)
    whole[start : start + 8] = b"0" * 8
    whole[start : start + 8] = container._crc32(whole).encode()
    return bytes(whole) + blob[contents.header_bytes :]


def set_field(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(set_field("0.codes", "dtype", "U4"), "'0.codes' must have one of the dtypes", id="dtype"),
        pytest.param(set_field("0.codes", "dtype", ["U8"]), "'0.codes' must have one of the dtypes", id="dtype-list"),
        pytest.param(set_field("0.codes", "shape", [2, -1]), "shape of tensor '0.codes' must be counts", id="negative"),
        pytest.param(set_field("0.codes", "shape", [2, True]), "shape of tensor '0.codes' must be counts", id="bool"),
        pytest.param(set_field("0.codes", "shape", [2, 10**30]), "shape of tensor '0.codes' must be counts", id="huge"),
        pytest.param(
            set_field("0.codes", "shape", [2**62] * 300), "'0.codes' of shape .* can not take", id="huge-product"
        ),
        pytest.param(set_field("0.codes", "shape", [3, 1]), "'0.codes' of shape .* can not take 2 bytes", id="size"),
        pytest.param(set_field("0.codes", "data_offsets", [0]), "data_offsets of tensor '0.codes'", id="one-offset"),
        pytest.param(set_field("0.codes", "data_offsets", [0, 2]), "tensor '.*' overlaps", id="overlap"),
        pytest.param(set_field("0.codes", "data_offsets", [900, 902]), "'0.codes' leaves a hole", id="hole"),
        pytest.param(set_field("0.codes", "more", 1), "'0.codes' must have dtype, shape and data_offsets", id="field"),
        pytest.param(lambda header: header.update({"x": 1}), "'x' must have dtype", id="no-object"),
        pytest.param(lambda header: header.pop("0.codes"), "bytes follow", id="tensor-left-out"),
        pytest.param(
            lambda header: header.update(z={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
            "the header has 10 tensors but CRC-32s of 9",
            id="crc-count",
        ),
    ],
)
def test_bad_headers(change: Callable[[dict[str, Any]], None], message: str, small_blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(header_with(small_blob, lambda header: None))
    info(path)
    path.write_bytes(header_with(small_blob, change))
    for read in (load, info):
        with pytest.raises(FormatError, match=message):
            read(path)


def set_spec(layer: str, **fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        metadata["layers"][layer].update(fields)

    return change


def set_metadata(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda metadata, tensors: metadata.update(fields)


def set_tensor(name: str, value: Tensor | None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


def set_byte(name: str, value: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name][1, -1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(set_byte("fc1.codes", 243), "fc1.codes must hold base-3 digits.* got 243", id="code"),
        pytest.param(
            set_byte("fc3.codes", 81), "fc3.codes must hold base-3 digits.* below 81, got 81", id="padding-digit"
        ),
        pytest.param(set_tensor("fc1.codes", None), "'fc1.codes' is missing", id="no-codes"),
        pytest.param(set_tensor("fc1.levels", None), "'fc1.levels' is missing", id="no-levels"),
        pytest.param(set_tensor("fc3.bias", None), "'fc3.bias' is in the model and not in the file", id="no-bias"),
        pytest.param(set_tensor("fc1.bias", torch.zeros(120)), "'fc1.bias' is in the file and not in", id="extra-bias"),
        pytest.param(set_tensor("fc3.bias", torch.zeros(9)), "fc3.bias must have the shape", id="bias-shape"),
        pytest.param(
            set_tensor("fc1.codes", torch.zeros(120, 81).byte()), "'fc1.codes' must have the shape", id="width"
        ),
        pytest.param(set_tensor("fc1.codes", torch.zeros(120, 80)), "fc1.codes must be torch.uint8", id="codes-dtype"),
        pytest.param(
            set_tensor("fc1.levels", torch.zeros(1, 4)), "'fc1.levels' must have the shape", id="levels-shape"
        ),
        pytest.param(
            set_tensor("fc1.levels", torch.zeros(1, 3)), "fc1.levels must be finite and strictly", id="levels-equal"
        ),
        pytest.param(
            set_tensor("fc1.levels", torch.tensor([[0.0, 1.0, float("nan")]])),
            "fc1.levels must be finite",
            id="levels-nan",
        ),
        pytest.param(
            set_tensor("fc1.levels", torch.tensor([[0.0, 1, 2]]).half()),
            "fc1.levels must be torch.float32",
            id="levels-dtype",
        ),
        pytest.param(set_tensor("fc1.chances", torch.eye(4)), "'fc1.chances' must have the shape", id="chances-shape"),
        pytest.param(set_tensor("fc1.chances", torch.eye(3).double()), "fc1.chances must be", id="chances-dtype"),
        pytest.param(set_tensor("fc1.chances", torch.eye(3) * 0.9999), "fc1.chances must be from 0", id="chances-sum"),
        pytest.param(
            set_tensor("fc1.chances", torch.tensor([[1.5, -0.5, 0.0], [0.0, 1, 0], [0.0, 0, 1]])),
            "fc1.chances must be from 0 to 1",
            id="chances-range",
        ),
        pytest.param(
            set_tensor("fc1.chances", torch.full((3, 3), float("nan"))), "fc1.chances must be from 0", id="chances-nan"
        ),
        pytest.param(set_tensor("bn1.chances", torch.eye(3)), "'bn1.chances' is unexpected", id="chances-elsewhere"),
        pytest.param(set_tensor("bn1.weight", None), "'bn1.weight' is missing", id="no-bn"),
        pytest.param(set_tensor("bn9.weight", torch.zeros(1)), "'bn9.weight' is unexpected", id="extra-tensor"),
        pytest.param(set_tensor("bn1.weight", torch.zeros(7)), "'bn1.weight' has shape", id="bn-shape"),
        pytest.param(set_tensor("bn1.weight", torch.zeros(6).long()), "'bn1.weight' is torch.int64", id="bn-dtype"),
        pytest.param(
            set_tensor("bn1.num_batches_tracked", torch.tensor(True)),
            "num_batches_tracked' is torch.bool",
            id="bn-bool",
        ),
        pytest.param(set_spec("fc1", shape=[400, 120]), "'fc1.codes' must have the shape", id="shape"),
        pytest.param(
            set_spec("fc3", shape=[10, 85]), "layer 'fc3' is .* in the file and .* in the model", id="shape-K"
        ),
        pytest.param(set_spec("fc1", shape=[120, 0]), "layer 'fc1': shape can not be", id="shape-0"),
        pytest.param(set_spec("fc1", shape=[2**62, 2**62]), "'fc1.codes' must have the shape", id="shape-huge"),
        pytest.param(set_spec("fc1", shape=None), "layer 'fc1': shape can not be", id="no-shape"),
        pytest.param(set_spec("fc1", kind="conv3d"), "layer 'fc1': kind must be", id="kind"),
        pytest.param(set_spec("fc1", kind=["linear"]), "layer 'fc1': kind must be", id="kind-list"),
        pytest.param(set_spec("fc1", num_levels=17), "layer 'fc1': num_levels can not be 17", id="num-levels"),
        pytest.param(set_spec("fc1", num_levels=2), "'fc1.levels' must have the shape", id="other-num-levels"),
        pytest.param(set_spec("fc1", granularity="channel"), "'fc1.levels' must have the shape", id="granularity"),
        pytest.param(set_spec("fc1", granularity="row"), "layer 'fc1': granularity can not be", id="no-granularity"),
        pytest.param(set_spec("fc1", stride=[1, 1]), "layer 'fc1': stride can not be", id="linear-stride"),
        pytest.param(
            set_spec("conv1", stride=[2, 2]), "layer 'conv1' is .* in the file and .* in the model", id="stride"
        ),
        pytest.param(set_spec("conv1", stride=[1.5, 1]), "layer 'conv1': stride can not be", id="stride-float"),
        pytest.param(set_spec("conv1", padding="full"), "conv1.padding must be", id="padding"),
        pytest.param(set_spec("conv1", padding_mode=3), "layer 'conv1': padding_mode can not be", id="padding-mode"),
        pytest.param(set_spec("conv1", groups=4), "conv1.groups must divide", id="groups"),
        pytest.param(set_spec("conv1", groups=2), "layer 'conv1' is .* in the file and .* in the model", id="groups-2"),
        pytest.param(set_metadata(layers={}), "layers must describe the layers of the file", id="no-layers"),
        pytest.param(set_metadata(layers={"fc1": 3}), "layer 'fc1' must be described", id="layer-number"),
        pytest.param(set_metadata(factory=["lenet6", {}]), "factory: name must be one of", id="factory-name"),
        pytest.param(
            set_metadata(factory=["lenet5", {"depth": 3}]), "factory: lenet5 has no argument", id="factory-argument"
        ),
        pytest.param(set_metadata(factory=["lenet5", {"num_classes": 0}]), "factory: num_classes", id="factory-value"),
        pytest.param(set_metadata(factory=["lenet5", {"num_classes": 11}]), "layer 'fc3' is", id="factory-other"),
        pytest.param(set_metadata(factory=["vgg7", {}]), "layer 'conv1' is", id="factory-alien"),
        pytest.param(
            set_metadata(factory=["lenet5", {"in_channels": 60_000, "num_classes": 60_000, "image_size": 60_000}]),
            "layer 'conv1' is",
            id="factory-huge",
        ),
        pytest.param(set_metadata(factory="lenet5"), "factory must be a name and arguments", id="factory-text"),
        pytest.param(set_metadata(factory=[["lenet5"], {}]), "factory must be a name and arguments", id="factory-list"),
        pytest.param(set_metadata(alias=[]), "alias must be an object", id="alias-list"),
        pytest.param(set_metadata(alias={"x": "y"}), "tensor 'x' is an alias of 'y'", id="alias-of-nothing"),
        pytest.param(
            set_metadata(alias={"fc1.codes": "fc2.codes"}), "tensor 'fc1.codes' is an alias", id="alias-stored"
        ),
        pytest.param(set_metadata(alias={"x": ["y"]}), "tensor 'x' is an alias", id="alias-of-list"),
        pytest.param(set_metadata(alias={"x": "fc1.codes"}), "'x' is unexpected", id="alias-unexpected"),
        pytest.param(set_metadata(more=1), "unknown field 'more'", id="metadata-field"),
        pytest.param(set_metadata(version=2), "format version is 2", id="version"),
    ],
)
def test_wrong_contents(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str, lenet_file: Path
) -> None:
    rewrite(lenet_file, lambda metadata, tensors: None)
    load(lenet_file)
    rewrite(lenet_file, change)
    with pytest.raises(FormatError, match=f"{lenet_file}: .*{message}"):
        load(lenet_file)
