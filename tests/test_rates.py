"""Measured rates: interpolation between numbers of rows, the probe of the nearest size, one measurement a process."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bqnn.ops import dispatch
from bqnn.packed import probes
from bqnn.packed.base import PackedLayer
from bqnn.packed.layers import PackedLinear
from bqnn.packed.probes import Rates, cpu_rates

RATES = Rates(call_seconds=5.0, rows=(2, 4, 8), weight_seconds=(1.0, 2.0, 6.0))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (5, 3.0), (8, 6.0), (16, 12.0)],
)
def test_seconds_between_and_beyond_the_measured_rows(rows: int, expected: float) -> None:
    assert RATES.seconds(10, rows) == 5.0 + 10 * expected


def test_what_else_runs_during_a_measurement_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [9.0, 9.0, 8.0, 8.0, 8.0, 1.0, 8.0, 8.0, 8.0]  # of two calls that warm up and seven that count
    clock = iter([moment for i, taken in enumerate(seconds) for moment in (100.0 * i, 100.0 * i + taken)])
    monkeypatch.setattr(probes, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    layer = PackedLinear(1, torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([[-1.0, 1.0]]), None, "fp32", "packed")
    assert probes._time(layer, torch.zeros(1, 1)) == 1.0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[PackedLayer, Tensor]]]:
    """What is timed; every call takes a microsecond for each row and weight, and another one."""
    calls = []

    def time(layer: PackedLayer, x: Tensor, repeats: int = 7) -> float:
        calls.append((layer, x))
        weights = layer.shape[0] * layer.shape[1]
        return 1e-6 * (1 + (weights * layer.rows(x) if weights > 1 else 0))

    def forget() -> None:
        probes._measure.cache_clear()
        probes._measure_call.cache_clear()

    monkeypatch.setattr(probes, "_time", time)
    forget()
    yield calls
    forget()


@pytest.mark.parametrize(
    ("op", "weights", "channels"),
    [
        ("packed_linear", 10, 64),
        ("packed_linear", 120 * 84, 64),
        ("packed_linear", 400 * 120, 256),
        ("packed_linear", 4096 * 4096, 2048),
        ("packed_conv2d", 25, 8),
        ("packed_conv2d", 100 * 100 * 9, 128),
    ],
)
def test_the_probe_of_the_nearest_size_is_measured_once(
    op: str, weights: int, channels: int, timed: list[tuple[PackedLayer, Tensor]]
) -> None:
    found = cpu_rates(op, 3, "int8", weights, "packed")
    assert found.call_seconds == pytest.approx(1e-6)
    layers = {layer.shape[0] for layer, _ in timed}
    assert layers == {1, channels}
    for layer, _ in timed:
        assert (layer.op, layer.num_levels, layer.precision, layer.execution) == (op, 3, "int8", "packed")
    count = len(timed)
    assert cpu_rates(op, 3, "int8", weights, "packed") == found
    assert len(timed) == count
    cpu_rates(op, 3, "int8", weights, "dense")
    assert len(timed) == 2 * count


def test_rates_are_for_each_weight(timed: list[tuple[PackedLayer, Tensor]]) -> None:
    found = cpu_rates("packed_linear", 2, "fp32", 64 * 64, "packed")
    assert found.rows == probes.LINEAR_ROWS
    assert found.weight_seconds == pytest.approx([1e-6 * rows for rows in found.rows])


def test_probes_leave_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        found = cpu_rates("packed_linear", 2, "fp32", 64 * 64, "dense")
    assert found.call_seconds > 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not dispatch.status("packed_linear", "cpu", "cpu").usable, reason="no CPU kernels here")
@pytest.mark.parametrize("op", ["packed_linear", "packed_conv2d"])
def test_kernels_are_measured(op: str) -> None:
    found = cpu_rates(op, 3, "fp32", 600, "packed")
    assert found.call_seconds > 0
    assert len(found.weight_seconds) == len(found.rows) > 1
    assert all(seconds >= 0 for seconds in found.weight_seconds)
