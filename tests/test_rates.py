"""Measured rates: interpolation between numbers of rows, the probe of the nearest size, one measurement a machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bqnn.ops import dispatch
from bqnn.ops.packed_product import PackedCall
from bqnn.packed import probes, rates
from bqnn.packed.cost import Rates
from bqnn.packed.probes import LEAST_ROUNDS, MOST_ROUNDS, cpu_rates, least_seconds

RATES = Rates(call_seconds=5.0, rows=(2, 4, 8), weight_seconds=(1.0, 2.0, 6.0))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (5, 3.0), (8, 6.0), (16, 12.0)],
)
def test_seconds_between_and_beyond_the_measured_rows(rows: int, expected: float) -> None:
    assert RATES.seconds(10, rows) == 5.0 + 10 * expected


class Clock:
    """Two calls and the time that they take: the first is disturbed in its first rounds, by less each time."""

    def __init__(self, disturbed: int) -> None:
        self.now, self.rounds, self.disturbed = 0.0, 0, disturbed

    def first(self) -> float:
        self.rounds += 1
        return 100.0 / self.rounds if self.rounds <= self.disturbed else 1.0

    def second(self) -> float:
        return 5.0


@pytest.mark.parametrize("disturbed", [0, 1, 4, 8])
def test_what_else_runs_during_a_measurement_is_not_in_it(disturbed: int) -> None:
    clock = Clock(disturbed)
    assert least_seconds([clock.first, clock.second], lambda call: [call()]) == ([1.0, 5.0], True)
    assert clock.rounds == max(LEAST_ROUNDS, disturbed + 2)


def test_a_measurement_ends_where_nothing_agrees() -> None:
    times = [2.0**-index for index in range(10 * MOST_ROUNDS)]
    assert least_seconds([lambda: times.pop(0)], lambda call: [call()]) == ([2.0 ** (1 - MOST_ROUNDS)], False)


class Stopwatch:
    """Stands in for the machine: a packed call takes a microsecond for each row and weight, a dense one two, and any
    call another microsecond."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, PackedCall]] = []
        self.is_settled = True

    def bound(self, op: str, probe: PackedCall, execution: str) -> tuple[str, PackedCall]:
        return execution, probe

    def seconds(self, calls: list[tuple[str, PackedCall]]) -> tuple[list[float], bool]:
        self.calls += calls
        return [1e-6 * (1 + self._work(*call)) for call in calls], self.is_settled

    def _work(self, execution: str, probe: PackedCall) -> int:
        channels = len(probe.codes)
        if channels == 1:
            return 0
        return (2 if execution == "dense" else 1) * channels * probe.columns * probe.geometry.rows(probe.x)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stopwatch]:
    watch = Stopwatch()
    monkeypatch.setattr(probes, "_bound", watch.bound)
    monkeypatch.setattr(probes, "least_seconds", watch.seconds)
    monkeypatch.setenv("BQNN_CACHE", str(tmp_path / "cache"))
    probes._rates.cache_clear()
    yield watch
    probes._rates.cache_clear()


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
    op: str, weights: int, channels: int, stopwatch: Stopwatch
) -> None:
    found = cpu_rates(op, 3, "int8", weights)
    assert found.packed.call_seconds == found.dense.call_seconds == pytest.approx(1e-6)
    assert {len(probe.codes) for _, probe in stopwatch.calls} == {1, channels}
    for _, probe in stopwatch.calls:
        assert (probe.levels.shape[1], probe.precision) == (3, "int8")
    count = len(stopwatch.calls)
    assert cpu_rates(op, 3, "int8", weights) == found
    assert len(stopwatch.calls) == count
    probes._rates.cache_clear()  # as another process
    assert cpu_rates(op, 3, "int8", weights) == found
    assert len(stopwatch.calls) == count
    cpu_rates(op, 4, "int8", weights)
    assert len(stopwatch.calls) == 2 * count


