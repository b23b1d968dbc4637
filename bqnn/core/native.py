"""The compiled extensions: whether they are here, and which instruction set the CPU kernels use.

Importing bqnn._C registers the ops ``torch.ops.bqnn_cpu.*``, which the backend "cpu" calls; bqnn._CUDA, which is loaded
when a GPU is first asked for, registers ``torch.ops.bqnn_cuda.*``.
"""

from __future__ import annotations

import importlib
from functools import cache

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


@cache
def cuda_missing() -> str:
    """Why the backend "cuda" can not run here; empty where it can. The first call loads the CUDA kernels."""
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs a GPU of compute capability 8.0, and {torch.cuda.get_device_name()} is older"
    try:
        importlib.import_module("bqnn._CUDA")
    except ImportError as error:
        return f"the CUDA kernels are not here ({error}); install with a CUDA toolkit to have them"
    return ""
