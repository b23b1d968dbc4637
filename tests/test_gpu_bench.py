"""``make gpu`` without a GPU: every stage comes to its end, is gone on with, and says of each figure what it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, gpu_checks, gpu_packed, gpu_rivals, gpu_runs, gpu_stages, gpu_timing, gpu_training
from bench.gpu_record import ATTEMPTS, Record
from bench.gpu_rows import Row, Task, Unfinished
from bench.gpu_timing import Call, Cost, DryMeter, relative_distance
from bench.gpu_verdicts import stage_line, verdicts
from bench.summary import Verdict
from bqnn.ops import dispatch
from tests.support.shapes import INTERPRETED

MACHINE = {"gpu": "NVIDIA None"}
TIMES = ("seconds", "graph_seconds", "host_seconds", "peak_bytes", "error")


class Computing(DryMeter):
    """Compares what is computed, and notes what is measured."""

    def __init__(self) -> None:
        self.measured: set[str] = set()

    def costs(self, variants: Mapping[str, Sequence[Call]]) -> dict[str, Cost]:
        self.measured |= set(variants)
        return super().costs(variants)

    def distance(self, found: Iterable[Tensor], expected: Iterable[Tensor]) -> float | None:
        return max(map(relative_distance, found, expected))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
@pytest.mark.skipif(not dispatch.status("sample_linear", "triton", "cuda").usable, reason="Triton is not installed")
def test_a_dry_run_comes_to_its_end_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # it runs from any folder
    arguments = ["--dry-run", "--out", "results", "--data", "no data", "--limit", "3000"]
    assert gpu.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.split(":")[0] in gpu_stages.STAGES]
    assert [line.split(":")[0] for line in told] == list(gpu_stages.STAGES)
    assert all("failed" not in line and "WRONG" not in line for line in told), told
    path = tmp_path / "results" / f"{gpu.DRY}.json"
    written = path.read_text()
    content = json.loads(written)
    states = {entry["state"] for tasks in content["tasks"].values() for entry in tasks.values()}
    assert states == {"done"} and list(content["tasks"]) == list(gpu_stages.STAGES)
    assert {row["task"].split("/")[0] for row in content["rows"]} == set(gpu_stages.STAGES)
    assert all(row[name] is None for row in content["rows"] for name in TIMES)
    (run,) = (row for row in content["rows"] if row["case"] == "train")
    assert run["said"].startswith("1 epochs, ")

    def nothing(*_: object) -> Iterator[Row]:
        raise AssertionError("it is done")

    monkeypatch.setattr(Record, "do", nothing)
    assert gpu.main(arguments) == 0
    assert path.read_text() == written


def test_what_is_asked_for_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "smok"])
    assert "STAGE must be one of smoke, training, packed, networks, tests, runs, got smok" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no GPU here; --dry-run needs none"):
            gpu.main(["--out", str(tmp_path)])


def tasks_of(record: Record, calls: list[str]) -> list[Task]:
    """One that is right, one that raises, one that is not finished, one that its process does not live through."""

    def right() -> Iterator[Row]:
        calls.append("right")
        yield Row("case", "first", 1.0)
        assert record.rows_of("smoke")[-1].variant == "first", "a row is there before the next one is made"
        yield Row("case", "second", 2.0)

    def wrong() -> Iterator[Row]:
        calls.append("wrong")
        yield Row("case", "third", 3.0)
        raise RuntimeError("out of memory")

    def slow() -> Iterator[Row]:
        calls.append("slow")
        raise Unfinished("at the third epoch")
        yield Row("case", "none")

    def deadly() -> Iterator[Row]:
        calls.append("deadly")
        yield Row("case", "fourth", 4.0)
        raise KeyboardInterrupt

    return [Task(make.__name__, make) for make in (right, wrong, slow, deadly)]


def test_a_record_is_gone_on_with(tmp_path: Path) -> None:
    path, calls = tmp_path / "found.json", list[str]()
    for _ in range(ATTEMPTS + 1):
        record = Record(path, MACHINE)  # as another process would read it
        tasks = tasks_of(record, calls)
        for task in record.pending("smoke", tasks):
            try:
                list(record.do("smoke", task))
            except KeyboardInterrupt:
                assert task.name == "deadly"
    assert calls == ["right", "wrong", *["slow", "deadly"] * ATTEMPTS, "slow"]
    record = Record(path, MACHINE)
    assert [row.variant for row in record.rows_of("smoke")] == ["first", "second", "third", "fourth"]
    found = {name: (entry["state"], entry["said"]) for name, entry in record.tasks("smoke").items()}
    assert found["right"] == ("done", "") and found["wrong"] == ("failed", "RuntimeError: out of memory")
    assert found["slow"] == ("unfinished", "at the third epoch") and found["deadly"][0] == "begun"
    assert stage_line("smoke", tasks, record, [], 3.0) == (
        "smoke: 1 of 4 tasks done; failed: wrong; ended their process: deadly; to go on with: slow; 3 s"
    )
    list(record.do("training", Task("right", lambda: [Row("other", "first")])))
    record.forget("smoke")
    assert [row.case for row in Record(path, MACHINE).rows_of()] == ["other"]
    assert len(Record(path, MACHINE).pending("smoke", tasks)) == 4


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    list(Record(path, MACHINE).do("smoke", Task("task", lambda: [Row("case", "first")])))
    with pytest.raises(ValueError, match="is of NVIDIA None, and this is another"):
        Record(path, {"gpu": "another"})
    path.write_text(json.dumps({"machine": MACHINE, "rows": []}))
    with pytest.raises(ValueError, match="was not written by this bench; move it, or name another folder with --out"):
        Record(path, MACHINE)


def test_a_stage_goes_on_after_a_task_that_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as something is new; and not past its time."""
    session = gpu.Session(gpu._options(["--dry-run", "--out", str(tmp_path)]))
    statuses, limits = [gpu.BROKEN, -11, 0, 0], list[float]()

    def process(command: list[str], timeout: float, **_: Any) -> SimpleNamespace:
        limits.append(float(command[command.index("--limit") + 1]))
        assert timeout == pytest.approx(limits[-1] + gpu.GRACE)
        session.path.write_text(str(len(limits)))
        return SimpleNamespace(returncode=statuses[len(limits) - 1])

    monkeypatch.setattr(subprocess, "run", process)
    session.run_apart("smoke", [])
    assert len(limits) == 3 and limits == sorted(limits, reverse=True) and limits[0] <= gpu.LIMIT

    def stuck(command: list[str], timeout: float, **_: Any) -> SimpleNamespace:
        limits.append(timeout)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", stuck)
    limits.clear()
    session.run_apart("smoke", [])
    assert len(limits) == 1
    session.limit = 0.0
    session.run_apart("smoke", [])
    assert len(limits) == 1


