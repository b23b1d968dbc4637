"""The vector functions of csrc/cpu/simd/vec.inl, compiled here, against float64 and against each other."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bqnn

COMPILER = shutil.which("c++") or shutil.which("g++")
ROOT = Path(__file__).resolve().parent.parent
FLAGS = {4: [], 8: ["-mavx2", "-mfma"], 16: ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}
LANES = {"scalar": [4], "avx2": [4, 8], "avx512": [4, 8, 16], "amx": [4, 8, 16]}
SMALLEST_NORMAL = 2.0**-126

pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() not in ("x86_64", "aarch64") or bqnn.cpu_isa() == "none",
    reason="no compiler or no CPU kernels",
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ctypes.CDLL]:
    """The functions with each number of lanes that this processor has."""
    folder = tmp_path_factory.mktemp("vec")
    found = {}
    for lanes in LANES[bqnn.cpu_isa()]:
        library = folder / f"vec{lanes}.so"
        options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-DBQNN_LANES={lanes}", *FLAGS[lanes]]
        source = str(ROOT / "tests" / "vec_probe.cpp")
        subprocess.run([str(COMPILER), *options, f"-I{ROOT / 'csrc'}", source, "-o", str(library)], check=True)
        found[lanes] = ctypes.CDLL(str(library))
    return found


def call(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (x, y))
    getattr(library, f"probe_{name}")(*pointers, ctypes.c_int64(len(x)))
    return y


def exactly(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(torch.from_numpy(x.astype(np.float64))).numpy()


def cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2.0))


EXACT = {
    "exp": exactly(torch.exp),
    "log": exactly(torch.log),
    "log1p": exactly(torch.log1p),
    "sqrt": exactly(torch.sqrt),
    "sigmoid": exactly(torch.sigmoid),
    "erfc": exactly(torch.erfc),
    "sin_turns": exactly(lambda x: torch.sin(2.0 * math.pi * x)),
    "cos_turns": exactly(lambda x: torch.cos(2.0 * math.pi * x)),
    "normal_below": exactly(cdf),
    "normal_above": exactly(lambda x: cdf(-x)),
    "normal_density": exactly(lambda x: (-0.5 * x * x).exp() / math.sqrt(2.0 * math.pi)),
}
# A case is a name, an interval, the error allowed in units in the last place of the result, and the least result, whose
# units hold below it too (sin and cos have roots).
CASES = [
    ("exp", -104.0, 88.7, 1.0, SMALLEST_NORMAL),
    ("exp", -1.0, 1.0, 1.0, SMALLEST_NORMAL),
    ("log", 1e-3, 3.0, 1.0, SMALLEST_NORMAL),
    ("log", 1e-40, 1e-36, 1.0, SMALLEST_NORMAL),
    ("log", 1.0, 3e38, 1.0, SMALLEST_NORMAL),
    ("log1p", -0.99, 3.0, 2.0, SMALLEST_NORMAL),
    ("log1p", -1e-3, 1e-3, 2.0, SMALLEST_NORMAL),
    ("log1p", 1.0, 1e30, 2.0, SMALLEST_NORMAL),
    ("sqrt", 0.0, 3.0, 0.5, SMALLEST_NORMAL),
    ("sigmoid", -80.0, 20.0, 3.0, SMALLEST_NORMAL),
    ("erfc", -5.0, 10.0, 5.0, SMALLEST_NORMAL),
    ("erfc", -0.5, 0.5, 5.0, SMALLEST_NORMAL),
    ("sin_turns", 0.0, 1.0, 1.5, 1.0),
    ("cos_turns", 0.0, 1.0, 1.5, 1.0),
    ("normal_below", -13.0, 6.0, 6.0, SMALLEST_NORMAL),
    ("normal_above", -6.0, 13.0, 6.0, SMALLEST_NORMAL),
    ("normal_density", -13.0, 13.0, 3.0, SMALLEST_NORMAL),
]


@pytest.mark.parametrize(
    ("name", "low", "high", "allowed", "least"), [pytest.param(*c, id=f"{c[0]}-{c[1]:g}-{c[2]:g}") for c in CASES]
)
def test_precision(
    libraries: dict[int, ctypes.CDLL], name: str, low: float, high: float, allowed: float, least: float
) -> None:
    x = np.linspace(low, high, 200_003).astype(np.float32)  # they are no whole number of vectors
    results = [call(library, name, x) for library in libraries.values()]
    for other in results[1:]:
        assert np.array_equal(other.view(np.int32), results[0].view(np.int32)), "instruction sets differ"
    exact = EXACT[name](x)
    unit = np.spacing(np.maximum(np.abs(exact), least).astype(np.float32)).astype(np.float64)
    if least == 1.0:
        unit = np.full_like(exact, 2.0**-24)  # the unit of numbers just below 1
    worst = np.max(np.abs(results[0].astype(np.float64) - exact) / unit)
    assert worst <= allowed, f"{worst:.2f} units in the last place"


@pytest.mark.parametrize("name", EXACT)
def test_ends(libraries: dict[int, ctypes.CDLL], name: str) -> None:
    x = np.array([0.0, -0.0, 1e-40, 1e-45, 0.25, 0.5, 0.75, 1.0], dtype=np.float32)
    if "normal" in name:
        x = np.concatenate([x, np.array([13.0, -13.0, math.nan, -1.0, -1e-40], dtype=np.float32)])
    elif "turns" not in name:
        ends = [math.inf, -math.inf, math.nan, -1.0, -2.0, 1e38, -1e38, 200.0, -200.0, -1e-40]
        x = np.concatenate([x, np.array(ends, dtype=np.float32)])
    with np.errstate(all="ignore"):
        exact = EXACT[name](x).astype(np.float32)
    for library in libraries.values():
        found = call(library, name, x)
        assert np.array_equal(np.isnan(found), np.isnan(exact))
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=2e-7 if "turns" in name else 1e-44)
