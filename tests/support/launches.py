"""A stand-in for the launches of Triton's kernels, and for the GPU that they are made on: everything up to the launch
is done as it would be there, on CPU tensors, and no element of an output is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bqnn.kernels import conv2d, launch
from bqnn.ops import dispatch
from bqnn.packed import base
from bqnn.packed.cost import ALWAYS
from tests.support.aot import Driver

CAPABILITY, PROCESSORS = 90, 132
"""Of an H200."""


_NUMBERS = 2000
"""Added to a capability it gives the number of a GPU whose kernels do nothing: caches are kept by number."""


class _Gpu(Driver):
    """The driver of such a GPU; it knows what was launched."""

    def __init__(self, capability: int) -> None:
        super().__init__(_NUMBERS + capability)
        self.launched: list[Launched] = []
        self.keeps_arguments = False


class Memory(NamedTuple):
    """What a kernel knows of a tensor; the tensor itself is not kept, since tests count what is."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


def _given(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Memory(argument.data_ptr(), argument.dtype, argument.shape, argument.stride())
    return tuple(map(_given, argument)) if isinstance(argument, tuple) else argument


class Launched(str):
    """The name of a kernel that was launched, and where that is asked for its grid and what it was given, constants
    included."""

    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]

    def numbers(self) -> Any:
        """All that is known when it is launched, and not in memory: what a graph would keep but for addresses."""
        return str(self), self.grid, _without_addresses(self.arguments)


def _without_addresses(argument: Any) -> Any:
    if isinstance(argument, Memory):
        return argument[1:]
    assert argument is None or isinstance(argument, (bool, int, float, str, tuple)), f"{argument!r} is a new kind"
    return tuple(map(_without_addresses, argument)) if isinstance(argument, tuple) else argument


class _Kernel:
    """A compiled kernel, as JITFunction.run looks at one, that notes when it is launched."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str) -> None:
        self._name = name

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, columns: int, rows: int, layers: int, *arguments: Any) -> None:
        done = Launched(self._name)
        if driver.active.keeps_arguments:
            # Before them are the stream, the function, two of metadata and two hooks.
            done.grid, done.arguments = (columns, rows, layers), _given(arguments[6:])
        driver.active.launched.append(done)


@contextmanager
def launches_stand_in(capability: int = CAPABILITY) -> Iterator[list[Launched]]:
    """Kernels are bound, looked up and launched as ever, but none is compiled, and one that is launched does nothing
    but note its name; the names, each a :class:`Launched`, are what the context gives."""

    def compile_nothing(self: Any, key: Any, signature: Any, device: int, *others: Any) -> _Kernel:
        kernel = self.device_caches[device][0][key] = _Kernel(self.fn.__name__)
        return kernel

    gpu = _Gpu(capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", compile_nothing)
        patch.setattr(driver, "_active", gpu)
        yield gpu.launched


@contextmanager
def gpu_stands_in(keeps_arguments: bool = False) -> Iterator[list[Launched]]:
    """The backend "triton" serves CPU tensors too, before all others, and cuts its work up as for an H200; packed
    layers multiply codes. Codes are right, since what packs them looks at them. Gives the names of the kernels that are
    launched; with ``keeps_arguments`` each has its arguments, which takes longer than the launch."""
    backends = dispatch._backends["assign_codes"]

    def usable(device_type: str) -> dispatch.Status:
        return dispatch.Status(True, "")

    def assign(call: Any) -> Tensor:
        backends["triton"].run(call)
        return backends["reference"].run(call)

    with launches_stand_in() as done, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_triton_status", usable)
        patch.setitem(
            dispatch._backends, "assign_codes", {**backends, "triton": backends["triton"]._replace(run=assign)}
        )
        patch.setattr(base, "packed_rows", lambda *arguments: ALWAYS)
        for module in (launch, conv2d):
            patch.setattr(module, "processors", lambda device: PROCESSORS)
        driver.active.keeps_arguments = keeps_arguments
        dispatch._candidates.cache_clear()
        try:
            yield done
        finally:
            patch.undo()
            dispatch._candidates.cache_clear()
