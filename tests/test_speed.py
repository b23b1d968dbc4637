"""The model that chooses between packed and dense, and the table that checks it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bqnn
from bqnn import dispatch, speed
from bqnn.models import lenet5
from bqnn.pack import pack
from bqnn.packed import PackedLinear
from bqnn.speed import LayerWork, Roofline, explain_speed, packed_row_limit

MACHINE = Roofline(bytes_per_second=1e10, operations_per_second=1e11, call_seconds=1e-6)
CPU = torch.device("cpu")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the cpu backend had kernels of the packed ops, on a machine with the rates of MACHINE."""
    real = dispatch.choose

    def choose(op: str, device: torch.device, backend: str | None = None) -> str:
        return "cpu" if op.startswith("packed") else real(op, device, backend)

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(speed, "roofline", lambda device: MACHINE)
    yield


def test_roofline_is_the_longer_of_two() -> None:
    assert MACHINE.seconds(1e10, 1) == pytest.approx(1.0 + 1e-6)
    assert MACHINE.seconds(1, 1e11) == pytest.approx(1.0 + 1e-6)


def test_expected_seconds() -> None:
    work = LayerWork(channels=1000, columns=2000, rows=1, activations=3000, packed_bytes=400_012)
    assert work.dense_seconds(MACHINE) == pytest.approx(1e-6 + 4 * 2_003_000 / 1e10)
    assert work.packed_seconds(MACHINE, "cpu") == pytest.approx(1e-6 + (400_012 + 12_000) / 1e10)
    many = work._replace(rows=1000, activations=3_000_000)
    assert many.dense_seconds(MACHINE) == pytest.approx(1e-6 + 2 * 1000 * 2_000_000 / 1e11)
    for case in (work, many):
        assert case.packed_seconds(MACHINE, "reference") > case.dense_seconds(MACHINE)


def test_the_reference_is_never_chosen_for_time() -> None:
    assert packed_row_limit("packed_linear", CPU, 4096, 4096, 1) == 0
    layer = pack(bqnn.BayesLinear(64, 32))
    assert layer.execution_for(torch.zeros(1, 64)) == "dense"
    layer.execution = "packed"
    assert layer.execution_for(torch.zeros(1, 64)) == "packed"


def test_a_kernel_is_chosen_up_to_the_crossover(kernel: None) -> None:
    limit = packed_row_limit("packed_linear", CPU, 1000, 2000, 400_012)
    assert 1 <= limit < math.inf

    def wins(rows: int) -> bool:
        work = LayerWork(1000, 2000, rows, rows * 3000, 400_012)
        return work.packed_seconds(MACHINE, "cpu") < work.dense_seconds(MACHINE)

    assert wins(int(limit))
    assert not wins(2 * int(limit))
    layer = pack(bqnn.BayesLinear(2000, 1000))
    limit = int(layer._row_limit)
    assert layer.execution_for(torch.zeros(limit, 2000)) == "packed"
    assert layer.execution_for(torch.zeros(limit + 1, 2000)) == "dense"


def test_a_forced_backend_that_can_not_run_says_so_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pack(bqnn.BayesLinear(5, 3))
    monkeypatch.setenv("BQNN_BACKEND", "triton")
    layer.execution = "auto"
    with pytest.raises(bqnn.BackendError, match="'triton' can not run bqnn::packed_linear"):
        layer(torch.zeros(1, 5))


def test_explain_speed() -> None:
    net = pack(bqnn.convert(lenet5()))
    net.fc2.execution = "packed"
    report = explain_speed(net, torch.zeros(2, 1, 28, 28))
    assert [layer.name for layer in report] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert [layer.rows for layer in report] == [2 * 28 * 28, 2 * 100, 2, 2, 2]
    assert [layer.execution for layer in report] == ["dense", "dense", "dense", "packed", "dense"]
    assert {layer.backend for layer in report} == {"reference"}
    for layer in report:
        assert 0 < layer.expected_dense < layer.expected_packed < 1
        assert min(layer.measured_packed, layer.measured_dense) > 0
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report)
    assert [line.split()[0] for line in lines[2:]] == [layer.name for layer in report]
    assert all("3 levels, 5/byte" in line for line in lines[2:])
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_explain_speed_takes_the_first_input_of_a_shared_layer() -> None:
    layer = pack(bqnn.BayesLinear(4, 4))
    report = explain_speed(nn.Sequential(layer, nn.Flatten(0, 0), layer), torch.zeros(3, 4))
    assert [(row.name, row.rows) for row in report] == [("0", 3)]


def test_explain_speed_needs_a_packed_layer() -> None:
    with pytest.raises(ValueError, match="net must have a packed layer"):
        explain_speed(nn.Linear(3, 3), torch.zeros(1, 3))


def test_a_single_layer_has_no_name() -> None:
    layer = pack(bqnn.BayesLinear(4, 4))
    assert isinstance(layer, PackedLinear)
    assert [row.name for row in explain_speed(layer, torch.zeros(3, 4))] == [""]
