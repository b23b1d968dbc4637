"""Everything that needs a GPU, in stages: ``make gpu``, or ``python -m bench.gpu`` where bqnn is installed.

    smoke      every op once against the reference, a minute with what it compiles
    training   ops of training: the device's time as they come and as a CUDA graph, the host's time, peak memory
    packed     packed products against cuBLAS, cuDNN and packages
    networks   whole networks, a training step and inference
    tests      the tests that use a GPU, and compute-sanitizer
    runs       training runs on data in a folder

Each ends within eight minutes, or leaves the rest to a further call: every row is in bench/results/<gpu>.json as soon
as it exists, and what is done is not done again. A stage runs in a process of its own, and goes on in another one after
a task that has ended it. Needs torch, triton and pytest, and no network. ``--dry-run`` runs all of it without a GPU, on
next to nothing, with a stand-in for Triton's launches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_record import DONE, Record
from bench.gpu_rows import Row
from bench.gpu_stages import PLAN, STAGES, TINY, Setting, bandwidth, finish
from bench.gpu_timing import DryMeter, GpuMeter
from bench.gpu_verdicts import stage_line, verdicts
from bench.machine import RESULTS, ROOT, describe_machine

LIMIT = 470.0
"""Seconds of a stage."""
GRACE = 30.0
"""Seconds more, after which a stage's process is ended."""
BROKEN = 3
"""The exit status of a process whose GPU does nothing any more after an error."""
DRY = "dry-run"


class Session:
    """A call of the command: where it writes, and what its stages are run with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry, self.limit, self.again, self.data = options.dry_run, options.limit, options.again, options.data
        self.machine: dict[str, Any] = describe_machine()
        name = DRY if self.dry else str(self.machine["gpu"]).lower().replace(" ", "-")
        default = Path(tempfile.mkdtemp(prefix="bqnn-gpu-")) if self.dry else RESULTS
        self.out = (options.out or default).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.runs = ROOT / "runs" if self.out == RESULTS else self.out / "runs"
        self.path = self.out / f"{name}.json"
        if options.start is not None and not self.path.exists():
            shutil.copyfile(options.start, self.path)

    def record(self) -> Record:
        """What is known so far, read from the file."""
        return Record(self.path, self.machine)

    def setting(self, limit: float) -> Setting:
        """What tasks run with, from now on, for so many seconds."""
        end = time.monotonic() + limit
        meter = DryMeter() if self.dry else GpuMeter(torch.device("cuda"))
        environment = {"BQNN_BACKEND": "cpu"} if self.dry else {}  # a run is no run with kernels that do nothing
        plan = TINY if self.dry else PLAN
        return Setting(plan, meter, "triton", self.runs, self.data, lambda: end - time.monotonic(), environment)

    def run_here(self, stage: str, limit: float) -> int:
        """Does the pending tasks of a stage; the exit status of the process."""
        record, setting = self.record(), self.setting(limit)
        for task in record.pending(stage, list(STAGES[stage](setting))):
            if setting.seconds_left() <= 0.0:
                break
            for row in record.do(stage, task):
                print(_line(row), flush=True)
            found = record.tasks(stage)[task.name]
            if found["state"] != DONE:
                print(f"{task.name}: {found['state']}, {found['said']}", flush=True)
            try:
                finish(setting.meter.device)
            except RuntimeError as error:
                print(f"{task.name} has left the GPU broken: {error}", flush=True)
                return BROKEN
        return 0

    def run_apart(self, stage: str, options: Sequence[str]) -> None:
        """The same in a process of its own, and in a further one as long as a task ends it and something is new."""
        end, status, before = time.monotonic() + self.limit, BROKEN, b""
        while status != 0 and (left := end - time.monotonic()) > 0.0:
            if before == (before := self.path.read_bytes() if self.path.exists() else b"nothing"):
                break
            command = [sys.executable, "-m", "bench.gpu", stage, "--here", "--limit", str(left), *options]
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = subprocess.run(command, cwd=ROOT, timeout=left + GRACE, check=False).returncode

    def run(self, stage: str, here: bool, is_child: bool = False) -> int:
        """A stage and, but in the process that another one has started for it, the line that says what became of it."""
        start, status = time.monotonic(), 0
        if self.again:
            self.record().forget(stage)
        if here:
            status = self.run_here(stage, self.limit)
        else:
            options = ["--out", str(self.out), "--data", str(self.data), *(["--dry-run"] if self.dry else [])]
            self.run_apart(stage, options)
        if not is_child:
            self._tell(stage, time.monotonic() - start)
        return status

    def _tell(self, stage: str, seconds: float) -> None:
        record, setting = self.record(), self.setting(0.0)
        found = self.verdicts(record.rows_of(stage))
        print(stage_line(stage, list(STAGES[stage](setting)), record, found, seconds), flush=True)

    def verdicts(self, rows: Sequence[Row]) -> list[Any]:
        """Of the figures that are asked of these rows."""
        setting = self.setting(0.0)
        return list(verdicts(rows, setting.ours, bandwidth(self.record().rows_of()), setting.plan))


def _line(row: Row) -> str:
    times = [None if each is None else 1e6 * each for each in (row.seconds, row.graph_seconds, row.host_seconds)]
    numbers = "".join(f"{'-' if each is None else f'{each:.1f}':>11}" for each in times)
    memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    error = "" if row.error is None else f"  error {row.error:.1e}"
    said = f"  {row.said.splitlines()[0][:120]}" if row.said else ""
    return f"{row.case:<40}{row.variant:<24}{numbers} us{memory:>10} MiB{error}{said}{'  WRONG' if row.failed else ''}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)}; all where none is")
    parser.add_argument("--again", action="store_true", help="do the stages again, whatever is done of them")
    parser.add_argument("--out", type=Path, help="folder of results and runs (bench/results)")
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="FILE", help="go on with this file of an earlier call"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the data sets (%(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="seconds of a stage (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, and without times")
    parser.add_argument("--here", action="store_true", help="in this process, which an error of the GPU may end")
    options = parser.parse_args(arguments)
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"STAGE must be one of {', '.join(STAGES)}, got {', '.join(unknown)}")
    options.data = options.data.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        raise SystemExit("bench.gpu: there is no GPU here; --dry-run needs none")
    with contextlib.ExitStack() as stack:
        if options.dry_run:
            from tests.support.launches import gpu_stands_in  # Triton may not be installed where there is a GPU

            stack.enter_context(gpu_stands_in())
        session = Session(options)
        for stage in options.stages or STAGES:
            status = session.run(stage, options.here or options.dry_run, is_child=options.here)
            if status != 0:
                return status
    if not options.here:
        lines = [str(verdict) for verdict in session.verdicts(session.record().rows_of())]
        print("\n".join(lines))
        print(json.dumps({"file": str(session.path), "figures": len(lines)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
