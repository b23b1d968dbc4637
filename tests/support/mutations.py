"""Packed files with a change in them and checksums made right again, and a judge of what load and info make of them.

    python -m tests.support.mutations 40000 [SEED]

draws so many files and prints what became of them, with the longest time and the memory that it took.
"""

from __future__ import annotations

import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

import bqnn
from bqnn import models
from bqnn.core.files import FormatError
from bqnn.engine.pack import pack
from bqnn.files import container
from bqnn.files.layer_spec import LAYERS, describe
from bqnn.files.network import info, load, save
from tests.support.packed_nets import Apart, Odd, Shared, packed_odd

SECONDS, MEGABYTES = 2.0, 200  # what a file of a few kilobytes may cost
# What is wrong with a tensor whose dtype and shape are right; only load reads values.
VALUES = ("must hold base-", "must be finite", "must have bytes of 0 and 1", "must be from 0 to 1")
VALUES += ("must give finite levels", "log_sigma2 must be from")
ALIEN = [None, True, False, -1, 0, 1, 2, 3, 1.0, 1e300, 2**31, 2**62, 2**63, 10**30, "", "\ud800", "codes", [], {}]
ALIEN += [[1, 1], [0, 0], [2**62] * 3, [1] * 70, [[[[[[[[[]]]]]]]]], {"a": {"b": {}}}, ["lenet5", {}], "0.weight"]
DTYPES = [*container.DTYPES, "U4", "F4"]
FACTORIES: list[list[Any]] = [
    ["densenet", {"depth": 1000}],
    ["densenet", {"depth": 1000, "growth_rate": 65536}],
    ["lenet5", {"in_channels": 65536, "num_classes": 65536, "image_size": 65536}],
    ["vgg7", {}],
    ["resnet20", {"num_classes": True}],
    ["lenet5", {"depth": 1}],
]


class Seed(NamedTuple):
    """A file to change, and a network that the unchanged one can be read into."""

    blob: bytes
    model: Callable[[], nn.Module]


def seeds() -> list[Seed]:
    """Files of networks with every kind of layer, shared ones and built-in ones."""

    def small() -> nn.Module:
        convolution = (nn.Conv2d(2, 3, 2, padding=1), nn.ReLU(), nn.Flatten())
        return nn.Sequential(*convolution, nn.Linear(27, 2), nn.BatchNorm1d(2))

    def words() -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(6, 2))

    def tiny() -> nn.Module:
        return models.densenet(depth=7, growth_rate=2, in_channels=1, num_classes=3)

    torch.manual_seed(0)
    nets: list[tuple[nn.Module, Callable[[], nn.Module]]] = [
        (pack(bqnn.convert(small())), small),
        (packed_odd(granularity="channel", start_sigma=0.5), Odd),
        (pack(bqnn.convert(small(), estimator="deterministic")), small),
        (pack(bqnn.convert(Shared())), Shared),
        (pack(bqnn.convert(Shared())), Apart),
        (pack(bqnn.convert(Apart())), Shared),
        (pack(bqnn.convert(tiny(), num_levels=4)), tiny),
        (pack(bqnn.BayesLinear(7, 3)), lambda: nn.Linear(7, 3)),
        (bqnn.Ensemble([pack(bqnn.convert(small(), num_levels=number)) for number in (2, 3)]), small),
        (bqnn.Ensemble([bqnn.sample(pack(bqnn.convert(tiny(), start_sigma=1.0)), seed) for seed in (0, 1)]), tiny),
        (bqnn.convert(small(), granularity="channel", partition="learned", estimator="local"), small),
        (pack(bqnn.convert(words())).double(), words),
        (bqnn.convert(words(), estimator="sample"), words),
        (bqnn.convert(Shared(), prior="mixture", spike_width=0.5), Shared),
        (bqnn.convert(tiny(), estimator="deterministic"), tiny),
    ]
    known = bqnn.Metadata("images", ("cat", "ant", "bee"), 1, None, (0.5,), (0.25,))
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "net", []
        for net, model in nets:
            save(net, path, known if len(result) % 2 == 0 else None)
            result.append(Seed(path.read_bytes(), model))
    return result


