"""Which backend runs: order of preference, reasons, forcing, logging once, and the way from an op to it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core import native
from bqnn.core.structure import Structure
from bqnn.ops import dispatch
from bqnn.ops.dispatch import BackendError
from bqnn.ops.register import register_op

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = [
    "assign_codes",
    "mixture_kl",
    "mixture_kl_backward",
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


class Elsewhere:
    """In place of a tensor on a device that need not be here."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


def call_on(device: torch.device, odd: bool = False) -> tuple[Elsewhere, bool]:
    return Elsewhere(device), odd


def chosen(op: str, device: torch.device, backend: str | None = None) -> str:
    return dispatch.choose(op, call_on(device), backend).name


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op with the backends cpu and reference, known to this test alone, as if the extensions were here."""
    monkeypatch.setattr(native, "MISSING", "")
    monkeypatch.setattr(native, "cuda_missing", lambda: "")
    monkeypatch.setattr(dispatch, "_backends", {})
    dispatch._log_choice.cache_clear()
    dispatch.register("probe", "reference", lambda call: "reference ran")
    dispatch.register("probe", "cpu", lambda call: "cpu ran", lambda call: "it takes no odd calls" if call[1] else "")
    yield "probe"
    dispatch._candidates.cache_clear()


def test_the_first_usable_backend_is_chosen(op: str) -> None:
    assert chosen(op, CPU) == "cpu"
    assert chosen(op, CUDA) == "reference"
    assert dispatch.run(op, call_on(CPU)) == "cpu ran"
    assert dispatch.run(op, call_on(CPU), "reference") == "reference ran"


def test_a_call_that_a_backend_does_not_serve_is_the_next_ones(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.run(op, call_on(CPU, odd=True)) == "reference ran"
    message = "backend 'cpu' can not run bqnn::probe: it takes no odd calls"
    with pytest.raises(BackendError, match=message):
        dispatch.run(op, call_on(CPU, odd=True), "cpu")
    monkeypatch.setenv("BQNN_BACKEND", "cpu")
    with pytest.raises(BackendError, match=message):
        dispatch.run(op, call_on(CPU, odd=True))


def test_a_backend_by_name_only_is_never_chosen(op: str) -> None:
    dispatch.register(op, "dense", lambda call: "dense ran")
    assert dispatch.run(op, call_on(CPU)) == "cpu ran"
    assert dispatch.run(op, call_on(CPU, odd=True)) == "reference ran"
    assert dispatch.run(op, call_on(CPU), "dense") == "dense ran"


def test_every_backend_can_be_chosen(op: str) -> None:
    dispatch.register(op, "triton", lambda call: "triton ran")
    assert chosen(op, CUDA) == "triton"
    assert chosen(op, CPU) == "cpu"
    dispatch.register(op, "cuda", lambda call: "cuda ran")
    assert chosen(op, CUDA) == "cuda"
    assert chosen(op, CUDA, "triton") == "triton"


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
    dispatch.register(op, "triton", lambda call: "triton ran")
    message = f"backend '{backend}' can not run bqnn::probe: .*{reason}"
    with pytest.raises(BackendError, match=message):
        chosen(op, device, backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=message):
        chosen(op, device)
    assert issubclass(BackendError, RuntimeError)


def test_the_environment_forces_and_an_argument_goes_before_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    assert chosen(op, CPU) == "reference"
    assert chosen(op, CPU, "cpu") == "cpu"
    monkeypatch.setenv("BQNN_BACKEND", "")
    assert chosen(op, CPU) == "cpu"


def test_the_choice_is_logged_once_with_what_was_passed_over(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bqnn"):
        for _ in range(3):
            chosen(op, CPU)
    assert len(caplog.messages) == 1
    assert "bqnn::probe on cpu: cpu" in caplog.text
    assert "passed over: cuda (not installed), triton (not installed)" in caplog.text


class Scale(NamedTuple):
    x: Tensor
    factor: int
    name: str


def test_a_schema_that_names_other_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="the schema of bqnn::probe_other must name"):
        register_op("probe_other", "(Tensor x, int factor, str? backend=None) -> Tensor", Structure(Scale), id, id)


def test_an_op_hands_its_arguments_and_defaults_to_the_chosen_backend(op: str) -> None:
    calls = []

    def implementation(call: Scale) -> Tensor:
        calls.append((call.factor, call.name))
        return call.x * call.factor

    schema = "(Tensor x, int factor=3, str name='a', str? backend=None) -> Tensor"
    structure = Structure(Scale)
    register_op("probe_scale", schema, structure, implementation, lambda call: torch.empty_like(call.x))
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
            assert backends[dispatch.available(op_name, torch.device(device))].usable


def test_the_table_of_one_op_prints(op: str) -> None:
    assert [line.split() for line in str(bqnn.backends()).splitlines()[1:]] == [["probe", "cpu", "reference"]]
    dispatch.register("probe_backward", "reference", lambda call: None)
    assert str(bqnn.backends()).splitlines()[1].split() == ["probe", "cpu,", "backward", "reference", "reference"]


def test_the_table_fits_a_screen_whatever_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", "no compiler: " + "the build said why, at length. " * 40)
    monkeypatch.setattr(native, "cuda_missing", lambda: "there is no GPU that torch can use")
    lines = str(bqnn.backends()).splitlines()
    assert lines[0].split() == ["op", "on", "the", "CPU", "on", "a", "GPU"]
    assert {line.split()[0]: line.split()[1] for line in lines}["packed_linear"] == "reference"
    assert "cuda is not usable: there is no GPU that torch can use" in lines
    assert any(line.startswith("cpu is not usable: no compiler: the build said why") for line in lines)
    assert len(lines) < 24 and max(map(len, lines)) <= 80


def test_import_asks_for_no_gpu_and_loads_no_compiler() -> None:
    script = "import sys, torch, bqnn; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]
