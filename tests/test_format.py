"""docs/format.md: the program in it decodes files as bqnn.load does, and it names all fields that there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bqnn
from bqnn.files import bayes_spec, container, fields, packed_spec
from bqnn.files.metadata import Metadata
from bqnn.files.product_spec import KINDS, usual
from bqnn.packed.weight import PackedWeight
from tests.support.packed_nets import Shared, packed_odd

PAGE = Path(__file__).parent.parent / "docs" / "format.md"


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """What the block of Python in the page defines."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    found: dict[str, Any] = {}
    exec(compile(blocks[0], str(PAGE), "exec"), found)
    return found


def check(net: nn.Module, path: Path, read_layers: Callable[[Path], dict[str, Any]], model: nn.Module | None) -> None:
    bqnn.save(net, path, Metadata("images", mean=(0.5,), std=(0.25,)))
    weights, loaded = read_layers(path), bqnn.load(path, model=model)
    named = loaded.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in named if isinstance(layer, PackedWeight)}
    assert weights.keys() == layers.keys() and layers
    for name, layer in layers.items():
        assert weights[name].dtype == np.float32
        assert np.array_equal(weights[name], layer.decode().numpy()), name


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", range(2, 17))
def test_the_program_decodes_layers(num_levels: int, granularity: str, program: Any, tmp_path: Path) -> None:
    def own() -> nn.Module:
        convolutions = nn.Conv1d(5, 4, 3, groups=1), nn.Conv2d(2, 3, (3, 2), bias=False)
        return nn.Sequential(nn.Embedding(9, 5), *convolutions, nn.Flatten(), nn.Linear(21, 5))

    torch.manual_seed(num_levels)
    net = bqnn.pack(bqnn.convert(own(), num_levels=num_levels, granularity=granularity))
    check(net, tmp_path / "net", program["read_layers"], own())


def test_the_program_decodes_every_kind_of_file(program: Any, tmp_path: Path) -> None:
    read, path = program["read_layers"], tmp_path / "net"
    net = bqnn.models.lenet5(image_size=8)
    check(bqnn.pack(bqnn.convert(net)), path, read, None)
    check(bqnn.Ensemble([bqnn.pack(bqnn.convert(net, num_levels=m)) for m in (2, 5)]), path, read, None)
    check(bqnn.pack(bqnn.convert(Shared())), path, read, Shared())
    check(bqnn.pack(bqnn.BayesLinear(7, 3)), path, read, nn.Linear(7, 3))
    check(bqnn.pack(bqnn.convert(net)).bfloat16(), path, read, None)


def test_the_program_reads_other_tensors_and_notices_damage(program: Any, tmp_path: Path) -> None:
    net, path = packed_odd(), tmp_path / "net"
    bqnn.save(net.bfloat16(), path)
    _, tensors = program["read_file"](path)
    assert tensors.keys() == net.state_dict().keys()
    weight = program["array_of"](tensors["plain.weight"])
    assert np.array_equal(weight, net.plain.weight.detach().float().numpy())
    blob = bytearray(path.read_bytes())
    for place in (len(blob) - 1, 60):
        damaged = bytearray(blob)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises((AssertionError, ValueError)):
            program["read_file"](path)


def test_the_page_names_everything_that_files_have() -> None:
    page = PAGE.read_text()
    names = {*fields.NEEDED, *fields.OPTIONAL, "crc32", "compiled", *bayes_spec.OPTIONS, *bayes_spec.PARTS}
    names |= {*packed_spec.PARTS, *Metadata.__dataclass_fields__, *KINDS, "granularity", "relu", "dtype"}
    names |= {bayes_spec.SCALED, *(field for kind in KINDS for field in usual(kind))}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert f"`version` is {container.VERSION}." in page
