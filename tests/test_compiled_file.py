"""Compiled networks in files: what comes back, what can not be saved, and files that somebody has changed."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bqnn
from bqnn.core.files import FormatError
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.partition import EnginePart
from tests.support.compiled import Function, packed
from tests.support.graph_mutations import Branches, judge, mutated, seeds
from tests.support.mutations import put_together, taken_apart

FILES = 500
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def branches() -> CompiledNetwork:
    return bqnn.compile(packed(Branches()), X)


@pytest.fixture(scope="module")
def blobs() -> list[bytes]:
    return seeds()


def test_what_is_loaded_gives_the_same_bits(branches: CompiledNetwork, tmp_path: Path) -> None:
    bqnn.save(branches, tmp_path / "net")
    again = bqnn.load(tmp_path / "net")
    assert isinstance(again, CompiledNetwork)
    assert str(again) == str(branches)
    expected, found = branches(X), again(X)
    assert torch.equal(found["scores"], expected["scores"])
    assert torch.equal(found["rest"][0], expected["rest"][0])
    assert torch.equal(found["rest"][1][0], X) and found["rest"][1][1] is None
    bqnn.save(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


def test_info_of_a_compiled_network(branches: CompiledNetwork, tmp_path: Path) -> None:
    bqnn.save(branches, tmp_path / "net")
    content = bqnn.info(tmp_path / "net")
    assert content["bytes"] == (tmp_path / "net").stat().st_size
    assert content["bytes"] == content["header_bytes"] + sum(each["bytes"] for each in content["tensors"].values())
    assert [layer["shape"] for layer in content["layers"].values()] == [[4, 2, 3, 3], [4, 2, 3, 3], [3, 12]]
    assert all(layer["num_levels"] == 3 for layer in content["layers"].values())


def test_dense_layers_and_shared_tensors(tmp_path: Path) -> None:
    net = bqnn.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    bqnn.save(net, tmp_path / "net")
    (layer,) = bqnn.info(tmp_path / "net")["layers"].values()
    assert layer["num_levels"] == 0 and layer["bits_per_weight"] == 32
    assert torch.equal(bqnn.load(tmp_path / "net")(torch.ones(1, 4)), net(torch.ones(1, 4)))


def test_info_counts_a_tensor_that_two_layers_have_once(tmp_path: Path) -> None:
    net = bqnn.compile(packed(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), torch.randn(2, 4))
    (part,) = net.parts
    first, second = part.graph.nodes
    graph = dataclasses.replace(part.graph, nodes=(first, dataclasses.replace(second, tensors=first.tensors)))
    shared = CompiledNetwork(net.inputs, (EnginePart(graph),), net.outputs, net.structure, {}, "fp32")
    bqnn.save(shared, tmp_path / "net")
    content = bqnn.info(tmp_path / "net")
    sizes = [layer["bytes"] for layer in content["layers"].values()]
    assert sizes == [sum(tensor["bytes"] for tensor in content["tensors"].values()), 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda x: x.roll(1, 2), "torch runs roll .aten.roll.default: the engine has no such", id="torch"),
        pytest.param(lambda x: (x, torch.ones(3)), "is a constant", id="constant"),
    ],
)
def test_what_can_not_be_saved_says_why(function: Callable[..., Any], message: str, tmp_path: Path) -> None:
    net = bqnn.compile(Function(function), X)
    with pytest.raises(ValueError, match=message):
        bqnn.save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_compiled_network_takes_no_model(branches: CompiledNetwork, tmp_path: Path) -> None:
    bqnn.save(branches, tmp_path / "net")
    with pytest.raises(ValueError, match="model must be None and device the CPU"):
        bqnn.load(tmp_path / "net", Branches())
    with pytest.raises(ValueError, match="model must be None and device the CPU"):
        bqnn.load(tmp_path / "net", device="meta")


def set_(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Changes one value in the metadata."""

    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


