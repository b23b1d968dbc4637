"""The build of the extensions; what the package is and needs stands in pyproject.toml.

What is built:

    BQNN_CPU=0      no CPU kernels: every op runs on the plain PyTorch reference
    BQNN_CPU=1      the CPU kernels of csrc/cpu; the installation fails where they do not compile
    unset           the CPU kernels where torch and a C++ compiler are at hand, else the reference; says which and why

    BQNN_CUDA=0     no CUDA kernels: on a GPU, ops run on Triton or the reference
    BQNN_CUDA=1     the CUDA kernels of csrc/cuda; the installation fails where they can not be built
    unset           the CUDA kernels where torch is a CUDA build and a toolkit of the same major version is at hand
                    (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda), else none; says which and why

    MAX_JOBS=n      how many files are compiled at a time; by default as many as there are processors

Which architectures get CUDA kernels is a matter of the toolkit, never of a visible GPU: those of cuda_toolkit.py that
its compiler knows, and PTX of the newest. BQNN_CUDA_ARCHITECTURES="80 90" names others, which takes less time.

"torch" is that of the build environment. pip makes one with the newest torch, unless it is called with
--no-build-isolation. The bindings keep to the ABI of torch 2.10 and Python 3.10, so that what is built with one torch
runs with all from there on; CUDA kernels run with those of the same major version of CUDA.

What became of each extension is written beside it, into bqnn/_build.json, and is what `bqnn.backends()` says of one
that is not there: pip shows none of these messages unless it is called with -v. A wheel with an extension is tagged
for its platform, and one without any is pure.
"""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_ABI = "0x020a000000000000"  # torch 2.10, the oldest whose stable ABI the bindings use
PYTHON_ABI = "0x030A0000"  # Python 3.10
CPU, CUDA = "bqnn._C", "bqnn._CUDA"
KINDS = {CPU: "CPU", CUDA: "CUDA"}
RECORD = "_build.json"  # what bqnn/core/native.py reads
NO_TORCH = "torch is not in the build environment"
find_toolkit = runpy.run_path(str(ROOT / "cuda_toolkit.py"))["find_toolkit"]

skipped: dict[str, str] = {}
"""Why there is no extension, of those that are not built."""


def say(message: str) -> None:
    print(f"bqnn: {message}", file=sys.stderr)


def demanded(extension: str) -> bool:
    return os.environ.get(f"BQNN_{KINDS[extension]}") == "1"


def skip(extension: str, reason: str) -> list[Extension]:
    if demanded(extension):
        raise RuntimeError(f"BQNN_{KINDS[extension]}=1, and {reason}")
    skipped[extension] = reason
    say(f"{KINDS[extension]} kernels skipped: {reason}")
    return []


