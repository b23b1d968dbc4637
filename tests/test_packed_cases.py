"""The programs of csrc/tests, built without sanitizers: thousands of drawn cases for the kernels of csrc/cpu.

`make sanitize` runs the same cases, under AddressSanitizer and UBSan too, and leaves a record of the sources that have
passed: those are not built and run again. Where a case fails, the program prints how to run it alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import bqnn
from tests.support import passed

ROOT = Path(__file__).resolve().parent.parent
MAKE = shutil.which("make")

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(
    MAKE is None or shutil.which("g++") is None or bqnn.cpu_isa() == "none", reason="no compiler or no CPU kernels"
)
passed_before = pytest.mark.skipif(passed.have_passed(), reason="these sources have passed: csrc/tests/passed.json")


def build(program: str) -> Path:
    """Builds what is older than its sources; one process at a time, since several may test."""
    target = ROOT / "build" / "plain" / program
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [str(MAKE), "-s", f"-j{os.cpu_count()}", str(target.relative_to(ROOT))]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return target


@passed_before
@pytest.mark.parametrize(("program", "cases"), [("packed_cases", 6000), ("elementwise_cases", 2000)])
def test_drawn_cases(program: str, cases: int) -> None:
    run = subprocess.run([str(build(program))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    assert run.stdout.startswith(f"{cases} cases")
    isa = bqnn.cpu_isa()
    assert ("amx" if isa == "avx512" else isa) in run.stdout  # tiles are emulated where there are none
