"""The networks of a file: what they may take in memory, and how often their names are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bqnn
from bqnn import Ensemble, FormatError, pack
from bqnn.files import container
from bqnn.files.members import members
from bqnn.files.network import _described
from bqnn.files.skeleton import check_model
from tests.support.mutations import put_together, taken_apart


def test_networks_take_no_more_memory_than_is_in_proportion_to_their_file(tmp_path: Path) -> None:
    path, copies = tmp_path / "net", 512
    torch.manual_seed(0)
    net = nn.Sequential(pack(bqnn.BayesLinear(2048, 2048), execution="packed"))  # 0.8 MB of codes
    with pytest.raises(ValueError, match="can not be saved .* its tensors would take 4.* bytes in memory"):
        bqnn.save(Ensemble([net] * copies), path)
    assert not path.exists()
    bqnn.save(Ensemble([net] * 2), path)

    header, metadata, data = taken_apart(path.read_bytes())
    metadata["ensemble"] = copies
    for index in range(1, copies):
        metadata["layers"][f"{index}.0"] = metadata["layers"]["0.0"]
        metadata["alias"] |= {name.replace("0", str(index), 1): name for name in header}
    path.write_bytes(put_together(header, metadata, data))
    size = path.stat().st_size
    with pytest.raises(FormatError, match=f"bytes in memory, more than 64 times the {size} of the file"):
        bqnn.load(path, model=nn.Sequential(nn.Linear(2048, 2048)))


def test_layers_of_a_network_that_are_one_in_the_file_alone_count_apart() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied = nn.Sequential(net[0], net[0])
    contents, taken = {}, {}
    for name, each in (("apart", net), ("tied", tied)):
        packed = pack(bqnn.convert(each), execution="packed")
        packed[1].load_state_dict(packed[0].state_dict())
        contents[name] = container.parse(container.to_bytes(*_described(Ensemble([packed]), packed, {})))
        (member,) = members(contents[name])
        taken[name] = check_model(member, packed)
    assert taken["apart"] == 2 * taken["tied"] > 0
    assert len(contents["apart"].entries) == len(contents["tied"].entries)


def test_names_of_tensors_are_read_once_whatever_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    by_name = container.Contents.by_name
    monkeypatch.setattr(container.Contents, "by_name", lambda contents: calls.append(1) or by_name(contents))
    counts = []
    for depth in (2, 20):
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))
        bqnn.save(pack(bqnn.convert(net), execution="packed"), tmp_path / "net")
        calls.clear()
        bqnn.load(tmp_path / "net", model=net)
        counts.append(len(calls))
    assert counts[0] == counts[1]