def test_a_variant_that_raises_costs_no_other_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    class Variant:
        def __init__(self, calls: Sequence[Call]) -> None:
            self.measured = 0
            calls[0]()

        def measure(self) -> None:
            self.measured += 1

        def cost(self) -> Cost:
            return Cost(float(self.measured))

    def wrong() -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(gpu_timing, "_Variant", Variant)
    meter = gpu_timing.GpuMeter(torch.device("cpu"), rounds=4)
    found = meter.costs({"wrong": [wrong], "right": [lambda: None]})
    assert found == {"wrong": Cost(said="RuntimeError: no such operator"), "right": Cost(4.0)}
    assert list(found) == ["wrong", "right"]
    with pytest.raises(RuntimeError, match="no such operator"):
        meter.costs({"wrong": [wrong], "also": [wrong]})


def test_a_run_without_time_or_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "lenet5-mnist", (), tmp_path / "runs", tmp_path
    with pytest.raises(Unfinished, match="10 s are too few to begin with"):
        list(gpu_runs.run_rows(*arguments, 10.0, {}))
    monkeypatch.setattr(gpu_runs, "finished", lambda *_: (2, "bqnn: error: MNIST is not there"))
    (row,) = gpu_runs.run_rows(*arguments, 100.0, {})
    assert row.failed and row.said == "exit 2: bqnn: error: MNIST is not there"


def test_the_sanitizers_answer_is_its_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: name)

    def row_of(status: int, output: str) -> Row:
        monkeypatch.setattr(gpu_checks, "finished", lambda *_: (status, output))
        (row,) = gpu_checks.sanitizer_rows("memcheck", "tests/test_x.py", 1.0)
        return row

    failing = "== 1 failed, 2 passed in 3s ==\n========= ERROR SUMMARY: 0 errors\n"
    assert (row_of(1, failing).failed, row_of(1, failing).said) == (False, "0 found; 1 failed, 2 passed in 3s")
    assert row_of(0, failing.replace("0 errors", "1 error")).failed
    assert row_of(0, "2 passed\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)").failed
    assert row_of(255, "Device not supported").said == "no summary, exit 255: Device not supported"


