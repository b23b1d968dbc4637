"""What the benches rest on: only right results are timed, times arrive as measured, and verdicts follow from them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    gpu_rivals,
    gpu_training,
    summary,
)
from bench.interleaved import LEAST_ROUNDS, Pace, Race
from bench.machine import RESULTS
from bench.summary import Measured, Verdict
from bqnn.ops import dispatch
from tests.support.shapes import Conv2dShape, LinearShape


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


@pytest.fixture
def bfloat16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend "cpu" takes what a GPU's do: the reference stands in for its training kernels,
    which take float32 alone."""
    for op, backends in dispatch._backends.items():
        if not op.startswith("packed"):
            monkeypatch.setitem(backends, "cpu", backends["reference"]._replace(name="cpu"))
    dispatch._candidates.cache_clear()
    yield
    monkeypatch.undo()
    dispatch._candidates.cache_clear()


def test_gpu_benches_run(monkeypatch: pytest.MonkeyPatch, bfloat16_on_the_cpu: None) -> None:
    """On the CPU, tiny: every bench makes its rows, and every figure that is asked has its line."""
    layers: dict[str, Any] = {f"linear-4096-4096-B{rows}": LinearShape(8, 16, 32) for rows in (256, 2048)}
    layers["conv2d-tiny"] = Conv2dShape(2, 8, 4, 8, 8, (3, 3), padding=(1, 1))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    plan = gpu.Plan(layers, {"lenet5": (2, 1, 28, 28)}, 4096, {(64, 4): 1.0}, (8, 8, 3, 8, 2), rounds=1)
    rows = [row for bench in gpu.benches(torch.device("cpu"), "cpu", plan) for row in bench()]
    assert all(row.seconds > 0.0 for row in rows)
    lines = [str(verdict) for verdict in gpu.verdicts(rows, "cpu", 1e9, plan)]
    asked = [want for case in dict.fromkeys(row.case for row in rows) for want in gpu.asked_of(case)]
    assert len(asked) == 2 * 3 * 2 + 1
    of_packed = ("packed_linear-64-B4: time", "packed_conv2d: time", "packed_conv2d: bytes")
    of_memory = sum(want.smaller is not None for want in asked)
    of_divergence = len(("bandwidth", "memory"))
    assert len(lines) == len(asked) + of_memory + of_divergence + len(of_packed)
    assert all("asked" in line for line in lines), lines
    assert all(any(line.startswith(text) for line in lines) for text in of_packed)


def test_make_gpu_runs_every_file_that_uses_a_gpu() -> None:
    tests = Path(__file__).parent
    uses = ("triton_devices(", "usable_backends(", "cuda_missing()")
    found = {f"tests/{path.name}" for path in tests.glob("test_*.py") if any(use in path.read_text() for use in uses)}
    assert found - {"tests/test_bench.py"} == set(gpu.TESTS)


def training_rows(seconds: float, peak_bytes: int) -> list[gpu_training.Row]:
    """Every row that a figure of training ops is asked of; compared with 1200 bytes and a second."""
    cases = [f"{kind}_{name}" for kind in gpu_training.KINDS for name in gpu_training.LAYERS]
    return [
        row
        for case in (*cases, f"spike_slab_kl-{gpu.PLAN.kl_weights >> 20}M")
        for row in (
            gpu_training.Row(case, "triton", seconds, peak_bytes, 0.0),
            gpu_training.Row(case, "reference", 1.0, 1200),
            gpu_training.Row(case, "compiled", 0.5, 1200),
        )
    ]


def test_every_figure_of_training_ops_has_a_verdict() -> None:
    """Two of time and one of memory for each layer; of the divergence one of time, of bandwidth and of memory."""
    verdicts = list(gpu.verdicts(training_rows(0.25, 400), "triton", bandwidth=1.0))
    assert len(verdicts) == 3 * 8 + 3
    asked = {verdict.text: verdict.asked for verdict in verdicts if isinstance(verdict, Verdict)}
    linear = {f"{kind}_linear-4096-4096-B{rows}" for kind in ("sample", "moment") for rows in (256, 2048)}
    times = {
        case: tuple(asked[f"{case}: time of {rival} over ours"] for rival in ("reference", "compiled"))
        for case in linear
    }
    assert times == {
        "sample_linear-4096-4096-B256": (3.0, 1.5),
        "sample_linear-4096-4096-B2048": (1.5, 1.1),
        "moment_linear-4096-4096-B256": (2.5, 1.3),
        "moment_linear-4096-4096-B2048": (2.5, 1.3),
    }
    memory = {text.split(":")[0]: number for text, number in asked.items() if "peak memory of reference" in text}
    assert {memory[case] for case in linear} == {3.0} and len(memory) == 8
    assert {memory[case] for case in set(memory) - linear} == {2.5}
    met = {verdict.text: str(verdict).endswith("  met") for verdict in verdicts}
    assert met["spike_slab_kl-16M: bytes of the gradients over peak memory"]
    assert met["sample_linear-4096-4096-B256: peak memory of reference over ours"]
    late = {
        str(verdict).split(":")[0]
        for verdict in verdicts
        if "time of reference" in str(verdict) and "NOT" in str(verdict)
    }
    assert late == {"spike_slab_kl-16M"}
    larger = gpu.verdicts(training_rows(0.25, 9 * gpu.PLAN.kl_weights), "triton", bandwidth=1.0)
    assert sum("memory" in str(verdict) and "NOT MET" in str(verdict) for verdict in larger) == 9


