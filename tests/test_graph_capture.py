"""A training step can be captured in a CUDA graph: no number of the host's is in it but those that shapes give, seeds
are read by the kernels, and nothing waits for the GPU.

Launches do nothing, on CPU tensors that stand for a GPU's: what two runs hand to kernels must differ in what is in
memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bqnn
from bqnn.core import philox
from tests.support.reads import NothingIsRead
from tests.support.shapes import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
from bench import host_time
from bqnn.ops.backends import triton as backend
from tests.support.launches import Launched, Memory, gpu_stands_in

SEEDED = ["sample_linear", "moment_linear", "sample_conv2d", "moment_conv2d"]


@pytest.fixture
def seeds_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds on the CPU stand for seeds on a GPU."""
    monkeypatch.setattr(backend, "kernels_read", lambda seed: True)


@pytest.fixture
def launches(seeds_on_the_gpu: None) -> Iterator[list[Launched]]:
    if INTERPRETED:
        pytest.skip("the interpreter has no launches")
    with gpu_stands_in(keeps_arguments=True) as done:
        yield done


def captured(step: Callable[[], Any], launches: list[Launched]) -> list[Any]:
    launches.clear()
    with NothingIsRead():
        step()
    return [each.numbers() for each in launches]


@pytest.mark.parametrize("name", host_time.OPS)
def test_no_op_keeps_a_seed(name: str, launches: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor(1)
    monkeypatch.setattr(host_time.torch, "tensor", lambda value, **options: seed if value == host_time.SEED else value)
    if name not in SEEDED:
        monkeypatch.undo()
    op = host_time.OPS[name]()
    first = captured(op.step, launches)
    seed.fill_(2)
    assert captured(op.step, launches) == first
    if name in SEEDED:
        reading = [each for each in launches if each.endswith("_at_seed")]
        assert reading
        assert all(
            any(isinstance(given, Memory) and given.address == seed.data_ptr() for given in each.arguments)
            for each in reading
        )


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    return bqnn.convert(net)


@pytest.mark.parametrize("estimator", ["sample", "moment", "local"])
def test_no_step_keeps_a_seed(estimator: str, launches: list[Launched]) -> None:
    net = make_net().train()
    for layer in (net[0], net[3]):
        layer.estimator = estimator
    x, target = torch.randn(4, 3, 6, 6), torch.arange(4)

    def step() -> None:
        net.zero_grad()
        (nn.functional.cross_entropy(net(x), target) + bqnn.kl_divergence(net) / 100).backward()

    step()
    first = captured(step, launches)
    assert any(name.endswith("_at_seed") for name, _, _ in first)
    assert captured(step, launches) == first


class Devices(TorchDispatchMode):
    """Where the outputs of every op are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {each.device.type for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, Tensor)}
        return out


@pytest.mark.parametrize(
    ("where", "expected"), [(bqnn.capturable, {"cuda"}), (nullcontext, {"cpu", "cuda"})], ids=["capturable", "eager"]
)
def test_a_step_makes_nothing_on_the_host(
    where: Callable[[], Any], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    net, devices = make_net().train(), Devices()
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty_like(each, device="cuda") for name, each in net.state_dict().items()}
        x = torch.empty(4, 3, 6, 6, device="cuda")
        with devices, where():
            torch.func.functional_call(net, state, (x,))
    assert devices.seen == expected


def test_seeds_are_drawn_where_a_graph_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, cuda = False, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert philox._place_of_seed(cuda) == "cpu"
    with bqnn.capturable():
        assert philox._place_of_seed(cuda) == cuda
        assert philox._place_of_seed(torch.device("cpu")) == philox._place_of_seed(None) == "cpu"
    assert philox._place_of_seed(cuda) == "cpu"
    capturing = True
    assert philox._place_of_seed(cuda) == cuda
    capturing = False
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert philox._place_of_seed(cuda) == cuda
