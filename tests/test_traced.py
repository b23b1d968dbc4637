"""Compiled networks inside torch.compile and torch.export: one graph, without a break, and the same numbers."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim

import bqnn
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.traced import run_compiled
from tests.support.compiled import Function, packed

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")

X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return packed(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)))


class Pipeline(nn.Module):
    """What a user may have around a compiled network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * x).softmax(-1)


def traced(net: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("is_used", [False, True], ids=["fresh", "used"])
def test_one_graph_for_any_batch(is_used: bool, small: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    fast = bqnn.compile(small, X)
    expected = bqnn.compile(small, X)
    if is_used:
        fast(X)
    pipeline = traced(Pipeline(fast))
    for batch in (3, 7, 1, 9):
        x = X.repeat(3, 1, 1, 1)[:batch]
        assert torch.equal(pipeline(x), expected(2 * x).softmax(-1))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_inputs_of_every_dtype(dtype: torch.dtype, small: nn.Module) -> None:
    fast, x = bqnn.compile(small, X, precision="int8", calibration=[X]), (40 * X.abs()).to(dtype)
    expected = fast(x)
    found = traced(fast)(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_ensembles_and_parts_of_torchs(small: nn.Module) -> None:
    both = bqnn.compile([small, packed(small[:-1] + nn.Sequential(nn.Linear(64, 5)))], X)
    assert torch.equal(traced(both)(X), both(X))
    weights = [torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    net = Function(lambda x: nn.functional.linear(torch.cumsum(nn.functional.linear(x, weights[0]), 1), weights[1]))
    mixed, x = bqnn.compile(net, X[:, 0, 0, :5]), X[:, 1, 1, :5]
    assert len(mixed.parts) == 3
    torch.testing.assert_close(traced(mixed)(x), mixed(x))


def test_export(small: nn.Module) -> None:
    fast = bqnn.compile(small, X)
    with torch.no_grad():
        program = torch.export.export(Pipeline(fast), (X,), dynamic_shapes=({0: Dim("batch")},))
    assert torch.equal(program.module()(X[:2]), fast(2 * X[:2]).softmax(-1))
    assert [str(node.target) for node in program.graph.nodes if "bqnn" in str(node.target)] == [
        "bqnn.run_compiled.default"
    ]


@pytest.mark.parametrize("dims", [0, 1, 4])
def test_vmap_maps_over_more_images(dims: int, small: nn.Module) -> None:
    fast, x = bqnn.compile(small, X), torch.randn(4, 3, 2, 6, 6)
    found = torch.vmap(fast, in_dims=dims)(x.movedim(0, dims))
    assert torch.equal(found, torch.stack([fast(each) for each in x]))
    two = bqnn.compile(Function(lambda a, b: nn.functional.linear(a - b, torch.ones(2, 3))), (x[0, 0, 0, :, :3],) * 2)
    a, b = torch.randn(4, 5, 3), torch.randn(5, 3)
    assert torch.equal(torch.vmap(two, in_dims=(0, None))(a, b), torch.stack([two(each, b) for each in a]))


def test_there_is_no_gradient_of_any_kind(small: nn.Module) -> None:
    """Forward-mode differentiation would go on with zeros."""
    fast = bqnn.compile(small, X)
    fast(X)
    message = "must not require a gradient, which a compiled network has none of"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(fast, (X,), (X,))
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: fast(x).sum())(X)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        fast(forward_ad.make_dual(X, X))
    with forward_ad.dual_level():
        assert torch.equal(fast(X), bqnn.compile(small, X)(X))


def test_torch_jit_script_names_the_other_ways(small: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match="can not read a CompiledNetwork; torch.export, torch.compile"):
        torch.jit.script(bqnn.compile(small, X))


def test_errors_name_the_input_there_too(small: nn.Module) -> None:
    fast = bqnn.compile(small, X)
    with pytest.raises(Exception, match="must have the shape"):
        traced(fast)(X[:, :1])


def number_of(fast: CompiledNetwork) -> int:
    return fast._number


def test_every_network_has_a_number_of_its_own(small: nn.Module) -> None:
    fast = bqnn.compile(small, X)
    others = [copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), bqnn.compile(small, X)]
    assert len({number_of(each) for each in (fast, *others)}) == 5
    for each in others:
        assert torch.equal(run_compiled(number_of(each), 0, [X])[0], fast(X))


def test_a_graph_does_not_run_another_network_when_its_own_is_gone(small: nn.Module) -> None:
    number = number_of(bqnn.compile(small, X))
    gc.collect()
    with pytest.raises(RuntimeError, match="the compiled network that this graph was made with is gone"):
        run_compiled(number, 0, [X])


def test_the_op(small: nn.Module) -> None:
    fast = bqnn.compile(small, X)
    torch.library.opcheck(run_compiled, (number_of(fast), 0, [X]))
