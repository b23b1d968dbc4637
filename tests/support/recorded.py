"""A stand-in for CUDA graphs on the CPU: what is captured is written down op by op, and a replay runs it again into the
same memory, so that whatever the host has decided since the capture changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph."""

    made: list[Recorded] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.replays = 0
        self.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """Stands for a stream, and for an event on one."""

    waited: list[Any] = []  # noqa: RUF012

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None:
        pass


@contextmanager
def graphs_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Within it torch.cuda records on the CPU; gives the graphs that are made."""
    inside = threading.local()

    @contextmanager
    def graph(recorded: Recorded, **options: Any) -> Iterator[None]:
        inside.capturing = True
        with recorded:
            yield
        inside.capturing = False

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "made", [])
        patch.setattr(Stream, "waited", [])
        patch.setattr(torch.cuda, "CUDAGraph", Recorded)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(inside, "capturing", False))
        yield Recorded.made