def test_rates_are_for_each_weight(stopwatch: Stopwatch) -> None:
    found = cpu_rates("packed_linear", 2, "fp32", 64 * 64)
    assert found.packed.rows == found.dense.rows == probes.LINEAR_ROWS
    assert found.packed.weight_seconds == pytest.approx([1e-6 * rows for rows in probes.LINEAR_ROWS])
    assert found.dense.weight_seconds == pytest.approx([2e-6 * rows for rows in probes.LINEAR_ROWS])


def test_both_ways_to_run_are_measured_in_turns(stopwatch: Stopwatch) -> None:
    """One after the other, a machine that is busy for a second would slow down one of them alone."""
    cpu_rates("packed_linear", 2, "fp32", 64 * 64)
    ways = [execution for execution, _ in stopwatch.calls]
    assert ways == ["packed", "dense"] * (len(ways) // 2)
    rows = [len(probe.x) for _, probe in stopwatch.calls]
    assert rows[::2] == rows[1::2] == [1, *probes.LINEAR_ROWS]


def test_a_disturbed_measurement_is_not_kept_for_other_processes(stopwatch: Stopwatch) -> None:
    stopwatch.is_settled = False
    found = cpu_rates("packed_linear", 2, "fp32", 64 * 64)
    count = len(stopwatch.calls)
    assert cpu_rates("packed_linear", 2, "fp32", 64 * 64) == found
    assert len(stopwatch.calls) == count, "this process has them"
    probes._rates.cache_clear()  # as another process
    stopwatch.is_settled = True
    cpu_rates("packed_linear", 2, "fp32", 64 * 64)
    assert len(stopwatch.calls) == 2 * count
    probes._rates.cache_clear()
    cpu_rates("packed_linear", 2, "fp32", 64 * 64)
    assert len(stopwatch.calls) == 2 * count


def test_the_file_is_kept_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BQNN_CACHE", str(tmp_path / "a" / "b"))
    assert rates.known("some") is None
    rates.remember({"some": RATES})
    rates.remember({"other": RATES._replace(call_seconds=6.0)})
    assert rates.known("some") == RATES
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert file == rates.cache_file()
    assert file.name.startswith("rates-")
    file.unlink()
    assert rates.known("some") is None
    monkeypatch.setenv("BQNN_CACHE", "")
    assert rates.cache_file() is None
    rates.remember({"some": RATES})
    assert rates.known("some") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"versions": {}, "rates": {}}',
        '{"versions": %s, "rates": {"some": {"call_seconds": 1, "rows": [2, 1], "weight_seconds": [1, 1]}}}',
        '{"versions": %s, "rates": {"some": {"call_seconds": 1, "rows": [1], "weight_seconds": []}}}',
        '{"versions": %s, "rates": {"some": {"call_seconds": -1, "rows": [1], "weight_seconds": [1]}}}',
        '{"versions": %s, "rates": {"some": {"call_seconds": NaN, "rows": [1], "weight_seconds": [1]}}}',
        '{"versions": %s, "rates": {"some": 5}}',
        '{"versions": %s, "rates": 5}',
        "[" * 100_000,
        "\0",
    ],
    ids=range(12),
)
def test_a_damaged_file_costs_a_measurement_and_nothing_else(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BQNN_CACHE", str(tmp_path))
    file = rates.cache_file()
    assert file is not None
    file.write_text(text.replace("%s", json.dumps(rates._versions())))
    assert rates.known("some") is None
    rates.remember({"some": RATES})
    assert rates.known("some") == RATES


def test_a_folder_that_can_not_be_written_costs_a_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BQNN_CACHE", str(tmp_path / "file"))
    rates.remember({"some": RATES})
    assert rates.known("some") is None


def test_probes_leave_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        found = cpu_rates("packed_linear", 2, "fp32", 64 * 64)
    assert found.dense.call_seconds > 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not dispatch.status("packed_linear", "cpu", "cpu").usable, reason="no CPU kernels here")
@pytest.mark.parametrize("op", ["packed_linear", "packed_conv2d"])
def test_kernels_are_measured(op: str) -> None:
    for found in cpu_rates(op, 3, "fp32", 600):
        assert found.call_seconds > 0
        assert len(found.weight_seconds) == len(found.rows) > 1
        assert all(seconds >= 0 for seconds in found.weight_seconds)
