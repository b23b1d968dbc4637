"""The model that chooses between packed and dense, and the table that checks it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import bqnn
from bqnn.engine.pack import pack
from bqnn.models import lenet5
from bqnn.ops import dispatch
from bqnn.packed import cost, probes
from bqnn.packed.cost import ALWAYS, NEVER, LayerWork, Rates, Roofline, RowRange, Winning, winning_rows
from bqnn.packed.layers import PackedLinear
from bqnn.packed.probes import packed_rows
from bqnn.reports.explain import explain_speed

MACHINE = Roofline(bytes_per_second=1e10, operations_per_second=1e11, call_seconds=1e-6)
CPU = torch.device("cpu")
WORK = LayerWork(
    "packed_linear", 3, "fp32", channels=1000, columns=2000, rows=1, activations=3000, packed_bytes=400_012
)


# Rates of a cpu backend whose packed kernels are faster from 1 to 300 rows.
PACKED, DENSE = Rates(1e-6, (1, 100), (1e-12, 5e-11)), Rates(1e-6, (1, 100), (1e-11, 2e-11))

# An H200's data sheet, and what a call takes from Python, about.
GPU_BYTES, GPU_CALL, GPU_PACKED_CALL = 4.8e12, 2e-5, 3e-5
FLOAT32, BFLOAT16 = (Roofline(GPU_BYTES, operations, GPU_CALL) for operations in (60e12, 800e12))


def gpu_seconds(work: LayerWork) -> tuple[float, float]:
    return work.gpu_seconds(FLOAT32, BFLOAT16, GPU_PACKED_CALL)


def test_roofline_is_the_longer_of_two() -> None:
    assert MACHINE.seconds(1e10, 1) == pytest.approx(1.0 + 1e-6)
    assert MACHINE.seconds(1, 1e11) == pytest.approx(1.0 + 1e-6)


def test_expected_seconds_by_the_roofline() -> None:
    assert WORK.dense_seconds(MACHINE) == pytest.approx(1e-6 + 4 * 2_003_000 / 1e10)
    assert WORK.packed_seconds(MACHINE, "triton") == pytest.approx(1e-6 + (400_012 + 12_000) / 1e10)
    many = WORK._replace(rows=1000, activations=3_000_000)
    assert many.dense_seconds(MACHINE) == pytest.approx(1e-6 + 2 * 1000 * 2_000_000 / 1e11)
    for case in (WORK, many):
        assert case.packed_seconds(MACHINE, "reference") > case.dense_seconds(MACHINE)


def test_a_gpu_decodes_once_for_each_tile_of_rows() -> None:
    weights = 16384 * 16384
    sizes = {"rows": 1, "activations": 32768, "packed_bytes": weights // 5, "dtype": torch.bfloat16}
    work = LayerWork("packed_linear", 3, "bf16", 16384, 16384, **sizes)
    packed, dense = gpu_seconds(work)
    assert dense == pytest.approx(GPU_CALL + 2 * (weights + 32768) / GPU_BYTES)
    decode = cost.DECODE_INSTRUCTIONS[2] * weights / 30e12
    assert packed == pytest.approx(GPU_PACKED_CALL + decode + 2 * weights / (cost.GPU_PRODUCT_SHARE * 800e12))
    many, _ = gpu_seconds(work._replace(rows=cost.GPU_TILE_ROWS + 1))
    assert many > packed + decode
    assert gpu_seconds(work._replace(precision="fp32"))[1] > dense
    # Wider activations have a dense product of float32, which explain_speed measures.
    wider = gpu_seconds(work._replace(dtype=torch.float32))
    assert wider == (packed, pytest.approx(GPU_CALL + 4 * (weights + 32768) / GPU_BYTES))
    assert gpu_seconds(work._replace(dtype=torch.float16))[1] == wider[1]
    # Where there is next to nothing to compute, the bytes count.
    wide = work._replace(channels=1, columns=1, activations=10**9)
    assert gpu_seconds(wide)[0] == pytest.approx(GPU_PACKED_CALL + (weights // 5 + 2 * 10**9) / GPU_BYTES)


def gpu_rows(side: int, precision: str) -> Winning:
    """For how many rows a square layer runs packed on that GPU, activations of bfloat16."""

    def seconds(rows: int) -> tuple[float, float]:
        sizes = (side, side, rows, 2 * rows * side, side * side // 5)
        return gpu_seconds(LayerWork("packed_linear", 3, precision, *sizes, torch.bfloat16))

    return winning_rows(seconds)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_gpu_runs_large_layers_packed_for_few_rows(precision: str) -> None:
    ((first, last),) = gpu_rows(16384, precision)
    assert first == 0
    assert last == math.inf if precision == "int8" else 1 <= last < 1024
    assert gpu_rows(64, "fp32") == NEVER  # a call costs more


def test_wider_activations_of_bf16_have_no_dense_product_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "available", lambda op, device: "triton")
    layer = ("packed_linear", torch.device("cuda"), (16384, 16384), 3, "bf16", 16384 * 16384 // 5)
    assert packed_rows(*layer, torch.float32) == ALWAYS


def test_expected_seconds_of_the_cpu_kernels() -> None:
    assert WORK.cpu_seconds(PACKED, DENSE) == pytest.approx((1e-6 + 2e6 * 1e-12, 1e-6 + 2e6 * 1e-11))


def cpu_rows(packed: Rates, dense: Rates) -> Winning:
    return winning_rows(lambda rows: WORK._replace(rows=rows).cpu_seconds(packed, dense))


def layer_with(winning: Winning) -> PackedLinear:
    """A layer that runs packed for these rows."""
    layer = pack(bqnn.BayesLinear(20, 10))
    layer._prepare().ranges[torch.float32] = winning
    return layer


def test_the_reference_is_never_chosen_for_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    assert packed_rows("packed_linear", CPU, (4096, 4096), 3, "fp32", 4096 * 4096 // 5) == NEVER
    layer = pack(bqnn.BayesLinear(64, 32))
    assert layer.execution_for(torch.zeros(1, 64)) == "dense"
    layer.execution = "packed"
    assert layer.execution_for(torch.zeros(1, 64)) == "packed"


def test_a_kernel_is_chosen_where_it_is_faster() -> None:
    ((first, last),) = cpu_rows(PACKED, DENSE)
    assert first == 0
    assert 1 < last < 100

    def wins(rows: int) -> bool:
        packed, dense = WORK._replace(rows=rows).cpu_seconds(PACKED, DENSE)
        return packed <= cost.CLEARLY_FASTER * dense

    assert wins(int(last))
    assert not wins(2 * int(last))
    layer = layer_with((RowRange(first, last),))
    for rows, execution in ((0, "packed"), (1, "packed"), (int(last), "packed"), (int(last) + 1, "dense")):
        assert layer.execution_for(torch.zeros(rows, 20)) == execution


def test_a_kernel_that_needs_many_rows_gets_them() -> None:
    ((first, last),) = cpu_rows(DENSE, PACKED)
    assert 1 < first < 100
    assert last == math.inf
    layer = layer_with((RowRange(first, last),))
    assert layer.execution_for(torch.zeros(int(first) - 1, 20)) == "dense"
    assert layer.execution_for(torch.zeros(int(first), 20)) == "packed"


def test_one_wrong_time_changes_nothing_for_other_numbers_of_rows() -> None:
    """A probe of 64 rows that met a busy machine made layers of 16 rows dense: the longest range was that above 256."""
    rows = (1, 4, 16, 64, 256)
    dense, packed = (Rates(1e-6, rows, tuple(scale * count * 1e-12 for count in rows)) for scale in (1.2, 1.0))
    assert cpu_rows(packed, dense) == ALWAYS
    disturbed = packed._replace(weight_seconds=(*packed.weight_seconds[:3], 3e-10, packed.weight_seconds[4]))
    assert cpu_rows(disturbed, dense) == (RowRange(0, 16), RowRange(256, math.inf))
    layer = layer_with(cpu_rows(disturbed, dense))
    for count, execution in ((1, "packed"), (16, "packed"), (64, "dense"), (256, "packed")):
        assert layer.execution_for(torch.zeros(count, 20)) == execution


def test_equal_times_are_no_reason_to_run_packed() -> None:
    assert cpu_rows(DENSE, DENSE) == NEVER
    assert cpu_rows(Rates(1e-7, (1, 100), (1e-13, 1e-13)), DENSE) == ALWAYS
    assert layer_with(NEVER).execution_for(torch.zeros(0, 20)) == "dense"
    assert layer_with(ALWAYS).execution_for(torch.zeros(0, 20)) == "packed"


def test_nothing_is_timed_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("something is timed")

    monkeypatch.setattr(probes, "least_seconds", refuse)
    monkeypatch.setattr(probes, "_roofline", refuse)
    probes._rates.cache_clear()
    monkeypatch.setenv("BQNN_CACHE", "")
    layer, x = pack(bqnn.BayesLinear(20, 10)), torch.zeros(2, 20)
    twin = copy.deepcopy(layer).to("cpu")
    twin.load_state_dict(layer.state_dict())
    twin.execution = "auto"
    torch.export.export(twin, (x,))
    torch.testing.assert_close(torch.compile(twin, backend="eager", fullgraph=True)(x), layer.bias.expand(2, -1))
    if dispatch.status("packed_linear", "cpu", "cpu").usable:
        with pytest.raises(AssertionError, match="something is timed"):
            layer(x)


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
    assert [layer.backend for layer in report] == ["dense", "dense", "dense", "reference", "dense"]
    for layer in report:
        assert 0 < layer.expected_dense < layer.expected_packed < 1
        assert min(layer.measured_packed, layer.measured_dense) > 0
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report)
    assert [line.split()[0] for line in lines[2:]] == [layer.name for layer in report]
    assert ["3 levels, 5/byte" in line for line in lines[2:]] == [False, False, False, True, False]
    assert ["decoded, fp32" in line for line in lines[2:]] == [True, True, True, False, True]
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.skipif(not dispatch.status("packed_linear", "cpu", "cpu").usable, reason="no CPU kernels here")
def test_explain_speed_of_the_cpu_kernels() -> None:
    net = pack(bqnn.convert(lenet5()), "int8", "packed")
    for layer in explain_speed(net, torch.zeros(2, 1, 28, 28)):
        assert (layer.backend, layer.execution) == ("cpu", "packed")
        assert layer.layout.startswith("3 levels, 2 bits, ")
        assert " int8 " in layer.layout or " int16 " in layer.layout  # AVX2 multiplies bytes as integers of 16 bits
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("execution", ["packed", "dense", "auto"])
def test_what_is_printed_is_what_ran(execution: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("cpu", "dense", "reference"):
        before = dispatch.backend("packed_linear", name)

        def run(call: Any, before: dispatch.Backend = before) -> Any:
            ran.append(before.name)
            return before.run(call)

        monkeypatch.setitem(dispatch._backends["packed_linear"], name, before._replace(run=run, bind=None))
    dispatch._candidates.cache_clear()
    layer, x = pack(bqnn.BayesLinear(4, 4), execution=execution), torch.zeros(3, 4, dtype=dtype)
    layer._prepare().ranges[dtype] = ALWAYS  # without its bind, the stand-in could not be timed
    (row,) = explain_speed(layer, x)
    ran.clear()
    layer(x)
    monkeypatch.undo()
    dispatch._candidates.cache_clear()
    assert ran == [row.backend]
