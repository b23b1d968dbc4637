"""The CUDA toolkit that compiles csrc/cuda: where it is, and its command. Used by setup.py and by the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class Toolkit(NamedTuple):
    """A folder with bin/nvcc and include/, and the release of its compiler, e.g. (13, 0)."""

    home: Path
    release: tuple[int, int]

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")

    def architectures(self) -> list[str]:
        """Those that BQNN_CUDA_ARCHITECTURES names, in order, else those of :data:`ARCHITECTURES` that nvcc knows.

        Raises:
            ValueError: one is named that the compiler does not know.
        """
        known = _output([self.nvcc, "--list-gpu-arch"]).split()
        named = sorted(os.environ.get("BQNN_CUDA_ARCHITECTURES", "").split(), key=int)
        for name in named:
            if f"compute_{name}" not in known:
                knows = f"{self.nvcc} knows {', '.join(known)}"
                raise ValueError(f"BQNN_CUDA_ARCHITECTURES names compute_{name}, and {knows}")
        return named or [name for name in ARCHITECTURES if f"compute_{name}" in known]

    def command(self, source: str, target: str, architectures: list[str], with_ptx: bool) -> list[str]:
        """Compiles ``source`` into the object ``target``; with PTX of the last architecture, for later ones."""
        codes = [(name, f"sm_{name}") for name in architectures]
        if with_ptx:
            codes.append((architectures[-1], f"compute_{architectures[-1]}"))
        targets = [option for name, code in codes for option in ("-gencode", f"arch=compute_{name},code={code}")]
        options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
        return [self.nvcc, *options, *targets, "-c", source, "-o", target]


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME or CUDA_PATH, of the nvcc on PATH, or in /usr/local/cuda; None where there is none."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent.parent if nvcc else None
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), beside, "/usr/local/cuda"):
        # An nvcc on PATH can be a script that calls another: its folder has no headers.
        if home and (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            release = re.search(r"release (\d+)\.(\d+)", _output([str(Path(home) / "bin" / "nvcc"), "--version"]))
            if release:
                return Toolkit(Path(home), (int(release[1]), int(release[2])))
    return None


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
