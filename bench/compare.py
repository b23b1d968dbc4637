"""``python -m bench.compare BASE NEW``: how long packed layers and training steps of checkout NEW take over BASE's.

Both are folders of checkouts with their extensions built in place. Each has a process of its own, which makes and
checks the cases of its own bench files; a case that both have is timed in the two in turns. Prints the median of the
ratios NEW / BASE for every case, their geometric mean and the worst. About 15 minutes; ``-k TEXT`` takes the cases that
have TEXT in their names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bqnn

PAUSE_SECONDS = 0.003
"""A sleep comes before a case is timed: the idle threads of the other process spin before they sleep."""
BURST_SECONDS = 0.04
"""A case is called for so long before it is timed, and then timed for so long; a longer call is timed alone."""
START = "import runpy, sys; runpy.run_path(sys.argv[1])['answer']()"


class Case(NamedTuple):
    """A group, what makes it, and one of its variants."""

    group: str
    make: Callable[[], Any]
    variant: str


def cases() -> Iterator[Case]:
    """All that is not a rival's in the bench files of the checkout that this process imports from, group by group."""
    for name, make in (("packed_linear", "LinearGroup"), ("packed_conv2d", "Conv2dGroup")):
        bench = importlib.import_module(f"bench.bench_{name}")
        for shape, batch, variant in (case.values for case in bench.CASES):
            if variant not in bench.RIVALS:
                yield Case(bench.group_name(shape, batch), partial(getattr(bench, make), shape, batch), variant)
    bench = importlib.import_module("bench.bench_training")
    for model in bench.NETWORKS:
        for variant in bench.OURS:
            yield Case(f"training, {model}", partial(bench.TrainingGroup, model), variant)


def answer() -> None:
    """A checkout's process: gives the folder of its package and the names of its cases; then for each line of input,
    if it names another case than the one before, what is wrong with that one's result, else the seconds of a call."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(value: object) -> None:
        print(json.dumps(value), file=replies, flush=True)

    known = {f"{case.group}: {case.variant}": case for case in cases()}
    reply([str(Path(bqnn.__file__).resolve().parents[1]), list(known)])
    current, group_name, group, call = "", "", None, None
    for name in map(str.strip, sys.stdin):
        if name == current:
            with torch.inference_mode():
                reply(_seconds(call))
            continue
        case, current, call = known[name], name, None
        try:
            if case.group != group_name:
                group = None  # so that the group before is freed before this one is made
                group_name, group = case.group, case.make()
            call = group.call(case.variant)
            with torch.inference_mode():
                output = call()
            group.check(case.variant, output)
            reply("")
        except Exception as error:
            reply(f"{type(error).__name__}: {error}")


def _seconds(call: Callable[[], object]) -> float:
    time.sleep(PAUSE_SECONDS)
    for _ in ("settling", "timed"):
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < BURST_SECONDS:
            call()
            calls += 1
        seconds = (time.perf_counter() - start) / calls
        if seconds > BURST_SECONDS:
            break
    return seconds


class Checkout:
    """The process of a checkout, by its own virtual environment where it has one."""

    def __init__(self, folder: Path) -> None:
        own = folder / ".venv" / "bin" / "python"
        command = [str(own) if own.exists() else sys.executable, "-c", START, str(Path(__file__).resolve())]
        environment, pipe = {**os.environ, "PYTHONPATH": str(folder)}, subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)
        imported, self.names = self._read()
        if Path(imported) != folder:
            raise SystemExit(f"compare: the process of {folder} imports bqnn from {imported}")

    def ask(self, name: str) -> Any:
        print(name, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: {self._process.args} ended with {self._process.wait()}")
        return json.loads(line)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("-k", default="", metavar="TEXT", help="the cases with TEXT in their names")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(words)
    base, new = (Checkout(folder.resolve()) for folder in (arguments.base, arguments.new))
    ratios: dict[str, float] = {}
    for name in [name for name in base.names if name in new.names and arguments.k in name]:
        wrong = [f"{side}: {fault}" for side, fault in (("BASE", base.ask(name)), ("NEW", new.ask(name))) if fault]
        if wrong:
            print(f"{name:<64} not timed, {'; '.join(wrong)}", flush=True)
            continue
        turns = [(base, new), (new, base)] * ((arguments.rounds + 1) // 2)
        seconds = [{checkout: checkout.ask(name) for checkout in turn} for turn in turns[: arguments.rounds]]
        ratios[name] = statistics.median(turn[new] / turn[base] for turn in seconds)
        print(f"{name:<64}{ratios[name]:>7.3f}", flush=True)
    if not ratios:
        raise SystemExit("compare: no case was timed")
    worst = max(ratios, key=ratios.__getitem__)
    print(f"geometric mean of {len(ratios)} cases {statistics.geometric_mean(ratios.values()):.3f}")
    print(f"worst {ratios[worst]:.3f}, {worst}")


if __name__ == "__main__":
    main()
