"""Kernels that read their seed in memory: the same noise as of the same seed by number, at the cost of a load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")
import bqnn
from bqnn import ops
from bqnn.core.quantizer import Posterior
from bqnn.kernels.arguments import Noise
from bqnn.ops.backends import triton as backend
from tests.support.aot import compiled
from tests.support.helpers import make_case, triton_devices
from tests.support.shapes import INTERPRETED, Conv2dShape, LinearShape

SEEDED = ["sample_linear", "moment_linear", "sample_conv2d", "moment_conv2d"]
SHAPES = {"linear": LinearShape(32, 64, 64), "conv2d": Conv2dShape(2, 32, 12, 6, 6, (3, 3), padding=(1, 1))}


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_in_memory_draws_the_same(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SHAPES[name.split("_")[1]], 3, "tensor").to(device).leaves()
    grad = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(1)).to(device)
    seed = torch.tensor(20261)

    def results(in_memory: bool) -> list[Tensor]:
        monkeypatch.setattr(backend, "kernels_read", lambda seed: in_memory)
        at = seed.to(device) if in_memory else seed
        y = getattr(ops, name)(*case.tensors(), at, backend="triton", **case.geometry)
        return [y, *torch.autograd.grad(y, case.tensors()[:4], grad)]

    for by_number, in_memory in zip(results(False), results(True), strict=True):
        assert torch.equal(by_number, in_memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_replays_of_a_graph_draw_new_noise() -> None:
    layer, x = bqnn.convert(nn.Sequential(nn.Linear(64, 64))).cuda().train(), torch.randn(32, 64, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with bqnn.capturable(), torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            y = layer(x)

    def replayed() -> Tensor:
        graph.replay()
        return y.clone()

    torch.cuda.manual_seed(1)
    first, second = replayed(), replayed()
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(1)
    assert torch.equal(replayed(), first)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_kernel_that_reads_its_seed_compiles() -> None:
    case = make_case(LinearShape(32, 64, 64), 3, "tensor")
    posterior = Posterior(case.weight, case.log_sigma2, case.levels, case.thresholds)
    sample = backend.kernels("sample").sample
    by_number, in_memory = (
        compiled(lambda seed=seed: sample(posterior, Noise(seed, 0), torch.bfloat16), 90)[0]
        for seed in (5, torch.tensor(5))
    )
    assert in_memory.name == "sample_fwd_kernel_at_seed"
    assert in_memory.local == in_memory.stack == 0
    assert by_number.instructions <= in_memory.instructions <= 1.1 * by_number.instructions
