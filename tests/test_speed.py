"""The model that chooses between packed and dense, and the table that checks it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bqnn
from bqnn.engine.pack import pack
from bqnn.models import lenet5
from bqnn.ops import dispatch
from bqnn.packed import cost
from bqnn.packed.cost import ALWAYS, NEVER, LayerWork, Roofline, RowRange, packed_rows
from bqnn.packed.layers import PackedLinear
from bqnn.packed.probes import Rates
from bqnn.reports.explain import explain_speed

MACHINE = Roofline(bytes_per_second=1e10, operations_per_second=1e11, call_seconds=1e-6)
CPU = torch.device("cpu")
WORK = LayerWork(
    "packed_linear", 3, "fp32", channels=1000, columns=2000, rows=1, activations=3000, packed_bytes=400_012
)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Rates]:
    """As if the cpu backend had kernels of the packed ops, with these rates: faster from 1 to 300 rows."""
    real = dispatch.choose

    def choose(op: str, device: torch.device, backend: str | None = None) -> str:
        return "cpu" if op.startswith("packed") else real(op, device, backend)

    rates = {
        "packed": Rates(1e-6, (1, 100), (1e-12, 5e-11)),
        "dense": Rates(1e-6, (1, 100), (1e-11, 2e-11)),
    }
    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(cost, "cpu_rates", lambda op, num_levels, precision, weights, execution: rates[execution])
    return rates


# An H200's data sheet, and what a call takes from Python, about.
GPU_BYTES, GPU_OPERATIONS, GPU_CALL = 4.8e12, {torch.float32: 60e12, torch.bfloat16: 800e12}, 2e-5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As if there were a GPU with Triton."""
    rates = {dtype: Roofline(GPU_BYTES, operations, GPU_CALL) for dtype, operations in GPU_OPERATIONS.items()}
    monkeypatch.setattr(cost, "roofline", lambda device, dtype=torch.float32: rates[dtype])
    monkeypatch.setattr(cost, "packed_call_seconds", lambda *arguments: 3e-5)
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: "triton")
    return torch.device("cuda")


def test_roofline_is_the_longer_of_two() -> None:
    assert MACHINE.seconds(1e10, 1) == pytest.approx(1.0 + 1e-6)
    assert MACHINE.seconds(1, 1e11) == pytest.approx(1.0 + 1e-6)


def test_expected_seconds_by_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WORK.dense_seconds(MACHINE) == pytest.approx(1e-6 + 4 * 2_003_000 / 1e10)
    assert WORK.packed_seconds(MACHINE, "triton") == pytest.approx(1e-6 + (400_012 + 12_000) / 1e10)
    many = WORK._replace(rows=1000, activations=3_000_000)
    assert many.dense_seconds(MACHINE) == pytest.approx(1e-6 + 2 * 1000 * 2_000_000 / 1e11)
    monkeypatch.setattr(cost, "roofline", lambda device, dtype=torch.float32: MACHINE)
    for case in (WORK, many):
        packed, dense = case.expected_seconds(CPU, "reference")
        assert packed > dense


