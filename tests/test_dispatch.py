"""Which backend runs: order of preference, reasons, forcing, logging once, and the way from an op to it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core import native
from bqnn.ops import dispatch
from bqnn.ops.dispatch import BackendError
from bqnn.ops.register import register_op

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = [
    "assign_codes",
    "moment_conv2d",
    "moment_conv2d_backward",
    "moment_linear",
    "moment_linear_backward",
    "sample_conv2d",
    "sample_conv2d_backward",
    "sample_linear",
    "sample_linear_backward",
    "spike_slab_kl",
    "spike_slab_kl_backward",
]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op with the backends cpu and reference, known to this test alone, as if the extensions were here."""
    monkeypatch.setattr(native, "MISSING", "")
    monkeypatch.setattr(native, "cuda_missing", lambda: "")
    monkeypatch.setattr(dispatch, "_implementations", {})
    dispatch._choose.cache_clear()
    dispatch.register("probe", "reference", lambda: "reference ran")
    dispatch.register("probe", "cpu", lambda: "cpu ran")
    yield "probe"
    dispatch._choose.cache_clear()


def test_the_first_usable_backend_is_chosen(op: str) -> None:
    assert dispatch.choose(op, CPU) == "cpu"
    assert dispatch.choose(op, CUDA) == "reference"
    assert dispatch.implementation(op, CPU)() == "cpu ran"
    assert dispatch.implementation(op, CPU, "reference")() == "reference ran"


def test_every_backend_can_be_chosen(op: str) -> None:
    dispatch.register(op, "triton", lambda: "triton ran")
    assert dispatch.choose(op, CUDA) == "triton"
    assert dispatch.choose(op, CPU) == "cpu"
    dispatch._choose.cache_clear()
    dispatch.register(op, "cuda", lambda: "cuda ran")
    assert dispatch.choose(op, CUDA) == "cuda"
    assert dispatch.choose(op, CUDA, "triton") == "triton"


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        pytest.param("cuda", CUDA, "not installed", id="no-kernel"),
        pytest.param(
            "triton", CPU, "runs on a GPU, or with TRITON_INTERPRET=1, and the tensors are on cpu", id="triton-on-cpu"
        ),
        pytest.param("cpu", CUDA, "runs on the CPU and the tensors are on cuda", id="cpu-on-cuda"),
        pytest.param("abacus", CPU, "no such backend; there are cuda, triton, cpu, reference", id="unknown"),
    ],
)
def test_a_forced_backend_that_is_not_usable_raises_with_the_reason(
    op: str, backend: str, device: torch.device, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.register(op, "triton", lambda: "triton ran")
    message = f"backend '{backend}' can not run bqnn::probe: .*{reason}"
    with pytest.raises(BackendError, match=message):
        dispatch.choose(op, device, backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=message):
        dispatch.choose(op, device)
    assert issubclass(BackendError, RuntimeError)


def test_the_environment_forces_and_an_argument_goes_before_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    assert dispatch.choose(op, CPU) == "reference"
    assert dispatch.choose(op, CPU, "cpu") == "cpu"
    monkeypatch.setenv("BQNN_BACKEND", "")
    assert dispatch.choose(op, CPU) == "cpu"


def test_the_choice_is_logged_once_with_what_was_passed_over(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bqnn"):
        for _ in range(3):
            dispatch.choose(op, CPU)
    assert len(caplog.messages) == 1
    assert "bqnn::probe on cpu: cpu" in caplog.text
    assert "passed over: cuda (not installed), triton (not installed)" in caplog.text


def test_an_op_hands_its_arguments_and_defaults_to_the_chosen_backend(op: str) -> None:
    calls = []

    def implementation(x: Tensor, factor: int, name: str) -> Tensor:
        calls.append((factor, name))
        return x * factor

    register_op(
        "probe_scale",
        "(Tensor x, int factor=3, str name='a', str? backend=None) -> Tensor",
        implementation,
        lambda x, factor=3, name="a", backend=None: torch.empty_like(x),
    )
    x = torch.ones(2)
    torch.ops.bqnn.probe_scale(x)
    torch.ops.bqnn.probe_scale(x, 5)
    torch.ops.bqnn.probe_scale(x, name="b")
    torch.ops.bqnn.probe_scale(x, 5, "b", "reference")
    assert calls == [(3, "a"), (5, "a"), (3, "b"), (5, "b")]
    with pytest.raises(BackendError, match="'cpu' can not run bqnn::probe_scale"):
        torch.ops.bqnn.probe_scale(x, backend="cpu")
    torch.library.opcheck(torch.ops.bqnn.probe_scale.default, (x,))


def test_the_table_has_every_op_device_and_backend() -> None:
    table = bqnn.backends()
    assert set(OPS) <= set(table)
    for op_name, devices in table.items():
        assert set(devices) == {"cpu", "cuda"}
        for device, backends in devices.items():
            assert tuple(backends) == dispatch.ORDER
            assert backends["reference"].usable
            for state in backends.values():
                assert state.usable == (state.reason == "")
            chosen = dispatch.choose(op_name, torch.device(device))
            assert backends[chosen].usable


def test_the_table_prints(op: str) -> None:
    lines = str(bqnn.backends()).splitlines()
    assert lines[0].split()[:2] == ["op", "device"]
    assert lines[1].split()[:3] == ["probe", "cpu", "cpu"]
    assert lines[2].split()[:3] == ["probe", "cuda", "reference"]
    assert "cpu: it runs on the CPU and the tensors are on cuda" in lines[2]


def test_import_asks_for_no_gpu_and_loads_no_compiler() -> None:
    script = "import sys, torch, bqnn; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]
