"""Files that ask for more than they hold, or do not share what a model does; built-in networks that were changed."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import models
from bqnn.core.files import FormatError
from bqnn.engine.pack import pack
from bqnn.files import container
from bqnn.files.network import info, load, save
from bqnn.packed.base import PackedLayer
from tests.support.mutations import MEGABYTES, mutated, peak_megabytes, put_together, seeds, taken_apart
from tests.support.packed_nets import Apart, Shared

SECONDS = 2.0


def cheaply_refused(path: Path, message: str, model: nn.Module | None = None) -> None:
    """load and info refuse the file, in little time and memory."""
    before, started = peak_megabytes(), time.process_time()
    for read in (lambda: load(path, model), lambda: info(path)) if model is None else (lambda: load(path, model),):
        with pytest.raises(FormatError, match=message):
            read()
    assert time.process_time() - started < SECONDS
    assert peak_megabytes() - before < MEGABYTES


def write(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    path.write_bytes(container.to_bytes(tensors, metadata))


def linear(shape: list[int]) -> dict[str, Any]:
    return {"kind": "linear", "shape": shape, "num_levels": 2}


def test_three_thousand_layers_of_one_tensor(tmp_path: Path) -> None:
    tensors = {"0.codes": torch.zeros(1024, 1024, dtype=torch.uint8), "0.levels": torch.tensor([[0.0, 1.0]])}
    layers = {str(number): linear([1024, 8192]) for number in range(3000)}
    alias = {f"{number}.{part}": f"0.{part}" for number in range(1, 3000) for part in ("codes", "levels")}
    write(tmp_path / "net", tensors, factory=None, layers=layers, alias=alias)
    cheaply_refused(tmp_path / "net", "layer '0' is .* in the model", nn.Sequential(nn.Linear(2, 2)))
    cheaply_refused(
        tmp_path / "net", "layer '1' is in the file and not in", nn.Sequential(nn.Linear(8192, 1024, False))
    )


@pytest.mark.parametrize("shape", [[1] * 60_000, [2**62] * 60_000, [0] + [2**62] * 60_000, [1] * 64 + [2]])
def test_a_shape_of_many_dimensions(tmp_path: Path, shape: list[int]) -> None:
    size = 0 if 0 in shape else 2
    header = {"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}
    (tmp_path / "net").write_bytes(put_together(header, {"version": 1, "factory": None, "layers": {}}, bytes(size)))
    cheaply_refused(tmp_path / "net", "can not take|64 are the most")


def test_more_dimensions_than_a_file_can_hold_are_not_saved(tmp_path: Path) -> None:
    net = pack(bqnn.convert(nn.Sequential(nn.Linear(2, 2))))
    net.register_buffer("deep", torch.zeros([1] * 64))
    save(net, tmp_path / "net")
    net.deep = torch.zeros([1] * 65)
    with pytest.raises(ValueError, match="'deep' must have at most 64 dimensions"):
        save(net, tmp_path / "net")


@pytest.mark.parametrize("arguments", [{"depth": 1000}, {"depth": 1000, "growth_rate": 65536}])
def test_a_small_file_does_not_get_a_deep_network(tmp_path: Path, arguments: dict[str, int]) -> None:
    tensors = {"fc.codes": torch.zeros(1, 1, dtype=torch.uint8), "fc.levels": torch.tensor([[0.0, 1.0]])}
    write(tmp_path / "net", tensors, factory=["densenet", arguments], layers={"fc": linear([1, 2])})
    started = time.process_time()
    cheaply_refused(tmp_path / "net", "factory: it asks for far more tensors than there are")
    assert time.process_time() - started < 0.5, "building the network takes seconds"


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1], 2])
def test_a_version_that_is_no_integer(tmp_path: Path, version: Any) -> None:
    header, metadata, data = taken_apart(seeds()[0].blob)
    (tmp_path / "net").write_bytes(put_together(header, {**metadata, "version": version}, data))
    cheaply_refused(tmp_path / "net", "the format version is")


@pytest.mark.parametrize("field", ["version", "factory", "layers"])
def test_a_field_that_is_missing(tmp_path: Path, field: str) -> None:
    header, metadata, data = taken_apart(seeds()[0].blob)
    del metadata[field]
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    cheaply_refused(tmp_path / "net", "version is None" if field == "version" else f"must have the field '{field}'")


@pytest.mark.parametrize("depth", [9, 300, 900, 100_000])
def test_deep_json(tmp_path: Path, depth: int) -> None:
    for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        for text in (f'{{"factory":{deep}}}', json.dumps({"bqnn": "{}"})[:-1] + f',"x":{deep}}}'):
            header = json.dumps({"__metadata__": {"bqnn": text}}) if "factory" in text else text
            (tmp_path / "net").write_bytes(len(header).to_bytes(8, "little") + header.encode())
            cheaply_refused(tmp_path / "net", "is no JSON|is nested deeper than 8 levels")


def test_a_factory_that_lacks_an_argument(tmp_path: Path) -> None:
    save(pack(bqnn.convert(models.lenet5())), tmp_path / "net")
    header, metadata, data = taken_apart((tmp_path / "net").read_bytes())
    metadata["factory"] = ["lenet5", {}]
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    cheaply_refused(tmp_path / "net", "factory must have all arguments")


def change_one(part: str, net: nn.Module) -> None:
    """Makes ``again`` a layer of its own that shares all with ``first`` but one part."""
    net.again = copy.copy(net.first)
    net.again._buffers = dict(net.first._buffers)
    if part == "relu":
        net.again.relu = True
    else:
        setattr(net.again, part, getattr(net.first, part).clone())


@pytest.mark.parametrize("part", ["codes", "levels", "bias", "relu"])
def test_layers_that_differ_in_one_part_are_two(part: str, tmp_path: Path) -> None:
    net = pack(bqnn.convert(Shared()))
    change_one(part, net)
    save(net, tmp_path / "net")
    cheaply_refused(tmp_path / "net", "layers 'first' and 'again' are one in the model and two in the file", Shared())
    loaded = load(tmp_path / "net", model=Apart())
    assert isinstance(loaded.again, PackedLayer) and loaded.again.relu == (part == "relu")


def test_tensors_that_are_one_in_the_model_have_to_be_one_in_the_file(tmp_path: Path) -> None:
    net = pack(bqnn.convert(Shared()))
    net.norm_again = copy.deepcopy(net.norm)
    save(net, tmp_path / "net")
    cheaply_refused(tmp_path / "net", "'norm.weight' and 'norm_again.weight' are one in the model and two", Shared())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_that_two_modules_hold_stays_one(tmp_path: Path, device: str) -> None:
    def tied() -> nn.Module:
        net = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3), "fc": nn.Linear(3, 3)})
        net["b"].weight = net["a"].weight
        return net

    net = bqnn.convert(tied())
    with torch.no_grad():
        net["a"].weight.copy_(torch.arange(3.0))
    save(pack(net), tmp_path / "net")
    with torch.device(device):
        model = tied()
    loaded = load(tmp_path / "net", model=model)
    assert loaded["a"].weight is loaded["b"].weight
    assert loaded["a"].weight.tolist() == [0.0, 1.0, 2.0]


def changed(change: Callable[[Any], object]) -> nn.Module:
    net = models.lenet5(image_size=8)
    change(net)
    return net


@pytest.mark.parametrize(
    "net, message",
    [
        pytest.param(changed(lambda net: setattr(net, "fc3", nn.Linear(84, 26))), "layer 'fc3' is", id="head"),
        pytest.param(
            changed(lambda net: setattr(net, "bn4", nn.Identity())), "tensor 'bn4.bias' is missing", id="norm"
        ),
        pytest.param(changed(lambda net: setattr(net, "extra", nn.Linear(2, 2))), "layer 'extra' is", id="layer"),
        pytest.param(changed(lambda net: setattr(net, "drop", nn.Dropout())), "module 'drop' is another", id="module"),
        pytest.param(changed(lambda net: setattr(net.bn1, "eps", 0.1)), "module 'bn1' is another", id="setting"),
        pytest.param(changed(lambda net: setattr(net, "second_pool", 7)), "module '' is another", id="attribute"),
        pytest.param(changed(lambda net: setattr(net, "bn4", net.bn4)), None, id="unchanged"),
        pytest.param(changed(lambda net: setattr(net.bn4, "forward", len)), "module 'bn4' is another", id="forward"),
    ],
)
def test_a_built_in_network_that_was_changed(net: nn.Module, message: str | None, tmp_path: Path) -> None:
    small = pack(bqnn.convert(net))
    if message is None:
        save(small, tmp_path / "net")
        assert load(tmp_path / "net").factory == net.factory
        return
    with pytest.raises(
        ValueError, match=f"net must be what its attribute factory makes, but {message}.*del net.factory"
    ):
        save(small, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
    del small.factory
    save(small, tmp_path / "net")
    loaded = load(tmp_path / "net", model=net)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in small.state_dict().items())


def test_a_state_that_is_made_when_asked_for_is_not_saved(tmp_path: Path) -> None:
    net = pack(bqnn.convert(nn.Sequential(nn.Linear(2, 2))))
    net.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(made=torch.ones(1)))
    with pytest.raises(ValueError, match="the state 'made' .* must be a parameter or a buffer"):
        save(net, tmp_path / "net")


def test_conjugated_and_negated_numbers_are_saved_as_what_they_stand_for(tmp_path: Path) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    net = pack(bqnn.convert(nn.Sequential(nn.Linear(2, 2))))
    net.register_buffer("conjugated", numbers.conj())
    net.register_buffer("negated", numbers.conj().imag)
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net", model=net)
    assert loaded.conjugated.tolist() == [1 - 2j, 3 + 4j] and loaded.negated.tolist() == [-2.0, 4.0]


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        for read in (load, info):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)


def test_messages_are_short_and_print(tmp_path: Path) -> None:
    name = "\x1b[2J" + "x" * 10**6
    write(tmp_path / "net", {}, factory=None, layers={name: {"kind": name, "shape": [1] * 10**6}})
    with pytest.raises(FormatError) as error:
        info(tmp_path / "net")
    assert len(str(error.value)) < 1200 + len(str(tmp_path)) and "\x1b" not in str(error.value)


def test_mutations_are_seen(tmp_path: Path) -> None:
    """The judge of mutated files is no use if the mutations are none, or their checksums wrong."""
    draw, seed = random.Random(0), seeds()[0]
    blobs = {mutated(draw, seed.blob) for _ in range(100)}
    assert len(blobs) > 50
    header, metadata, data = taken_apart(seed.blob)
    (tmp_path / "net").write_bytes(put_together(header, metadata, data))
    assert info(tmp_path / "net")["layers"].keys() == {"0", "3"}