def taken_apart(blob: bytes) -> tuple[dict[str, Any], dict[str, Any], bytearray]:
    """Header, its metadata and the tensors' bytes of a file; CRCs are left out."""
    header_bytes = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:header_bytes])
    metadata = json.loads(header.pop("__metadata__")["bqnn"])
    del metadata["crc32"]
    return header, metadata, bytearray(blob[header_bytes:])


def put_together(header: dict[str, Any], metadata: dict[str, Any], data: bytes | bytearray) -> bytes:
    """A file with right CRCs, as far as tensors can be found in it."""

    def crc(piece: bytes | bytearray) -> str:
        return f"{zlib.crc32(piece):08x}"

    digits = ""
    for name in sorted(header):
        try:
            begin, end = header[name]["data_offsets"]
            digits += crc(data[begin:end])
        except (TypeError, ValueError, KeyError):
            digits += "0" * 8
    text = json.dumps({"crc32": "0" * 8 + digits, **metadata}, separators=(",", ":"))
    whole = {"__metadata__": {"bqnn": text}, **header}
    head = json.dumps(whole, separators=(",", ":")).encode()
    head = bytearray(len(head).to_bytes(8, "little") + head)
    start = len('12345678{"__metadata__":{"bqnn":"{\\"crc32\\":\\"')
    head[start : start + 8] = crc(head).encode()
    return bytes(head) + bytes(data)


def mutated(draw: random.Random, blob: bytes) -> bytes:
    """``blob`` with one to three changes that its checksums do not show."""
    header, metadata, data = copy.deepcopy(taken_apart(blob))
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice(CHANGES)(draw, header, metadata, data)
    return put_together(header, metadata, data)


