"""Compiles what a launcher would launch, for a GPU that is not here: registers, spills, shared memory and PTX of it.

What a kernel is compiled of is known before it is compiled, in a thousandth of the time, and says by a digest whether a
table of compiled kernels still tells what the compiler would give.

Triton asks its driver for a device and a target and nothing else until a kernel is loaded, so a stand-in that names a
target is enough for everything up to the cubin. Launchers run as they are, on CPU tensors, and launch nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

INSTRUCTION_BYTES = 16
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block can ask for (CUDA C++ Programming Guide, technical specifications)."""
TARGETS = tuple(SHARED_LIMIT)
TABLE = Path(__file__).resolve().parents[2] / "bench" / "results" / "kernel_resources.json"


class Kernel(NamedTuple):
    """What a compiled kernel takes; ``local`` and ``stack`` are bytes a thread: not 0 where registers were spilled."""

    name: str
    registers: int
    local: int
    stack: int
    shared: int
    instructions: int
    products: str
    """The tensor core instructions in its PTX: "tcgen05", "wgmma", "mma" or ""."""


_UNCOMPILED = 1000
"""Added to a capability it gives the number of a GPU for which nothing is ever compiled."""


class Driver:
    """Stands for the driver of a GPU of ``capability``, whose number is the capability: caches are kept by number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability % _UNCOMPILED
        self.device = capability

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _recorded(capability: int) -> Iterator[list[Any]]:
    kernels: list[Any] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # The kernel is not handed on, so that nobody launches it.
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    run, before = JITFunction.run, driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", Driver(capability))
        yield kernels
    assert driver._active is before


def sources(call: Callable[[], Any], capability: int) -> list[str]:
    """A digest of the source of each kernel that :func:`compiled` would give, in the same order: of the code, the types
    and constants of the arguments, and the options. With one version of Triton, equal sources give equal kernels."""
    digests: dict[str, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        parts = {name: compile[name] for name in ("signature", "constants", "configs")}
        # A library is a path, which depends on where Triton is installed.
        parts |= {"code": fn.jit_function.cache_key, "options": {**options, "extern_libs": None}}
        digests[hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]] = None
        return True  # it is not compiled

    with _recorded(_UNCOMPILED + capability), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
        call()
    return list(digests)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _has_nested_tuple(signature: dict[str, Any]) -> bool:
    """Whether an argument is a tuple of tuples, of which Triton 3.6 loses what is 1 in a loop."""
    tuples = [argument for argument in signature.values() if isinstance(argument, tuple)]
    return any(isinstance(field, tuple) for fields in tuples for field in fields)


def _describe(kernel: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [_tool("cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    assert not _has_nested_tuple(kernel.src.signature), f"{kernel.name} takes a tuple of tuples"
    assert not re.search(r"\btrap;", ptx), f"{kernel.name}: the compiler found no way to run it"
    assert not re.search(r"\b(atom|red)\.", ptx), f"{kernel.name} adds up in an order that is left to chance"
    found = re.search(r"\b(tcgen05)\.mma|\b(wgmma)\.mma_async|\b(mma)\.sync", ptx)
    products = found[found.lastindex] if found else ""
    instructions = _code_bytes(kernel.asm["cubin"]) // INSTRUCTION_BYTES
    shared = kernel.metadata.shared
    return Kernel(kernel.name, count["REG"], count["LOCAL"], count["STACK"], shared, instructions, products)


def _code_bytes(cubin: bytes) -> int:
    """The size of the code in an ELF file of 64 bits: of its sections .text.<kernel>. A disassembly takes seconds."""
    (table,), (entry, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    first_name = sections[names][4]
    return sum(size for name, *_, size in sections if cubin.startswith(b".text.", first_name + name))


def compiled(call: Callable[[], Any], capability: int) -> list[Kernel]:
    """The kernels that ``call()``, which runs launchers on CPU tensors, would launch on a GPU of ``capability``."""
    with _recorded(capability) as kernels, torch.no_grad():
        call()
    distinct = {id(kernel): kernel for kernel in kernels}
    return [_describe(kernel) for kernel in distinct.values()]
