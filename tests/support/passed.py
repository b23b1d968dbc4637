"""Which sources of the kernels have passed the programs of csrc/tests, and the sanitizers; these need no second run.

    python -m tests.support.passed            # whether those that are here have: the status is 0, or 1
    python -m tests.support.passed --record   # they have now; `make sanitize` says so

To build them takes minutes, and what is drawn is the same each time: the same sources pass again. The record holds for
the instruction set that it was made on and those below, which the drawn cases run too; AMX tiles are emulated where a
machine has AVX-512 and no tiles. Nothing here needs torch, as it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "csrc" / "tests" / "passed.json"
SOURCES = (".cpp", ".h", ".inl", ".cu", ".cuh")
BUILT_WITH = ("Makefile", "setup.py")
"""The flags stand there."""
LEVELS = {"scalar": "", "avx2": "avx2", "avx512": "avx512_vnni"}
"""Instruction sets in order, and the flag of /proc/cpuinfo that each needs."""


def digest_of(root: Path, folders: Sequence[str], names: Sequence[str] = ()) -> str:
    """SHA-256 of the names and the text of all sources in ``folders``, and of the files ``names``."""
    found = (path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SOURCES)
    digest = hashlib.sha256()
    for path in sorted([*found, *(root / name for name in names)]):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def digest(root: Path = ROOT) -> str:
    """Of what is built with sanitizers, and how."""
    return digest_of(root, [f"csrc/{name}" for name in ("bindings", "cpu", "tests")], BUILT_WITH)


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The highest of :data:`LEVELS` that the processor has."""
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return [level for level, flag in LEVELS.items() if not flag or flag in flags][-1]


def have_passed(record: Path = RECORD, root: Path = ROOT, level: str | None = None) -> bool:
    """Whether a record says it of these sources, for this processor's instruction set or a higher one."""
    if not record.exists():
        return False
    found, order = json.loads(record.read_text()), list(LEVELS)
    here = instruction_set() if level is None else level
    return found["sources"] == digest(root) and order.index(here) <= order.index(found["instruction_set"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write that they have passed")
    if parser.parse_args(arguments).record:
        content = {"sources": digest(), "instruction_set": instruction_set()}
        RECORD.write_text(json.dumps(content, indent=2) + "\n")
        return 0
    return 0 if have_passed() else 1


if __name__ == "__main__":
    sys.exit(main())