def change_data(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    if data:
        data[draw.randrange(len(data))] = draw.choice((0, 1, 2, 127, 128, 255, draw.randrange(256)))


def change_length(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    if draw.random() < 0.5:
        del data[draw.randrange(len(data) + 1) :]
    else:
        data += draw.randbytes(draw.randrange(1, 20))


def change_entry(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    if not header:
        return
    name = draw.choice(list(header))
    what = draw.randrange(6)
    if what == 0:
        header[draw.choice([*header, "new", "x" * 300])] = header.pop(name)
    elif what == 1:
        del header[name]
    elif not isinstance(header[name], dict):
        header[name] = draw.choice(ALIEN)
    elif what == 2:
        header[name]["dtype"] = draw.choice(DTYPES)
    elif what == 3:
        shape = header[name].get("shape")
        more = [1, 0, 2, 2**40, 2**62, True]
        header[name]["shape"] = draw.choice([shape[::-1], [*shape, draw.choice(more)], [1] * 65 + shape, shape[1:]])
    elif what == 4:
        header[name]["data_offsets"] = [draw.randrange(len(data) + 2) for _ in range(2)]
    else:
        change_value(draw, header[name])


def change_metadata(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    change_value(draw, metadata)


def change_spec(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    layers = metadata.get("layers")
    if isinstance(layers, dict) and layers:
        name = draw.choice(list(layers))
        fields = {"stride": [2, 2], "padding": draw.choice(["same", "valid", [1, 1], [2**31, 0]]), "groups": 2}
        fields |= {"relu": draw.choice([True, False]), "num_levels": draw.randrange(1, 18), "granularity": "channel"}
        fields |= {"dilation": [1, 2], "padding_mode": draw.choice(["circular", "zeros", "x"]), "kind": "linear"}
        if isinstance(layers[name], dict) and draw.random() < 0.8:
            field = draw.choice(list(fields))
            layers[name][field] = fields[field]
        else:
            layers[draw.choice([*layers, "new", ""])] = layers.pop(name)


def change_alias(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    names = [*header, "new"]
    alias = metadata.setdefault("alias", {})
    if isinstance(alias, dict):
        name = draw.choice([*alias, *names])
        alias[name] = draw.choice(names)
        if draw.random() < 0.5:
            header.pop(name, None)
        elif draw.random() < 0.3:
            del alias[name]


def change_networks(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    metadata["ensemble"] = copy.deepcopy(draw.choice([*ALIEN, 2, 2, 4]))
    for names in (header, metadata.get("layers")):
        if isinstance(names, dict) and names and draw.random() < 0.5:
            name = draw.choice(list(names))
            names[draw.choice(("0.", "1.", "2.", "00.", "x")) + name.partition(".")[2]] = names.pop(name)


def change_factory(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    metadata["factory"] = copy.deepcopy(draw.choice([*FACTORIES, None]))


def change_data_set(draw: random.Random, header: dict[str, Any], metadata: dict[str, Any], data: bytearray) -> None:
    fields = metadata.setdefault("data", {})
    if isinstance(fields, dict):
        name = draw.choice(["dataset", "classes", "in_channels", "image_size", "mean", "std", "new"])
        values = [*ALIEN, "x", ["cat", "cat", "ant"], ["cat", "ant", "bee"], [0.5], [1e9], [0.5, 0.5, 0.5], [-1.0]]
        fields[name] = copy.deepcopy(draw.choice(values))


CHANGES = (
    change_data,
    change_length,
    change_entry,
    change_metadata,
    change_spec,
    change_alias,
    change_factory,
    change_networks,
    change_data_set,
)


def change_value(draw: random.Random, value: Any) -> None:
    """Changes something in an object or a list, at any depth: leaves it out, renames it, or puts another there."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = draw.choice(keys)
    if isinstance(value[key], (dict, list)) and draw.random() < 0.7:
        change_value(draw, value[key])
    elif draw.random() < 0.25:
        del value[key]
    elif isinstance(value, dict) and draw.random() < 0.2:
        value[draw.choice([*keys, "new", "relu", "factory"])] = value.pop(key)
    else:
        value[key] = copy.deepcopy(draw.choice(ALIEN))


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pieces = [each.contiguous().view(-1).view(torch.uint8) for each in (one, other)]
    return torch.equal(*pieces)


def check_declared(blob: bytes, net: nn.Module) -> None:
    """Raises AssertionError unless ``net`` is what the file says, read by independent code."""
    _, metadata, _ = taken_apart(blob)
    assert metadata["version"] == 1 and type(metadata["version"]) is int
    declared = safetensors.torch.load(blob)
    declared |= {name: declared[stored] for name, stored in metadata.get("alias", {}).items()}
    state = net.state_dict()
    assert set(state) == set(declared)
    assert all(same_bits(state[name], declared[name]) for name in state)
    layers = {n: m for n, m in net.named_modules(remove_duplicate=False) if isinstance(m, LAYERS)}
    assert {name: describe(layer) for name, layer in layers.items()} == metadata["layers"]


def judge(blob: bytes, path: Path, model: nn.Module) -> str:
    """What becomes of a file: "read", or the message of the FormatError. Raises AssertionError at a fault."""
    path.write_bytes(blob)
    started = time.process_time()
    told, refused = True, "read"
    try:
        info(path)
    except FormatError as error:
        told, refused = False, str(error).removeprefix(f"{path}: ")
    for given in (None, model):
        try:
            net = load(path, given)
        except FormatError as error:
            message = str(error)
            assert given is not None or not told or any(value in message for value in VALUES), message
        except ValueError as error:
            assert told and str(error).startswith("model must be given"), str(error)
        else:
            assert told, f"info refuses what load takes: {refused}"
            check_declared(blob, net)
            networks = net if isinstance(net, bqnn.Ensemble) else [net]
            factory = taken_apart(blob)[1]["factory"]
            assert given is not None or all(list(each.factory) == factory for each in networks)
    assert time.process_time() - started < SECONDS, "it takes too long"
    return refused


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(count: int, seed: int) -> None:
    draw, files = random.Random(seed), seeds()
    fates: collections.Counter[str] = collections.Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "net", 0.0
        for each in files:
            assert judge(each.blob, path, each.model()) == "read"
        before = peak_megabytes()
        for _ in range(count):
            each = draw.choice(files)
            blob = mutated(draw, each.blob)
            started = time.process_time()
            try:
                fate = judge(blob, path, each.model())
            except BaseException:
                print(f"{blob!r}")
                raise
            longest = max(longest, time.process_time() - started)
            fates["read" if fate == "read" else "refused"] += 1
    print(f"{count} files: {dict(fates)}; longest {longest:.2f} s; {peak_megabytes() - before:.0f} MB more at the peak")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