def test_a_test_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    output = "F.\nFAILED tests/test_x.py::test_it[cuda-triton] - assert\n1 failed, 1 passed in 2.00s\n"
    monkeypatch.setattr(gpu_checks, "finished", lambda *_: (1, output))
    (row,) = gpu_checks.pytest_rows("tests/test_x.py", "cuda", 1, 1.0)
    assert row.failed
    assert row.said == "1 failed, 1 passed in 2.00s\nFAILED tests/test_x.py::test_it[cuda-triton] - assert"


def test_a_command_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "STOPPING_SECONDS", 0.5)
    for script, expected in (("sleep 30", "told"), ("trap '' INT; while true; do sleep 0.1; done", "told")):
        status, output = gpu_checks.finished(["sh", "-c", f"echo told; {script}"], 0.3)
        assert status != 0 and output.strip() == expected


def test_make_gpu_runs_every_file_that_uses_a_gpu() -> None:
    tests = Path(__file__).parent
    uses = ("triton_devices(", "usable_backends(", "cuda_missing()", "@on_a_gpu")
    found = {f"tests/{path.name}" for path in tests.glob("test_*.py") if any(use in path.read_text() for use in uses)}
    assert found - {"tests/test_gpu_bench.py"} == set(gpu_checks.TESTS)


def training_rows(seconds: float, peak_bytes: int) -> list[Row]:
    """Every row that a figure of training ops is asked of; compared with 1200 bytes and a second."""
    cases = [f"{kind}_{name}" for kind in gpu_training.KINDS for name in gpu_training.LAYERS]
    return [
        row
        for case in (*cases, f"spike_slab_kl-{gpu_stages.PLAN.divergence_weights >> 20}M")
        for row in (
            Row(case, "triton", seconds, peak_bytes=peak_bytes, error=0.0),
            Row(case, "reference", 1.0, peak_bytes=1200),
            Row(case, "compiled", 0.5, peak_bytes=1200),
        )
    ]


def test_every_figure_of_training_ops_has_a_verdict() -> None:
    """Two of time and one of memory for each layer; of the divergence one of time, of bandwidth and of memory."""
    found = list(verdicts(training_rows(0.25, 400), "triton", 1.0, gpu_stages.PLAN))
    assert len(found) == 3 * 8 + 3
    asked = {verdict.text: verdict.asked for verdict in found if isinstance(verdict, Verdict)}
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
    assert len(memory) == 8
    assert {memory[case] for case in linear} == {3.0, 2.4} and memory["sample_linear-4096-4096-B2048"] == 2.4
    assert {case.split("-")[0]: memory[case] for case in set(memory) - linear} == {
        "sample_conv2d": 1.0,
        "moment_conv2d": 2.5,
    }
    met = {verdict.text: str(verdict).endswith("  met") for verdict in found}
    assert met["spike_slab_kl-16M: bytes of the gradients over peak memory"]
    assert met["sample_linear-4096-4096-B256: peak memory of reference over ours"]
    late = {
        str(verdict).split(":")[0] for verdict in found if "time of reference" in str(verdict) and "NOT" in str(verdict)
    }
    assert late == {"spike_slab_kl-16M"}
    larger = verdicts(training_rows(0.25, 9 * gpu_stages.PLAN.divergence_weights), "triton", 1.0, gpu_stages.PLAN)
    assert sum("memory" in str(verdict) and "NOT MET" in str(verdict) for verdict in larger) == 9


def packed_rows(seconds: float) -> list[Row]:
    """Every row that a figure of packed products is asked of; cuBLAS and cuDNN take a second."""
    cases = [gpu_packed.linear_case(size, batch) for size, batch in gpu_packed.FASTER]
    return [
        Row(case, variant, 1.0 if variant == gpu_packed.DENSE else seconds, weight_bytes=n_bytes)
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


def test_rivals_are_timed_where_they_are_right() -> None:
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
    meter = Computing()
    rows = {row.variant: row for row in gpu_packed.linear_rows(128, 4, meter, known)}
    assert {"bf16", "int8", gpu_packed.DENSE, "right"} == meter.measured and set(rows) == {*meter.measured, "wrong"}
    assert rows["wrong"].said.startswith("AssertionError: packed_linear-128-B4: ")


def test_rivals_stand_for_the_weight_that_they_draw() -> None:
    for bits in (2, 4):
        q, scale, dense = gpu_rivals._draw(256, bits, torch.device("cpu"))
        assert q.unique().tolist() == list(range(2**bits))
        groups = q.view(256, -1, gpu_rivals.GROUP)
        assert (groups.amin(2) == 0).all() and (groups.amax(2) == 2**bits - 1).all()
        expected = (groups.double() - 2 ** (bits - 1)) * scale.double()
        assert torch.equal(dense.double(), expected.view(256, 256))