def files_of(folder: str, pattern: str) -> list[str]:
    """The files of ``csrc/<folder>`` and of the folders in it, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).rglob(pattern))


def cpu_extensions() -> list[Extension]:
    if os.environ.get("BQNN_CPU") == "0":
        return skip(CPU, "BQNN_CPU=0")
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        return skip(CPU, NO_TORCH)
    bindings = [f"csrc/bindings/{name}.cpp" for name in ("training", "packed", "engine")]
    sources = [*bindings, *files_of("cpu", "*.cpp")]
    return [
        Extension(
            CPU,
            sources,
            depends=[*files_of("bindings", "*.h"), *files_of("cpu", "*.h"), *files_of("cpu", "*.inl")],
            include_dirs=[str(ROOT / "csrc"), *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", PYTHON_ABI)],
            # Without contraction an expression has one value whatever the instruction set.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-g0",
                "-Wall",
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
            ],
            py_limited_api=True,
        )
    ]


def cuda_obstacle() -> str:
    """Why CUDA kernels are not built; empty where nothing is in the way."""
    if os.environ.get("BQNN_CUDA") == "0":
        return "BQNN_CUDA=0"
    try:
        import torch
    except ImportError:
        return NO_TORCH
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    toolkit = find_toolkit()
    if toolkit is None:
        return "there is no CUDA toolkit; CUDA_HOME would name its folder"
    major, minor = toolkit.release
    if major != int(torch.version.cuda.split(".")[0]):
        return f"the toolkit in {toolkit.home} is of CUDA {major}.{minor} and torch of {torch.version.cuda}"
    return ""


def cuda_extensions() -> list[Extension]:
    obstacle = cuda_obstacle()
    if obstacle:
        return skip(CUDA, obstacle)
    from torch.utils.cpp_extension import include_paths, library_paths

    toolkit = find_toolkit()
    headers = [*files_of("cuda", "*.h"), *files_of("cuda", "*.cuh")]
    return [
        Extension(
            CUDA,
            ["csrc/bindings/cuda.cpp", *files_of("cuda", "*.cu")],
            depends=["cuda_toolkit.py", *headers],
            include_dirs=[str(ROOT / "csrc"), *include_paths(), str(toolkit.home / "include")],
            library_dirs=[*library_paths(), str(toolkit.home / "lib64")],
            libraries=["torch_cpu", "torch_cuda", "c10", "cudart"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", PYTHON_ABI), ("USE_CUDA", None)],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", "-g0", "-Wall"],
            py_limited_api=True,
        )
    ]


class WithExtensions(Distribution):
    """Runs build_ext even where nothing is left to build, for the record that it writes."""

    def has_ext_modules(self) -> bool:
        return True


class BuildOrSkip(build_ext):
    """Builds the extensions; where that fails and was not demanded, says why and installs without it."""

    def run(self) -> None:
        super().run()
        folder = Path(self.get_ext_fullpath(CPU)).parent  # in the source tree for an editable installation
        folder.mkdir(parents=True, exist_ok=True)
        for extension in skipped:  # one of an earlier build would be installed in its place
            for old in folder.glob(f"{extension.rpartition('.')[2]}.*"):
                old.unlink()
        record = {extension: skipped.get(extension, "") for extension in KINDS}
        torch = getattr(sys.modules.get("torch"), "__version__", "")  # where something is built it has been imported
        (folder / RECORD).write_text(json.dumps({"skipped": record, "torch": torch}, indent=1) + "\n")

    def build_extensions(self) -> None:
        compile_cpp = self.compiler.compile

        def compile_one(source: str, output_dir: str, *args: Any, **kwargs: Any) -> list[str]:
            if source.endswith(".cu"):
                return [compile_cuda(source, output_dir)]
            return compile_cpp([source], output_dir, *args, **kwargs)

        def compile_all(sources: list[str], output_dir: str, *args: Any, **kwargs: Any) -> list[str]:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = pool.map(lambda source: compile_one(source, output_dir, *args, **kwargs), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if demanded(ext.name):
                raise
            say(str(error))
            skip(ext.name, self.missing_compiler() or "they did not compile, and pip's option -v shows why")
            ext.optional = True
        else:
            built_for = ", ".join(find_toolkit().architectures()) if ext.name == CUDA else platform.machine()
            say(f"{KINDS[ext.name]} kernels built for {built_for}")

    def missing_compiler(self) -> str:
        """That there is no C++ compiler; empty where there is one, or where the system knows it by no command."""
        command = getattr(self.compiler, "compiler_cxx", None)
        return "" if not command or shutil.which(command[0]) else f"no C++ compiler was found ({command[0]})"


class WheelOfWhatWasBuilt(bdist_wheel):
    """Tags the wheel by what it holds, which is known after the build alone."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = skipped.keys() == KINDS.keys()
        return super().get_tag()


def compile_cuda(source: str, output_dir: str) -> str:
    target = Path(output_dir) / Path(source).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    toolkit = find_toolkit()
    subprocess.run(toolkit.command(source, str(target), toolkit.architectures(), with_ptx=True), cwd=ROOT, check=True)
    return str(target)


setup(
    distclass=WithExtensions,
    ext_modules=[*cpu_extensions(), *cuda_extensions()],
    cmdclass={"build_ext": BuildOrSkip, "bdist_wheel": WheelOfWhatWasBuilt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    packages=[*find_packages(include=["bqnn", "bqnn.*"]), "bqnn.kernels"],
    py_modules=["bqnn_command"],
    package_dir={"bqnn.kernels": "kernels"},
    package_data={"bqnn": ["py.typed", "recipes/*.toml", "view/templates/*"]},
)
