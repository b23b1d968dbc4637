"""unwrapped: what compilers, parallel training and averaging put around a network is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bqnn
from bqnn import models
from bqnn.core.wrappers import unwrapped
from bqnn.engine.pack import pack
from bqnn.files.network import load, save

Wrap = Callable[[nn.Module], nn.Module]
WRAPPERS = {
    "compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "EMA": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "two": lambda net: torch.compile(AveragedModel(net), backend="eager"),
}


def bayes() -> nn.Module:
    torch.manual_seed(0)
    return bqnn.convert(models.lenet5(image_size=8))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("when", ["before-pack", "after-pack"])
def test_a_wrapped_network_is_saved_as_what_it_wraps(wrap: Wrap, when: str, tmp_path: Path) -> None:
    net = pack(wrap(bayes())) if when == "before-pack" else wrap(pack(bayes()))
    save(net, tmp_path / "net")
    loaded = load(tmp_path / "net")
    expected = pack(bayes()).state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), pack(bayes())(x))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_modules_too(wrap: Wrap, tmp_path: Path) -> None:
    net = pack(bqnn.convert(nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2))))
    whole = copy.deepcopy(net)
    net[0][1] = wrap(net[0][1])
    net[0] = wrap(net[0])
    save(net, tmp_path / "net")
    plain = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    model = nn.Sequential(wrap(copy.deepcopy(plain[0])), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    for given in (plain, model):
        loaded = load(tmp_path / "net", model=given)
        assert list(loaded.state_dict()) == list(whole.state_dict())
        assert torch.equal(loaded(x), whole(x))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, as DistributedDataParallel wants one."""
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before-pack", "after-pack"])
def test_a_network_of_many_processes(process_group: None, when: str, tmp_path: Path) -> None:
    net = pack(DistributedDataParallel(bayes())) if when == "before-pack" else DistributedDataParallel(pack(bayes()))
    save(net, tmp_path / "net")
    assert list(load(tmp_path / "net").state_dict()) == list(pack(bayes()).state_dict())


def test_the_tensors_are_the_network_s_own() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert unwrapped(net) is net
    assert unwrapped(torch.compile(net, backend="eager")) is net
    inside = nn.Sequential(torch.compile(net[0], backend="eager"), net[1])
    bare = unwrapped(inside)
    assert type(bare[0]) is nn.Linear and bare[0].weight is net[0].weight and bare[1].bias is net[1].bias
    assert type(inside[0]) is not nn.Linear, "the network itself stays as it is"