def test_a_gpu_decodes_once_for_each_tile_of_rows(gpu: torch.device) -> None:
    weights = 16384 * 16384
    sizes = {"rows": 1, "activations": 32768, "packed_bytes": weights // 5, "dtype": torch.bfloat16}
    work = LayerWork("packed_linear", 3, "bf16", 16384, 16384, **sizes)
    packed, dense = work.gpu_seconds(gpu)
    assert dense == pytest.approx(GPU_CALL + 2 * (weights + 32768) / GPU_BYTES)
    decode = cost.DECODE_INSTRUCTIONS[2] * weights / 30e12
    assert packed == pytest.approx(3e-5 + decode + 2 * weights / (cost.GPU_PRODUCT_SHARE * 800e12))
    many, _ = work._replace(rows=cost.GPU_TILE_ROWS + 1).gpu_seconds(gpu)
    assert many > packed + decode
    assert work._replace(precision="fp32").gpu_seconds(gpu)[1] > dense
    # Wider activations have a dense product of float32, which explain_speed measures.
    wider = work._replace(dtype=torch.float32).gpu_seconds(gpu)
    assert wider == (packed, pytest.approx(GPU_CALL + 4 * (weights + 32768) / GPU_BYTES))
    assert work._replace(dtype=torch.float16).gpu_seconds(gpu)[1] == wider[1]
    # Where there is next to nothing to compute, the bytes count.
    wide = work._replace(channels=1, columns=1, activations=10**9)
    assert wide.gpu_seconds(gpu)[0] == pytest.approx(3e-5 + (weights // 5 + 2 * 10**9) / GPU_BYTES)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_gpu_runs_large_layers_packed_for_few_rows(gpu: torch.device, precision: str) -> None:
    layer = ("packed_linear", gpu, (16384, 16384), 3, precision, 16384 * 16384 // 5)
    first, last = packed_rows(*layer, torch.bfloat16)
    assert first == 0
    assert last == math.inf if precision == "int8" else 1 <= last < 1024
    # Wider activations have no dense product but one of float32.
    assert packed_rows(*layer, torch.float32) == (ALWAYS if precision == "bf16" else (first, last))
    assert packed_rows("packed_linear", gpu, (64, 64), 3, "fp32", 64 * 64 // 5) == NEVER  # a call costs more


def test_expected_seconds_of_the_cpu_kernels(kernel: dict[str, Rates]) -> None:
    assert WORK.expected_seconds(CPU, "cpu") == pytest.approx((1e-6 + 2e6 * 1e-12, 1e-6 + 2e6 * 1e-11))


def rows_of(channels: int, columns: int) -> RowRange:
    return packed_rows("packed_linear", CPU, (channels, columns), 3, "fp32", channels * columns // 5)


def test_the_reference_is_never_chosen_for_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    assert rows_of(4096, 4096) == NEVER
    layer = pack(bqnn.BayesLinear(64, 32))
    assert layer.execution_for(torch.zeros(1, 64)) == "dense"
    layer.execution = "packed"
    assert layer.execution_for(torch.zeros(1, 64)) == "packed"


def test_a_kernel_is_chosen_where_it_is_faster(kernel: dict[str, Rates]) -> None:
    first, last = rows_of(1000, 2000)
    assert first == 0
    assert 1 < last < 100

    def wins(rows: int) -> bool:
        packed, dense = WORK._replace(rows=rows).expected_seconds(CPU, "cpu")
        return packed <= cost.CLEARLY_FASTER * dense

    assert wins(int(last))
    assert not wins(2 * int(last))
    layer = pack(bqnn.BayesLinear(2000, 1000))
    for rows, execution in ((0, "packed"), (1, "packed"), (int(last), "packed"), (int(last) + 1, "dense")):
        assert layer.execution_for(torch.zeros(rows, 2000)) == execution


def test_a_kernel_that_needs_many_rows_gets_them(kernel: dict[str, Rates]) -> None:
    kernel["packed"], kernel["dense"] = kernel["dense"], kernel["packed"]
    first, last = rows_of(1000, 2000)
    assert 1 < first < 100
    assert last == math.inf
    layer = pack(bqnn.BayesLinear(2000, 1000))
    assert layer.execution_for(torch.zeros(int(first) - 1, 2000)) == "dense"
    assert layer.execution_for(torch.zeros(int(first), 2000)) == "packed"


def test_equal_times_are_no_reason_to_run_packed(kernel: dict[str, Rates]) -> None:
    kernel["packed"] = kernel["dense"]
    assert rows_of(1000, 2000) == NEVER
    kernel["packed"] = Rates(1e-7, (1, 100), (1e-13, 1e-13))
    assert rows_of(1000, 2000) == ALWAYS


def test_a_forced_backend_that_can_not_run_says_so_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pack(bqnn.BayesLinear(5, 3))
    monkeypatch.setenv("BQNN_BACKEND", "triton")
    layer.execution = "auto"
    with pytest.raises(bqnn.BackendError, match="'triton' can not run bqnn::packed_linear"):
        layer(torch.zeros(1, 5))


def test_explain_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
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


@pytest.mark.skipif(not dispatch.status("packed_linear", "cpu", "cpu").usable, reason="no CPU kernels here")
def test_explain_speed_of_the_cpu_kernels() -> None:
    net = pack(bqnn.convert(lenet5()), "int8", "packed")
    for layer in explain_speed(net, torch.zeros(2, 1, 28, 28)):
        assert (layer.backend, layer.execution) == ("cpu", "packed")
        assert layer.layout.startswith("3 levels, 2 bits, ")
        assert layer.layout.endswith(" int8")
        assert min(layer.expected_packed, layer.expected_dense, layer.measured_packed, layer.measured_dense) > 0


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


def test_explain_speed_expects_what_the_activations_take(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = LayerWork.expected_seconds

    def note(self: LayerWork, device: torch.device, backend: str) -> tuple[float, float]:
        seen.append(self.dtype)
        return real(self, device, backend)

    monkeypatch.setattr(LayerWork, "expected_seconds", note)
    layer = pack(bqnn.BayesLinear(4, 4), execution="packed")
    for dtype in (torch.float32, torch.bfloat16):
        explain_speed(layer, torch.zeros(3, 4, dtype=dtype))
    assert seen == [torch.float32, torch.bfloat16]
