"""What the benches rest on: only right results are timed, times arrive as measured, and verdicts follow from them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench import bench_packed_conv2d, bench_packed_linear, summary
from bench.interleaved import LEAST_ROUNDS, Pace, Race
from bench.machine import RESULTS
from bench.summary import Measured, Verdict


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


def test_only_right_results_are_timed() -> None:
    race = Race(Sleepers(), ["1", "4", "nonsense", "absent"], timed=True, pace=Pace(0.0, 0.0, 0.0))
    assert set(race.seconds) == {"1", "4"}
    assert isinstance(race.failures["nonsense"], AssertionError)
    assert isinstance(race.failures["absent"], pytest.skip.Exception)
    assert all(len(times) == LEAST_ROUNDS for times in race.seconds.values())
    assert min(race.seconds["1"]) >= 1e-3 and min(race.seconds["4"]) >= 4e-3


def test_without_timing_results_are_checked() -> None:
    race = Race(Sleepers(), ["1", "nonsense"], timed=False)
    assert race.seconds == {} and set(race.failures) == {"nonsense"}


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
        claims=lambda medians: [Verdict("met", 2.0, medians["it, batch 1"]["slow"]), Verdict("missed", 2.1, 2.0)],
    )
    rows = [Measured("it, batch 1", name, seconds, {}) for name, seconds in (("slow", 2), ("slower", 3), ("fast", 0.5))]
    summary.write_summary(reporter, bench, rows)  # type: ignore[arg-type]
    text = "\n".join(lines)
    assert "bench_it: 1 of 2 figures met" in text and "500   (4.00)" in text
    assert [line.split()[-1] for line in lines if "asked" in line] == ["met", "MET"]
    assert "NOT MET" in next(line for line in lines if line.startswith("missed"))


def test_the_benches_run_and_save_nothing_unless_told_to() -> None:
    before = sorted(RESULTS.iterdir())
    selected = ["-k", "assign_codes or N10-K84-B1- or 6-16-k5-14x14-B1-"]
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", *selected]
    run = subprocess.run(command, cwd=RESULTS.parent.parent, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stdout
    assert re.search(r"^29 passed", run.stdout, re.MULTILINE), run.stdout
    assert sorted(RESULTS.iterdir()) == before