def packed_rows(seconds: float) -> list[gpu_training.Row]:
    """Every row that a figure of packed products is asked of; cuBLAS and cuDNN take a second."""
    cases = [gpu_packed.linear_case(size, batch) for size, batch in gpu_packed.FASTER]
    return [
        gpu_training.Row(case, variant, 1.0 if variant == gpu_packed.DENSE else seconds, 0, weight_bytes=n_bytes)
        for case in (*cases, "packed_conv2d")
        for variant, n_bytes in (("bf16", 1), ("int8", 1), (gpu_packed.DENSE, 8))
    ]


def test_every_figure_of_packed_products_has_a_verdict() -> None:
    """18 of linear layers and 2 of "int8", 1 of bandwidth, 2 of the convolution."""
    verdicts = list(gpu_packed.verdicts(packed_rows(0.5), bandwidth=2 * 16384 * 16384 / 4))
    assert len(verdicts) == 18 + 2 + 1 + 2
    times = [verdict for verdict in verdicts if "time of" in verdict.text]
    assert {verdict.measured for verdict in times} == {2.0}
    assert sum("over int8" in verdict.text for verdict in times) == 2
    (share,) = (verdict for verdict in verdicts if "bandwidth" in verdict.text)
    assert share.text.startswith("packed_linear-16384-B1:") and share.measured == pytest.approx(1.0)
    (size,) = (verdict for verdict in verdicts if "bytes of the weight" in verdict.text)
    assert (size.asked, size.measured) == (8.0, 8.0)
    assert str(size).endswith("  met") and "NOT MET" not in str(size)
    slower = list(gpu_packed.verdicts(packed_rows(2.0), bandwidth=1.0))
    assert all(str(verdict).endswith("NOT MET") for verdict in slower if "time of" in verdict.text)
    assert not list(gpu_packed.verdicts([], bandwidth=1.0))


def test_rivals_are_timed_where_they_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    def dense(size: int, copies: int, device: torch.device) -> tuple[list[torch.nn.Module], torch.Tensor]:
        layers = [torch.nn.Linear(size, size, bias=False).bfloat16() for _ in range(copies)]
        return layers, layers[0].weight.detach().float()

    def wrong(size: int, copies: int, device: torch.device) -> tuple[list[torch.nn.Module], torch.Tensor]:
        layers, weight = dense(size, copies, device)
        return layers, weight + 1

    known = {"right": gpu_rivals.Rival("torch", 2, dense), "wrong": gpu_rivals.Rival("torch", 2, wrong)}
    known["absent"] = gpu_rivals.Rival("no_such_package", 2, dense)
    here, absent = gpu_packed.rivals(known)
    assert (here, list(absent)) == (["right", "wrong"], ["absent"])
    assert "no_such_package can not be imported (ModuleNotFoundError" in absent["absent"]
    rows = list(gpu_packed.linear_rows(128, 4, torch.device("cpu"), known, rounds=1))
    assert {row.variant for row in rows} >= {"bf16", "int8", gpu_packed.DENSE, "right"}
    assert "wrong" not in {row.variant for row in rows}
    assert "no time for wrong, AssertionError: it is" in capsys.readouterr().out


def test_rivals_stand_for_the_weight_that_they_draw() -> None:
    for bits in (2, 4):
        q, scale, dense = gpu_rivals._draw(256, bits, torch.device("cpu"))
        assert q.unique().tolist() == list(range(2**bits))
        groups = q.view(256, -1, gpu_rivals.GROUP)
        assert (groups.amin(2) == 0).all() and (groups.amax(2) == 2**bits - 1).all()
        expected = (groups.double() - 2 ** (bits - 1)) * scale.double()
        assert torch.equal(dense.double(), expected.view(256, 256))
