"""Files of compiled networks with a change in them and checksums made right again, and a judge of what is read.

python -m tests.support.graph_mutations 20000 [SEED]
"""

from __future__ import annotations

import collections
import copy
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.files import FormatError
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.partition import EnginePart
from tests.support.compiled import packed
from tests.support.mutations import (
    ALIEN,
    change_data,
    change_entry,
    change_length,
    change_value,
    put_together,
    same_bits,
    taken_apart,
)

SECONDS = 2.0  # what a file of a few kilobytes may cost
SIZES = [0, 1, 2, 3, 5, 7, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, -1, True, 1.0, "inf", "-inf", 1e300]
OPS = [
    "conv2d",
    "linear",
    "add",
    "cat",
    "reshape",
    "activation",
    "slice",
    "max_pool2d",
    "affine",
    "softmax",
    "eval",
    "",
]
ACTIVATIONS = [
    ["clamp", 0.0, "inf"],
    ["clamp", 1.0, 0.0],
    ["tanh", 0.0, 0.0],
    ["leaky_relu", "inf", 0.0],
    ["exec", 0.0, 0.0],
]


class Branches(nn.Module):
    """Every kind of node in a few kilobytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.first(x)).relu()
        z = torch.tanh(self.second(torch.nn.functional.avg_pool2d(y, 3, 1, 1)) + y) * y
        z = torch.cat([z, y[:, 1:3, :, :], torch.nn.functional.pad(z[:, :1], (1, 0, 1, 0))[:, :, 1:, :-1]], 1)
        z = torch.cat([torch.nn.functional.max_pool2d(z, 2), torch.sigmoid(z[:, :5, ::2, ::2])], 1)
        rows = z.mean((2, 3))
        return {"scores": self.head(rows).log_softmax(1), "rest": [rows - 1, (x, None)]}


def seeds() -> list[bytes]:
    """Files of compiled networks: one of every kind of node, a few of layers alone, an ensemble."""
    torch.manual_seed(0)
    image = torch.randn(1, 2, 4, 4)
    nets = [
        bqnn.compile(packed(Branches()), image),
        bqnn.compile(Branches().eval(), image),
        bqnn.compile(
            packed(nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 2)), num_levels=4), torch.randn(1, 7)
        ),
        bqnn.compile([nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(1, 3)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "net", []
        for net in nets:
            bqnn.save(net, path)
            result.append(path.read_bytes())
    return result


def mutated(draw: random.Random, blob: bytes) -> bytes:
    """``blob`` with one to three changes that its checksums do not show."""
    header, metadata, data = copy.deepcopy(taken_apart(blob))
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice(CHANGES)(draw, header, metadata, data)
    return put_together(header, metadata, data)


def _part(draw: random.Random, metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        part = draw.choice(metadata["compiled"]["parts"])
        return part if isinstance(part, dict) and isinstance(part["nodes"], list) and part["nodes"] else {}
    except (KeyError, TypeError, IndexError):
        return {}


def change_graph(draw: random.Random, header: Any, metadata: dict[str, Any], data: Any) -> None:
    change_value(draw, metadata)


def change_node(draw: random.Random, header: Any, metadata: dict[str, Any], data: Any) -> None:
    nodes = _part(draw, metadata).get("nodes")
    if not nodes or not isinstance(node := draw.choice(nodes), dict):
        return
    what = draw.randrange(7)
    if what == 0:
        node["op"] = draw.choice(OPS)
    elif what == 1:
        node["activation"] = draw.choice(ACTIVATIONS)
    elif what == 2:
        nodes.insert(draw.randrange(len(nodes)), nodes.pop(draw.randrange(len(nodes))))
    elif what == 3:
        nodes.append(copy.deepcopy(node))
    elif what == 4 and isinstance(node.get("tensors"), dict) and node["tensors"]:
        node["tensors"][draw.choice([*node["tensors"], "bias", "scale"])] = draw.choice([*header, "none"])
    elif what == 5 and isinstance(node.get("attributes"), dict) and node["attributes"]:
        name = draw.choice(list(node["attributes"]))
        value = node["attributes"][name]
        if isinstance(value, list) and value:
            value[draw.randrange(len(value))] = draw.choice(SIZES)
        else:
            node["attributes"][name] = draw.choice(SIZES)
    else:
        change_value(draw, node)


def change_names(draw: random.Random, header: Any, metadata: dict[str, Any], data: Any) -> None:
    """Lets a node read or write another value, itself among them; or a part, or the network, give another one."""
    part = _part(draw, metadata)
    rows = part.get("values")
    names = [row[0] for row in rows if isinstance(row, list) and row] if isinstance(rows, list) else []
    names.append("new")
    holder = draw.choice([*part.get("nodes", [part]), part, metadata.get("compiled")])
    if isinstance(holder, dict):
        key = draw.choice(["inputs", "output", "outputs"])
        if isinstance(holder.get(key), list) and holder[key]:
            holder[key][draw.randrange(len(holder[key]))] = draw.choice(names)
        elif key in holder:
            holder[key] = draw.choice(names)


def change_shape(draw: random.Random, header: Any, metadata: dict[str, Any], data: Any) -> None:
    rows = _part(draw, metadata).get("values")
    if not isinstance(rows, list) or not rows or not isinstance(row := draw.choice(rows), list) or len(row) != 5:
        return
    if isinstance(row[1], list) and row[1] and draw.random() < 0.7:
        row[1][draw.randrange(len(row[1]))] = draw.choice(SIZES)
    else:
        row[draw.randrange(5)] = draw.choice([*ALIEN, "uint8", 0.5, 255, 256])


def change_structure(draw: random.Random, header: Any, metadata: dict[str, Any], data: Any) -> None:
    tokens = metadata["compiled"].get("structure") if isinstance(metadata.get("compiled"), dict) else None
    if isinstance(tokens, list) and tokens:
        more = [
            ["tuple", 2**62],
            ["tuple", 0],
            ["output", 9],
            ["output", True],
            ["dict", ["a", "a"]],
            ["none"],
            ["list", 1],
            ["stack", 1],
            ["stack", 2],
        ]
        index = draw.randrange(len(tokens))
        if draw.random() < 0.5:
            tokens[index] = copy.deepcopy(draw.choice(more))
        else:
            tokens[index:index] = copy.deepcopy([draw.choice(more)] * draw.choice([1, 2, 100]))


CHANGES = (change_graph, change_node, change_node, change_names, change_shape, change_structure)
CHANGES += (change_data, change_length, change_entry)


def _plain(value: Any) -> Any:
    """Numbers of a graph as JSON has them."""
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return str(value) if value in (float("inf"), float("-inf")) else value


def check_declared(blob: bytes, net: CompiledNetwork) -> None:
    """Raises AssertionError unless ``net`` is what the file says, read by independent code."""
    _, metadata, _ = taken_apart(blob)
    declared, data = safetensors.torch.load(blob), metadata["compiled"]
    assert metadata["version"] == 1 and net.precision == data["precision"]
    assert [[each.name, list(each.shape)] for each in net.inputs] == data["inputs"]
    assert list(net.outputs) == data["outputs"] and len(net.parts) == len(data["parts"])
    for part, given in zip(net.parts, data["parts"]):
        assert isinstance(part, EnginePart)
        graph = part.graph
        assert [list(graph.inputs), list(graph.outputs)] == [given["inputs"], given["outputs"]]
        assert [[v.name, list(v.shape), v.dtype, v.scale, v.zero] for v in graph.values.values()] == given["values"]
        assert len(graph.nodes) == len(given["nodes"])
        for node, says in zip(graph.nodes, given["nodes"]):
            assert [node.op, list(node.inputs), node.output] == [says["op"], says["inputs"], says["output"]]
            assert {name: _plain(value) for name, value in node.attributes.items()} == says.get("attributes", {})
            stored = says.get("tensors", {})
            assert set(node.tensors) == set(stored)
            assert all(same_bits(tensor, declared[stored[name]]) for name, tensor in node.tensors.items())
            numbers = [node.activation.name, _plain(node.activation.low), _plain(node.activation.high)]
            assert numbers == says.get("activation", ["none", 0.0, 0.0])


def judge(blob: bytes, path: Path) -> str:
    """What becomes of a file: "read", or the message of the FormatError. Raises AssertionError at a fault."""
    path.write_bytes(blob)
    started = time.process_time()
    try:
        net = bqnn.load(path)
        fate = "read"
    except FormatError as error:
        fate = str(error).removeprefix(f"{path}: ")
    except ValueError as error:  # it holds a packed network of somebody's own
        assert str(error).startswith("model must be given"), str(error)
        fate = str(error)
    else:
        assert isinstance(net, CompiledNetwork)
        check_declared(blob, net)
        if all(len(each.shape) < 4 and torch.Size(each.shape).numel() < 1000 for each in net.inputs):
            net(*(torch.zeros(1, *each.shape) for each in net.inputs))
    assert time.process_time() - started < SECONDS, "it takes too long"
    return fate


def main(count: int, seed: int) -> None:
    draw, files = random.Random(seed), seeds()
    fates: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            blob = mutated(draw, draw.choice(files))
            try:
                fates["read" if judge(blob, Path(folder) / "net") == "read" else "refused"] += 1
            except BaseException:
                print(f"{blob!r}")
                raise
    print(f"{count} files: {dict(fates)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
