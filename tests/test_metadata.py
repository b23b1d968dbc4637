"""What files say of images and classes: kept, checked against the network, shown, and refused where it is unsound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bqnn
from bqnn import FormatError, Metadata, models
from tests.support.mutations import put_together, taken_apart

KNOWN = Metadata("pets", ("ant", "bee", "cat"), 1, 8, (0.25,), (0.5,))


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return bqnn.convert(models.lenet5(image_size=8, num_classes=3), **options)


def every_kind() -> list[Any]:
    packed = bqnn.pack(small())
    compiled = bqnn.compile(packed, torch.zeros(2, 1, 8, 8))
    both = bqnn.Ensemble([packed, bqnn.pack(small(num_levels=2))])
    joined = bqnn.compile(both, torch.zeros(2, 1, 8, 8))
    kinds = {"packed": packed, "bayes": small(), "compiled": compiled, "ensemble": both, "compiled-ensemble": joined}
    return [pytest.param(net, id=name) for name, net in kinds.items()]


@pytest.mark.parametrize("net", every_kind())
def test_every_kind_of_file_keeps_them(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net"
    bqnn.save(net, path, KNOWN)
    assert bqnn.info(path)["metadata"] == KNOWN
    bqnn.load(path)
    bqnn.save(net, path, Metadata(classes=["a", "b", "c"]))
    assert bqnn.info(path)["metadata"] == Metadata(classes=("a", "b", "c"), in_channels=1, image_size=8)
    bqnn.save(net, path, Metadata())
    without = path.read_bytes()
    bqnn.save(net, path)
    assert path.read_bytes() == without, "nothing known is nothing written"
    for wrong, message in (
        (Metadata(image_size=9), "image_size"),
        (Metadata(classes=("a", "b")), "classes must have 3"),
    ):
        with pytest.raises(ValueError, match=message):
            bqnn.save(net, path, wrong)
    with pytest.raises(ValueError, match="in_channels must be that of the network, 1, got 3"):
        bqnn.save(net, path, Metadata(mean=(0, 0, 0), std=(1, 1, 1)))
    assert path.read_bytes() == without
    with pytest.raises(TypeError, match=r"metadata must be a bqnn.Metadata or None, got dict"):
        bqnn.save(net, path, {"classes": ["a"]})  # type: ignore[arg-type]


def test_a_network_of_somebody_s_own_keeps_what_it_is_told(tmp_path: Path) -> None:
    net = bqnn.pack(bqnn.convert(nn.Sequential(nn.Flatten(), nn.Linear(12, 2))))
    known = Metadata(None, ("\ud800", "\x1b[2J"), 3, 2, np.float32([0.1, 0.2, 0.3]), [1, 1.5, 2])
    bqnn.save(net, tmp_path / "net", known)
    found = bqnn.info(tmp_path / "net")["metadata"]
    assert found == known
    assert found.mean == tuple(float(np.float32(value)) for value in (0.1, 0.2, 0.3)) and found.std == (1.0, 1.5, 2.0)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"dataset": 3}, TypeError, "dataset must be a string, got 3"),
        ({"dataset": ""}, ValueError, "dataset must have from 1 to 1000 characters, got 0"),
        ({"classes": "cat"}, TypeError, "classes must be a list, got 'cat'"),
        ({"classes": 3}, TypeError, "classes must be a list, got 3"),
        ({"classes": []}, ValueError, "classes must have from 1 to 65536 entries, got 0"),
        ({"classes": ["a", "a"]}, ValueError, "classes must have names of their own"),
        ({"classes": ["a", None]}, TypeError, "a name of classes must be a string, got None"),
        ({"classes": ["a" * 1001]}, ValueError, "a name of classes must have from 1 to 1000 characters, got 1001"),
        ({"in_channels": 0}, ValueError, "in_channels must be from 1 to 65536, got 0"),
        ({"image_size": True}, TypeError, "image_size must be an int, got bool"),
        ({"image_size": 1.0}, TypeError, "image_size must be an int, got float"),
        ({"mean": [0.5]}, ValueError, "mean and std must be given together"),
        ({"mean": [0.5], "std": [1.0, 1.0]}, ValueError, "mean and std must be given together"),
        ({"mean": [0.5], "std": [1.0], "in_channels": 3}, ValueError, "mean and std must have 3 numbers"),
        ({"mean": [0.5], "std": [0.0]}, ValueError, "std must be from 1e-06 to 1e.06, got 0.0"),
        ({"mean": [float("nan")], "std": [1.0]}, ValueError, "mean must be from -1e.06 to 1e.06, got nan"),
        ({"mean": ["0.5"], "std": [1.0]}, TypeError, "mean must be numbers, got '0.5'"),
        ({"mean": [True], "std": [1.0]}, TypeError, "mean must be numbers, got True"),
    ],
)
def test_fields_that_are_wrong(fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        Metadata(**fields)
    with pytest.raises(FormatError, match="data: |must be|no JSON"):
        bqnn.info(with_data(tmp_path, {key: None if value != value else value for key, value in fields.items()}))


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "data must be an object"),
        ({}, "data must be an object with what is known"),
        ([], "data must be an object"),
        ({"new": 1}, "data has the unknown field 'new'"),
        ({"dataset": None}, "dataset of data must be known or left out"),
        ({"classes": ["a", "b"]}, "data: classes must have 3 names, one a logit, got 2"),
        ({"image_size": 9}, "data: image_size must be that of the network, 8, got 9"),
        ({"mean": [10**400], "std": [1]}, "data: mean must be from"),
        ({"classes": [{"a": 1}]}, "data: a name of classes must be a string, got dict"),
    ],
)
def test_files_that_are_wrong(data: Any, message: str, tmp_path: Path) -> None:
    path = with_data(tmp_path, data)
    for read in (bqnn.info, bqnn.load):
        with pytest.raises(FormatError, match=message):
            read(path)


def with_data(tmp_path: Path, data: Any) -> Path:
    """The file of a network whose metadata have ``data``, its checksums right."""
    path = tmp_path / "net"
    bqnn.save(bqnn.pack(small()), path)
    header, metadata, tensors = taken_apart(path.read_bytes())
    path.write_bytes(put_together(header, {**metadata, "data": data}, tensors))
    return path
