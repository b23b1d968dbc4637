"""Package metadata and the build of the extension; everything else that is configured stands in pyproject.toml.

What is built:

    BQNN_CPU=0      no CPU kernels: every op runs on the plain PyTorch reference
    BQNN_CPU=1      the CPU kernels of csrc/cpu; the installation fails where they do not compile
    unset           the CPU kernels where torch and a C++ compiler are at hand, else the reference; says which and why

    BQNN_CUDA=0     no CUDA kernels: on a GPU, ops run on Triton or the reference
    BQNN_CUDA=1     the CUDA kernels of csrc/cuda; the installation fails where they can not be built
    unset           the CUDA kernels where torch is a CUDA build and a toolkit of the same major version is at hand
                    (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda), else none; says which and why

Which architectures get CUDA kernels is a matter of the toolkit, never of a visible GPU: those of cuda_toolkit.py that
its compiler knows, and PTX of the newest.
"""

import os
import platform
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_ABI = "0x020a000000000000"  # torch 2.10, the oldest whose stable ABI the bindings use
PYTHON_ABI = "0x030A0000"  # Python 3.10
CUDA = "bqnn._CUDA"
find_toolkit = runpy.run_path(str(ROOT / "cuda_toolkit.py"))["find_toolkit"]


def say(message: str) -> None:
    print(f"bqnn: {message}", file=sys.stderr)


def files_of(folder: str, pattern: str) -> list[str]:
    """The files of ``csrc/<folder>`` and of the folders in it, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).rglob(pattern))


def cpu_extensions() -> list[Extension]:
    if os.environ.get("BQNN_CPU") == "0":
        say("CPU kernels skipped: BQNN_CPU=0")
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        if os.environ.get("BQNN_CPU") == "1":
            raise
        say("CPU kernels skipped: torch is not in the build environment (pip install --no-build-isolation)")
        return []
    bindings = [f"csrc/bindings/{name}.cpp" for name in ("training", "packed", "engine")]
    sources = [*bindings, *files_of("cpu", "*.cpp")]
    return [
        Extension(
            "bqnn._C",
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
        return "torch is not in the build environment (pip install --no-build-isolation)"
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
        if os.environ.get("BQNN_CUDA") == "1":
            raise RuntimeError(f"BQNN_CUDA=1, and {obstacle}")
        say(f"CUDA kernels skipped: {obstacle}")
        return []
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


class BuildOrSkip(build_ext):
    """Builds the extensions; where that fails and was not demanded, says why and installs without it."""

    def build_extensions(self) -> None:
        compile_cpp = self.compiler.compile

        def compile_one(source: str, output_dir: str, *args: Any, **kwargs: Any) -> list[str]:
            if source.endswith(".cu"):
                return [compile_cuda(source, output_dir)]
            return compile_cpp([source], output_dir, *args, **kwargs)

        def compile_all(sources: list[str], output_dir: str, *args: Any, **kwargs: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one(source, output_dir, *args, **kwargs), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        kind, switch = ("CUDA", "BQNN_CUDA") if ext.name == CUDA else ("CPU", "BQNN_CPU")
        try:
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get(switch) == "1":
                raise
            say(f"{kind} kernels skipped, other backends will run instead: {error}")
            ext.optional = True
        else:
            built_for = ", ".join(find_toolkit().architectures()) if ext.name == CUDA else platform.machine()
            say(f"{kind} kernels built for {built_for}")


def compile_cuda(source: str, output_dir: str) -> str:
    target = Path(output_dir) / Path(source).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    toolkit = find_toolkit()
    subprocess.run(toolkit.command(source, str(target), toolkit.architectures(), with_ptx=True), cwd=ROOT, check=True)
    return str(target)


setup(
    name="bqnn",
    version=runpy.run_path(str(ROOT / "bqnn" / "_version.py"))["__version__"],
    description="Bayesian asymmetric M-ary quantized networks for PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    ext_modules=[*cpu_extensions(), *cuda_extensions()],
    cmdclass={"build_ext": BuildOrSkip},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    packages=[*find_packages(include=["bqnn", "bqnn.*"]), "bqnn.kernels"],
    package_dir={"bqnn.kernels": "kernels"},
    package_data={"bqnn": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "torchvision",  # each release asks for its own torch
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "filelock>=3.13",
        "platformdirs>=3.0",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",  # the digits data set
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5"],
        # rivals; onnxscript exports a network for ONNX Runtime, and nncf quantizes one for OpenVINO
        "bench": ["onnx>=1.17", "onnxruntime>=1.23", "onnxscript>=0.5", "openvino>=2025.3", "nncf>=2.18"],
        "dev": ["ruff>=0.12", "mypy>=1.15"],
    },
    entry_points={
        "console_scripts": ["bqnn = bqnn.cli.main:main"],
        "torch_dynamo_backends": ["bqnn = bqnn.engine.dynamo:backend"],
    },
)
