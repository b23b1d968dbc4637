"""The compiled extension bqnn._C: whether it is here, and which instruction set its kernels use.

Importing it registers the ops ``torch.ops.bqnn_cpu.*``, which the backend "cpu" calls.
"""

from __future__ import annotations

import importlib

import torch

MISSING = ""
"""Why there is no extension; empty where there is one."""

try:
    importlib.import_module("bqnn._C")
except ImportError as error:
    MISSING = f"the compiled extension is not here ({error}); install with a C++ compiler to have it"

ISAS = ("scalar", "avx2", "avx512", "amx")


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: "amx", "avx512", "avx2" or "scalar"; "none" without the extension.

    The best one that processor and system have, or the lower one that ``BQNN_CPU_ISA`` named when the first kernel ran.

    Raises:
        RuntimeError: ``BQNN_CPU_ISA`` names no instruction set, or one that is not here.
    """
    return "none" if MISSING else ISAS[torch.ops.bqnn_cpu.isa()]
