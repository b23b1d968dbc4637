"""What a measurement depends on besides the code: the processor, its threads, and the versions of what runs."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from bqnn._version import __version__
from bqnn.core.native import cpu_isa

CPUINFO = Path("/proc/cpuinfo")


def cpuinfo() -> dict[str, str]:
    """What Linux says of the processor, by field ("model name", "cpu family" and so on); empty elsewhere."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}


def describe_cpu() -> dict[str, Any]:
    """The processor, the instruction set that kernels use, and the threads that torch uses."""
    names = cpuinfo()
    return {
        "cpu": names.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model_stepping": [names.get(key) for key in ("cpu family", "model", "stepping")],
        "cpu_isa": cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python, torch and this package."""
    return {"python": platform.python_version(), "torch": torch.__version__, "bqnn": __version__}
