"""``python -m bench.network_memory lenet5 --batch 64``: the memory that a network takes to run, ours beside torch's.

Each variant runs in a process of its own: weights and what is made of them once they are ready, and the peak while it
runs, in bytes of resident memory beyond what the process had before the network. Code that libraries load is not
counted; a compiled network is read from its file, since what compiling leaves behind is not the network's. Linux tells
these numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import bqnn
from bench.network_rivals import RIVALS, Call
from bench.networks import ENGINE, NETWORKS, OURS, NetworkGroup, compiled, forget, images

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


def write_compiled(net: str, batch: int, variant: str, folder: Path) -> None:
    """Writes the file of a compiled network into ``folder``."""
    fast = compiled(net, images(net, batch, 0), variant.removeprefix(ENGINE).strip())
    bqnn.save(fast, folder / f"{net}.safetensors")
    forget()


def _call(net: str, batch: int, variant: str, folder: Path | None) -> Call:
    if folder is None:
        return NetworkGroup(net, batch).call(variant)
    fast, x = bqnn.load(folder / f"{net}.safetensors"), images(net, batch, 0)
    return lambda: fast(x)


def measure(net: str, batch: int, variant: str, folder: Path | None = None) -> Memory:
    """Of this process, which should have run nothing else; with the compiled networks of ``folder``.

    Raises:
        pytest.skip.Exception: the variant can not run here.
        OSError: the system is none that tells.
    """
    with torch.inference_mode():
        _call("lenet5", 1, variant, folder)()  # threads, and what libraries make for themselves
    _release()
    before = _read("RssAnon")
    call = _call(net, batch, variant, folder)
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
    with tempfile.TemporaryDirectory() as folder:
        options: list[str] = []
        if variant.startswith(ENGINE):
            options = ["--files", folder]
            if failure := _run(net, batch, variant, "--write", *options).failure:
                return failure
        found = _run(net, batch, variant, "--inside", *options)
    return found.failure or (found.answer if isinstance(found.answer, str) else Memory(*found.answer))


class _Answer(NamedTuple):
    answer: Any
    """The last line, as JSON."""
    failure: str
    """The last line of what went wrong."""


def _run(net: str, batch: int, variant: str, *options: str) -> _Answer:
    command = [
        sys.executable,
        "-m",
        "bench.network_memory",
        net,
        "--batch",
        str(batch),
        "--variants",
        variant,
        *options,
    ]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if run.returncode:
        return _Answer(None, run.stderr.strip().splitlines()[-1])
    return _Answer(json.loads(run.stdout.splitlines()[-1]), "")


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
    for internal in ("--write", "--inside"):
        parser.add_argument(internal, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not (chosen.write or chosen.inside):
        found = {variant: measure_apart(chosen.net, chosen.batch, variant) for variant in chosen.variants}
        print("\n".join(lines(found)))
        return
    (variant,) = chosen.variants
    try:
        if chosen.inside:
            print(json.dumps(measure(chosen.net, chosen.batch, variant, chosen.files)))
            return
        for net in ("lenet5", chosen.net):
            write_compiled(net, chosen.batch, variant, chosen.files)
        print(json.dumps("written"))
    except pytest.skip.Exception as reason:
        print(json.dumps(str(reason)))


if __name__ == "__main__":
    main()
