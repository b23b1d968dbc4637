"""The compiled extensions: whether they are here, and which instruction set the CPU kernels use.

Importing bqnn._C registers the ops ``torch.ops.bqnn_cpu.*``, which the backend "cpu" calls; bqnn._CUDA, which is loaded
when a GPU is first asked for, registers ``torch.ops.bqnn_cuda.*``. Why one of them is not here, setup.py has left on
record.
"""

from __future__ import annotations

import importlib
import json
import warnings
from functools import cache
from pathlib import Path

import torch

RECORD = Path(__file__).resolve().parents[1] / "_build.json"
"""What became of the extensions when the package was built: "skipped", by extension why it was, or nothing; and
"torch", the version that they were built with."""

AGAIN = "pip's options --force-reinstall --no-deps --no-cache-dir"  # pip's cache would give the same wheel again


def why_missing(extension: str, error: ImportError) -> str:
    """Why ``extension`` can not be imported, which failed with ``error``, and what helps."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"not built: {RECORD.parent} is a source tree, of which nothing was installed (pip install -e .)"
    if reason := record["skipped"][extension]:
        return f"not built when bqnn was installed: {reason}. Once that is mended, install bqnn again with {AGAIN}"
    built = f"built with torch {record['torch']}, and this is torch {torch.__version__}"
    return f"{built}: they can not be loaded ({error}). To build them again, install bqnn with {AGAIN}"


MISSING = ""
"""Why there are no CPU kernels; empty where there are."""

try:
    importlib.import_module("bqnn._C")
except ImportError as error:
    MISSING = f"the CPU kernels were {why_missing('bqnn._C', error)}"


@cache
def warn_of_missing() -> None:
    """Warns once where there are no CPU kernels; called by what runs something else in their place."""
    if MISSING:
        slow = "bqnn runs plain PyTorch, which takes many times as long"
        quiet = "With BQNN_BACKEND=reference it does so without this warning"
        warnings.warn(f"{slow}: {MISSING}. {quiet}.", RuntimeWarning, stacklevel=2)


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
        return f"the CUDA kernels were {why_missing('bqnn._CUDA', error)}"
    return ""
