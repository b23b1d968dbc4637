"""What a measurement depends on besides the code: kept beside every result."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import bqnn


def describe_machine() -> dict[str, object]:
    """Processor, cores that torch uses, GPU, and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    return {
        "cpu": names.get("model name", platform.processor()),
        "cpu_family_model_stepping": [names.get(key) for key in ("cpu family", "model", "stepping")],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bqnn": bqnn.__version__,
    }
