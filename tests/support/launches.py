"""A stand-in for the launches of Triton's kernels, and for the GPU that they are made on: everything up to the launch
is done as it would be there, on CPU tensors, and no element of an output is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
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


@contextmanager
def launches_stand_in(capability: int = CAPABILITY) -> Iterator[list[str]]:
    """Launches do nothing but note the names of their kernels, which the context gives."""
    done: list[str] = []

    def note(self: Any, *arguments: Any, **keywords: Any) -> None:
        done.append(self.fn.__name__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        patch.setattr(driver, "_active", Driver(capability))
        yield done


@contextmanager
def gpu_stands_in() -> Iterator[list[str]]:
    """The backend "triton" serves CPU tensors too, before all others, and cuts its work up as for an H200; packed
    layers multiply codes. Codes are right, since what packs them looks at them. Gives the names of the kernels that are
    launched."""
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
        dispatch._candidates.cache_clear()
        try:
            yield done
        finally:
            patch.undo()
            dispatch._candidates.cache_clear()
