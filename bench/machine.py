"""What a measurement depends on besides the code, kept beside every result, and what this kind of machine can do."""

from __future__ import annotations

import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bqnn.core.machine import cpuinfo, describe_cpu
from bqnn.core.machine import versions as own_versions

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the repository: benches run from any other one too."""
RESULTS = ROOT / "bench" / "results"
RIVAL_PACKAGES = ("onnxruntime", "openvino", "nncf")


def cpu_name(machine: dict[str, Any]) -> str:
    """Short, for a file name: "xeon-6-207-amx-2-threads" for a Xeon of family 6, model 207, with AMX in use."""
    family, model, _ = machine["cpu_family_model_stepping"]
    brand = "xeon" if "Xeon" in machine["cpu"] else machine["cpu"].split()[0].lower()
    return f"{brand}-{family}-{model}-{machine['cpu_isa']}-{machine['threads']}-threads"


def versions() -> dict[str, str]:
    """Of Python, torch, this package, and of the packages among RIVAL_PACKAGES that are installed."""
    found = own_versions()
    for package in RIVAL_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, cores that torch uses, GPU, and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**describe_cpu(), "gpu": gpu, **versions()}


class Elsewhere:
    """How much of the cores something else than this process takes, since this was made."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """0..1, of all cores; None where the system does not tell. Time that a host gives to other guests counts."""
        if self._start is None:
            return None
        others, total = (now - before for now, before in zip(self._read() or (0.0, 0.0), self._start))
        return min(max(others / total, 0.0), 1.0) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float] | None:
        """Seconds of all cores that were neither idle nor this process's, and all seconds of all cores."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        user, nice, system, idle, wait, irq, soft_irq, steal, *_ = map(int, path.read_text().split()[1:11])
        busy = user + nice + system + irq + soft_irq + steal
        tick = os.sysconf("SC_CLK_TCK")
        return busy / tick - time.process_time(), (busy + idle + wait) / tick


class Limits(NamedTuple):
    """What a machine does at most in a second, by the best loop for each found, not by PyTorch's."""

    cache_bytes: tuple[tuple[int, float], ...]
    """(size, bytes a second) of each level: what fits into ``size`` can be read at that rate."""
    memory_bytes: float
    operations: dict[str, float]
    """By precision; an addition and a multiplication are two."""

    def read_rate(self, n_bytes: int) -> float:
        """Bytes a second at which the same ``n_bytes`` can be read again and again."""
        return next((rate for size, rate in self.cache_bytes if n_bytes <= size), self.memory_bytes)

    def share(self, n_bytes: int, operations: float, precision: str, seconds: float) -> float:
        """The least time that reading and arithmetic can take, as a share of ``seconds``."""
        return max(n_bytes / self.read_rate(n_bytes), operations / self.operations[precision]) / seconds


LIMITS = {
    ("6", "207", 2): Limits(
        cache_bytes=((4 << 20, 230e9), (64 << 20, 48e9)),
        memory_bytes=30e9,
        operations={"fp32": 330e9, "bf16": 5.5e12, "int8": 11e12},
    )
}
"""By family, model and threads. They were measured with two threads on two cores of an Emerald Rapids Xeon: reads of
buffers of each size, FMA and AMX tile products on registers. L2 is 2 MiB a core; of the L3, which other guests share,
64 MiB were seen to keep that rate."""


def known_limits() -> Limits | None:
    """The limits of this machine at its present number of threads, None where nobody measured them."""
    names = cpuinfo()
    return LIMITS.get((names.get("cpu family", ""), names.get("model", ""), torch.get_num_threads()))