NODE = ("parts", 0, "nodes", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(set_("precision", to="fp8"), "precision must be one of", id="precision"),
        pytest.param(set_("code", to="import os"), "compiled must have the fields", id="more-fields"),
        pytest.param(drop("outputs"), "compiled must have the fields", id="fewer-fields"),
        pytest.param(set_("inputs", to=[]), "inputs must be one or more", id="no-inputs"),
        pytest.param(set_("inputs", 0, 1, 0, to=-2), "an input must have a name and a shape", id="input-size"),
        pytest.param(set_("inputs", 0, 1, 0, to=3), "must be there before it, in the same shape", id="input-shape"),
        pytest.param(set_("inputs", 0, 0, to="y"), "must be there before it", id="input-name"),
        pytest.param(set_("outputs", 0, to="y"), "output 'y' is no input", id="output-name"),
        pytest.param(set_("parts", to=[{}] * 2), "part 0 must have the fields", id="empty-part"),
        pytest.param(set_(*NODE, "op", to="eval"), "part 0: node 0 .*no such operator", id="op"),
        pytest.param(set_(*NODE, "op", to=["eval"]), "part 0: node 0: must be a Node", id="op-type"),
        pytest.param(set_(*NODE, "inputs", to="x"), "must be a list of names", id="node-inputs"),
        pytest.param(set_(*NODE, "attributes", "stride", to=[0, 1]), "stride must hold integers", id="stride"),
        pytest.param(set_(*NODE, "attributes", "groups", to=2**63), "groups must hold integers", id="huge"),
        pytest.param(set_(*NODE, "attributes", "groups", to=True), "groups must hold integers", id="bool"),
        pytest.param(set_(*NODE, "attributes", "kernel", to=["3", 3]), "kernel must hold integers", id="nested"),
        pytest.param(set_(*NODE, "tensors", "codes", to="none"), "tensor 'none' is missing", id="tensor-missing"),
        pytest.param(drop(*NODE, "tensors", "scale"), "is unexpected", id="tensor-unexpected"),
        pytest.param(set_(*NODE, "activation", to=["exec", 0.0, 0.0]), "activation must be one of", id="activation"),
        pytest.param(set_("parts", 0, "values", 1, 1, 0, to=2**40), "sizes from 1 on", id="value-size"),
        pytest.param(set_("parts", 0, "values", 1, 2, to="uint8"), "dtype", id="value-dtype"),
        pytest.param(set_("structure", to=[["output", 0], ["none"]]), "goes on behind its end", id="structure-long"),
        pytest.param(set_("structure", to=[["tuple", 2], ["none"]]), "structure must be whole", id="structure-short"),
        pytest.param(set_("structure", to=[["tuple", 1]] * 100), "structure must be whole and at most", id="deep"),
        pytest.param(set_("structure", to=[["output", 9]]), "structure can not have", id="structure-number"),
        pytest.param(set_("structure", to=[["stack", 0]]), "structure can not have", id="stack-of-none"),
        pytest.param(set_("structure", to=[["stack", True], ["output", 0]]), "structure can not have", id="stack-bool"),
        pytest.param(set_("structure", to=[["stack", 2**62]]), "structure can not have", id="stack-huge"),
        pytest.param(set_("structure", to=[["stack", 2], ["output", 0]]), "structure must be whole", id="stack-short"),
        pytest.param(
            set_("structure", to=[["tuple", 1], ["stack", 1], ["output", 0]]),
            "structure can not have",
            id="stack-inside",
        ),
        pytest.param(
            set_("structure", to=[["stack", 1], ["none"]]), "an output of each network", id="stack-of-nothing"
        ),
        pytest.param(
            set_("structure", to=[["stack", 1], ["list", 1], ["output", 0]]),
            "an output of each network",
            id="stack-of-lists",
        ),
        pytest.param(
            set_("structure", to=[["stack", 2], ["output", 0], ["output", 1]]), "must have one shape", id="stack-shapes"
        ),
    ],
)
def test_a_changed_graph_is_refused(change: Any, message: str, blobs: list[bytes], tmp_path: Path) -> None:
    header, metadata, data = copy.deepcopy(taken_apart(blobs[0]))
    change(metadata["compiled"])
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    for read in (bqnn.load, bqnn.info):
        with pytest.raises(FormatError, match=message):
            read(tmp_path / "net")


def test_a_graph_in_a_circle_is_refused(blobs: list[bytes], tmp_path: Path) -> None:
    header, metadata, data = copy.deepcopy(taken_apart(blobs[0]))
    nodes = metadata["compiled"]["parts"][0]["nodes"]
    nodes[0]["inputs"][0] = nodes[-1]["output"]
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    with pytest.raises(FormatError, match="is not there yet"):
        bqnn.load(tmp_path / "net")


def test_both_kinds_in_one_file_are_refused(blobs: list[bytes], tmp_path: Path) -> None:
    header, metadata, data = copy.deepcopy(taken_apart(blobs[0]))
    metadata |= {"factory": None, "layers": {}}
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    with pytest.raises(FormatError, match="unknown field 'factory'"):
        bqnn.load(tmp_path / "net")


def test_a_mutated_file_is_refused_or_read_as_it_says(blobs: list[bytes], tmp_path: Path) -> None:
    draw, fates = random.Random(2026), []
    for blob in blobs:
        assert judge(blob, tmp_path / "net") == "read"
    for _ in range(FILES):
        fates.append(judge(mutated(draw, draw.choice(blobs)), tmp_path / "net"))
    assert 0.05 * FILES < fates.count("read") < 0.5 * FILES, "most files have to be refused, and some be read"
    assert len(set(fates)) > 80, "in many ways"
