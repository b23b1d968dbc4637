"""What the benches rest on: only right results are timed, times arrive as measured, and verdicts follow from them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import (
    bench_packed_conv2d,
    bench_packed_linear,
    gpu,
    gpu_packed,
    gpu_timing,
    gpu_training,
    interleaved,
    summary,
)
from bench.interleaved import LEAST_ROUNDS, Race, Replay
from bench.save import save
from bench.summary import Claim, Measured
from tests.shapes import Conv2dShape, LinearShape


class Sleepers:
    """Variants that sleep so many milliseconds; one that gives a wrong result, and one that is not installed."""

    name, budget = "sleepers, batch 1", 0.0

    def call(self, variant: str) -> Callable[[], object]:
        if variant == "absent":
            pytest.skip("not installed")
        return lambda: time.sleep(1e-3 * int(variant)) if variant.isdigit() else variant

    def check(self, variant: str, output: Any) -> dict[str, Any]:
        assert output is None, f"wrong: {output}"
        return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAUSE_SECONDS", "SETTLE_SECONDS", "BURST_SECONDS"):
        monkeypatch.setattr(interleaved, name, 0.0)


def test_only_right_results_are_timed(quick: None) -> None:
    race = Race(Sleepers(), ["1", "4", "nonsense", "absent"], timed=True)
    assert set(race.seconds) == {"1", "4"}
    assert isinstance(race.failures["nonsense"], AssertionError)
    assert isinstance(race.failures["absent"], pytest.skip.Exception)
    assert all(len(times) == LEAST_ROUNDS for times in race.seconds.values())
    assert min(race.seconds["1"]) >= 1e-3 and min(race.seconds["4"]) >= 4e-3


def test_without_timing_results_are_checked() -> None:
    race = Race(Sleepers(), ["1", "nonsense"], timed=False)
    assert race.seconds == {} and set(race.failures) == {"nonsense"}


def test_replay_gives_back_what_was_measured() -> None:
    replay, found = Replay(), []
    replay.load([3.0, 1.0, 2.0])
    for _ in range(3):
        start = replay()
        found.append(replay() - start)
    assert found == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("module", [bench_packed_linear, bench_packed_conv2d], ids=lambda module: module.__name__)
def test_every_group_has_its_claims(module: Any) -> None:
    """Everything of ours takes half the time of every rival, so that every ratio is 2."""
    medians: dict[str, dict[str, float]] = {}
    for case in module.CASES:
        shape, batch, variant = case.values
        rival = variant.startswith(("torch", "aten", "ORT"))
        medians.setdefault(module.group_name(shape, batch), {})[variant] = 2.0 if rival else 1.0
    claims = list(module.claims(medians))
    assert {claim.measured for claim in claims} == {2.0}
    assert {claim.text.split(":")[0] for claim in claims} == set(medians)
    assert not list(module.claims({name: {} for name in medians}))


def test_summary_says_what_is_met() -> None:
    lines: list[str] = []
    reporter = SimpleNamespace(write_line=lambda line, **_: lines.append(line), write_sep=lambda _, t: lines.append(t))
    bench = SimpleNamespace(
        __name__="bench_it",
        BASELINES=("slow", "slower"),
        claims=lambda medians: [Claim("met", 2.0, medians["it, batch 1"]["slow"]), Claim("missed", 2.1, 2.0)],
    )
    rows = [Measured("it, batch 1", name, seconds, {}) for name, seconds in (("slow", 2), ("slower", 3), ("fast", 0.5))]
    summary.write_summary(reporter, bench, rows)  # type: ignore[arg-type]
    text = "\n".join(lines)
    assert "bench_it: 1 of 2 figures met" in text and "500   (4.00)" in text
    assert [line.split()[-1] for line in lines if "asked" in line] == ["met", "MET"]
    assert "NOT MET" in next(line for line in lines if line.startswith("missed"))


def test_saved_by_op_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.save.RESULTS", tmp_path)
    machine = {"cpu": "Intel(R) Xeon(R) Processor", "cpu_family_model_stepping": ["6", "207", "2"], "cpu_isa": "amx"}
    measured = {"fullname": "bench/bench_it.py::test_it[fast]", "options": {}, "stats": {"median": 1.0, "data": [1.0]}}
    run = {"machine_info": {**machine, "node": "x"}, "datetime": "", "version": "", "benchmarks": [measured]}
    (path,) = save(run)
    assert path.name == "it_xeon-6-207-amx.json"
    assert json.loads(path.read_text()) == {
        "machine_info": machine,
        "datetime": "",
        "version": "",
        "benchmarks": [{"fullname": "bench/bench_it.py::test_it[fast]", "stats": {"median": 1.0}}],
    }


def test_gpu_benches_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, tiny: every bench makes its rows, and every figure that is asked has its line."""
    layers = {"linear-tiny": LinearShape(8, 16, 32), "conv2d-tiny": Conv2dShape(2, 8, 4, 8, 8, (3, 3), padding=(1, 1))}
    monkeypatch.setattr(gpu_training, "LAYERS", layers)
    monkeypatch.setattr(gpu_training, "NETWORKS", {"lenet5": (2, 1, 28, 28)})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(gpu, "KL_WEIGHTS", 4096)
    monkeypatch.setattr(gpu_packed, "SIZES", (64,))
    monkeypatch.setattr(gpu_packed, "BATCHES", (4,))
    monkeypatch.setattr(gpu_packed, "FASTER", {64: (1.0,)})
    monkeypatch.setattr(gpu_packed, "CONV", (8, 8, 3, 8, 2))
    monkeypatch.setattr(gpu_timing, "ROUNDS", 1)
    rows = [row for bench in gpu.benches(torch.device("cpu"), "cpu") for row in bench()]
    assert all(row.seconds > 0.0 for row in rows)
    lines = list(gpu.verdicts(rows, "cpu"))
    asked = [want for figures in gpu_training.ASKED.values() for want in figures]
    assert len(lines) == len(asked) + sum(want.smaller is not None for want in asked) + len({"linear", "conv2d"})
    assert all("asked" in line for line in lines), lines
