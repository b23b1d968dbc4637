"""Kernels that read their seed in memory: the same noise as of the same seed by number, at the cost of a load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from bench import host_time
from bqnn.core.quantizer import Posterior
from bqnn.kernels.arguments import Noise
from bqnn.ops.backends import triton as backend
from tests.support.aot import compiled
from tests.support.helpers import make_case, triton_devices
from tests.support.shapes import INTERPRETED, LinearShape

SEEDED = ["sample_linear", "moment_linear", "sample_conv2d", "moment_conv2d"]


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_in_memory_draws_the_same(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("the bench's tensors are on the CPU, which the interpreter takes")
    monkeypatch.setenv("BQNN_BACKEND", "triton")
    op = host_time.OPS[name]()

    def results(in_memory: bool) -> list[Tensor]:
        monkeypatch.setattr(backend, "kernels_read", lambda seed: in_memory)
        outputs: Any = op.forward()
        return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *op.step()]

    for by_number, in_memory in zip(results(False), results(True), strict=True):
        assert torch.equal(by_number, in_memory)


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
