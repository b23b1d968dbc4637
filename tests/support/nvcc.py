"""Compiles csrc/cuda for a GPU that need not be here, and reads what its kernels take."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda_toolkit import ROOT, Toolkit, find_toolkit
from tests.support.passed import digest_of

TOOLKIT = find_toolkit()
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
TABLE = ROOT / "bench" / "results" / "cuda_resources.json"

# These run on the integer units; the multiplier's (IMAD) run beside them.
INTEGER = re.compile(r"(PRMT|LOP3|SHF|LEA|IADD3?|VIADD|VIADDMNMX|IMNMX|ISETP|SEL|BMSK|SGXT)\b")


class Kernel(NamedTuple):
    """What a kernel takes; ``local`` and ``stack`` are bytes a thread: not 0 where registers were spilled. The last
    three are instructions a weight in its main loop, 0 where it has none: all of them, those of the integer units, and
    those of the integers' multiplier."""

    name: str
    registers: int
    local: int
    stack: int
    shared: int
    issued: float
    integer: float
    multiplied: float


def sources() -> str:
    """A digest of what is compiled, and of the flags."""
    return digest_of(ROOT, ["csrc/cuda"], ["cuda_toolkit.py"])


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or of Triton."""
    folders = [TOOLKIT.home / "bin"] if TOOLKIT else []
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()), None)


def compiled(toolkit: Toolkit, architecture: str) -> list[Kernel]:
    """Every kernel of csrc/cuda for ``architecture``, e.g. "90", by name."""

    def compile_one(source: Path) -> list[Kernel]:
        target = f"{folder}/{source.stem}.o"
        subprocess.run(toolkit.command(str(source), target, [architecture], with_ptx=False), check=True)
        return list(_describe(target))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        return sorted(kernel for kernels in pool.map(compile_one, SOURCES) for kernel in kernels)


def _describe(target: str) -> Iterator[Kernel]:
    usage = _output(str(disassembler()), "-res-usage", target)
    code = {
        part.split("\n")[0]: part for part in _output(str(disassembler()), "-sass", target).split("Function : ")[1:]
    }
    for symbol, line in re.findall(r"Function (\w+):\n\s+(.*)", usage):
        count = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        traits = tuple(map(int, re.findall(r"Li(\d+)E", symbol)))
        name = re.search(r"\d+(packed_\w+?_kernel)", symbol)
        assert name, symbol
        work = _instructions(code[symbol], *traits) if traits else (0.0, 0.0, 0.0)
        full_name = name[1] + ("<{}, {}, {}>".format(*traits) if traits else "")
        yield Kernel(full_name, count["REG"], count["LOCAL"], count["STACK"], count["SHARED"], *work)


def _instructions(code: str, capacity: int, parts: int, column_tiles: int) -> tuple[float, float, float]:
    """Instructions a weight of the innermost loop that has all the products."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    lines = [(at, re.sub(r"^@!?U?P\d+\s+", "", text)) for at, text in lines]
    products = [i for i, (_, text) in enumerate(lines) if text.startswith("HMMA")]
    places = {at: i for i, (at, _) in enumerate(lines)}
    loops = []
    for i, (at, text) in enumerate(lines):
        jump = re.search(r"BRA.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at and places[int(jump[1], 16)] <= products[0] and i >= products[-1]:
            loops.append((i - places[int(jump[1], 16)], places[int(jump[1], 16)], i))
    _, first, last = min(loops)
    kinds = Counter(text.split()[0].split(".")[0] for _, text in lines[first : last + 1])
    row_tiles = 2 if parts == 1 and column_tiles < 3 else 1
    # A product is of 16 x 16 weights; with capacity 2, one in row_tiles + 1 is of the activations alone.
    shared = (row_tiles + 1) / row_tiles if capacity == 2 else 1.0
    weights_of_a_lane = 8 * kinds["HMMA"] / shared / column_tiles / parts
    integer = sum(count for kind, count in kinds.items() if INTEGER.fullmatch(kind))
    return tuple(round(count / weights_of_a_lane, 2) for count in (kinds.total(), integer, kinds["IMAD"]))  # type: ignore[return-value]


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
