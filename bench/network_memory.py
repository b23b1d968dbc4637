"""``python -m bench.network_memory lenet5 --batch 64``: the memory that a network takes to run, ours beside torch's.

Each variant runs in a process of its own: weights and what is made of them once they are ready, and the peak while it
runs, in bytes of resident memory beyond what the process had before the network. Code that libraries load is not
counted. Linux tells these numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.network_rivals import RIVALS
from bench.networks import NETWORKS, OURS, NetworkGroup, forget

BASELINE = "torch fp32"
RUNS = 3
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What proc(5) has for CLEAR: the peak becomes what is resident now."""


class Memory(NamedTuple):
    """Bytes: of the network at rest, and at the peak of a run, the network, its activations and scratch included."""

    held: int
    peak: int


def measure(net: str, batch: int, variant: str) -> Memory:
    """Of this process, which should have run nothing else.

    Raises:
        pytest.skip.Exception: the variant can not run here.
        OSError: the system is none that tells.
    """
    with torch.inference_mode():
        NetworkGroup("lenet5", 1).call(variant)()  # threads, and what libraries make for themselves
    _release()
    before = _read("RssAnon")
    call = NetworkGroup(net, batch).call(variant)
    with torch.inference_mode():
        call()  # a library may make its layouts now
    _release()
    held = _read("RssAnon") - before
    CLEAR.write_text(RESET_PEAK)
    with torch.inference_mode():
        for _ in range(RUNS):
            call()
    return Memory(held, _read("VmHWM") - _read("RssFile") - _read("RssShmem") - before)


def _release() -> None:
    """Gives back what nothing refers to, to the system too."""
    forget()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _read(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def measure_apart(net: str, batch: int, variant: str) -> Memory | str:
    """:func:`measure` in a new process; where the variant can not run, why."""
    command = [sys.executable, "-m", "bench.network_memory", net, "--batch", str(batch), "--inside", variant]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if run.returncode:
        return run.stderr.strip().splitlines()[-1]
    found = json.loads(run.stdout.splitlines()[-1])
    return found if isinstance(found, str) else Memory(*found)


def lines(found: dict[str, Memory | str]) -> Iterator[str]:
    """A line a variant: both numbers in MiB, and the peak of BASELINE over its peak."""
    baseline = found.get(BASELINE)
    yield f"{'MiB':<24}{'at rest':>10}{'peak':>10}  {BASELINE} over it, at the peak"
    for variant, memory in found.items():
        if isinstance(memory, str):
            yield f"{variant:<24}{memory}"
            continue
        ratio = f"{baseline.peak / max(memory.peak, 1):.2f}" if isinstance(baseline, Memory) else ""
        yield f"{variant:<24}{memory.held / 2**20:>10.2f}{memory.peak / 2**20:>10.2f}  {ratio}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--variants", nargs="+", choices=[*RIVALS, *OURS], default=[BASELINE, *OURS])
    parser.add_argument("--inside", choices=[*RIVALS, *OURS], help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.inside is None:
        found = {variant: measure_apart(chosen.net, chosen.batch, variant) for variant in chosen.variants}
        print("\n".join(lines(found)))
        return
    try:
        print(json.dumps(measure(chosen.net, chosen.batch, chosen.inside)))
    except pytest.skip.Exception as reason:
        print(json.dumps(str(reason)))


if __name__ == "__main__":
    main()
