"""The build of the CUDA kernels, without a GPU: what they take when compiled, and what setup.py says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nvcc import ARCHITECTURES, ROOT, TABLE, TOOLKIT, Kernel, compiled, disassembler, sources

# A changed constant may move the number of instructions by so much.
LEEWAY = 1.05


@pytest.mark.skipif(TOOLKIT is None or disassembler() is None, reason="no CUDA toolkit, or no cuobjdump")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(architecture: str) -> None:
    """What the table knows, by the digest of the sources, is compiled for the last architecture alone."""
    assert TOOLKIT is not None
    table = json.loads(TABLE.read_text())
    rows = [row for row in table["kernels"] if row.pop("architecture") == architecture]
    before, is_same_compiler = [Kernel(**row) for row in rows], tuple(table["nvcc"]) == TOOLKIT.release
    is_known = is_same_compiler and table["sources"] == sources()
    kernels = before if is_known and architecture != ARCHITECTURES[-1] else compiled(TOOLKIT, architecture)
    assert len(kernels) == 17
    for kernel in kernels:
        assert (kernel.local, kernel.stack) == (0, 0), f"{kernel.name} spills: {kernel}"
        assert kernel.shared <= 48 * 1024, kernel  # a launch gets more only where it asks for it
    if not is_same_compiler:
        pytest.skip(f"compared with no table: it is of CUDA {table['nvcc']}, and this is {TOOLKIT.release}")
    assert [kernel.name for kernel in kernels] == [kernel.name for kernel in before], "make the table again"
    for kernel, old in zip(kernels, before):
        assert kernel.registers <= old.registers and kernel.shared <= old.shared, f"{kernel}, before {old}"
        assert kernel.issued <= LEEWAY * old.issued, f"{kernel}, before {old}"
    assert not is_known or kernels == before, "the table is not what the compiler gives"


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        pytest.param("0", "CUDA kernels skipped: BQNN_CUDA=0", id="off"),
        pytest.param("", "CUDA kernels skipped: (the toolkit in .* is of CUDA 9.0 and torch|this torch)", id="other"),
        pytest.param("1", "BQNN_CUDA=1, and (the toolkit in .* is of CUDA 9.0 and torch|this torch)", id="demanded"),
    ],
)
def test_setup_says_why_it_skips(switch: str, message: str, tmp_path: Path) -> None:
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"  # it says that it is of a toolkit that no torch was built with
    nvcc.write_text("#!/bin/sh\necho 'release 9.0, V9.0.1'\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "BQNN_CPU": "0", "BQNN_CUDA": switch, "CUDA_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (run.returncode != 0) == (switch == "1")
    assert re.search(message, run.stderr)


@pytest.mark.skipif(TOOLKIT is None, reason="no CUDA toolkit")
def test_architectures_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOOLKIT is not None
    monkeypatch.setenv("BQNN_CUDA_ARCHITECTURES", "")
    assert set(ARCHITECTURES) <= set(TOOLKIT.architectures())
    monkeypatch.setenv("BQNN_CUDA_ARCHITECTURES", "90 80")
    assert TOOLKIT.architectures() == ["80", "90"]
    monkeypatch.setenv("BQNN_CUDA_ARCHITECTURES", "10")
    with pytest.raises(ValueError, match="names compute_10, and .*nvcc knows .*compute_90"):
        TOOLKIT.architectures()
