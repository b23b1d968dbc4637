"""A program on a GPU without the host's time: what it launches is recorded once a batch size, and then replayed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.engine.torch_program import TorchProgram

MOST = 16
"""Batch sizes whose recordings are kept; of others the one that was used last goes first."""
WARM_UPS = 2
"""Calls before a recording: kernels are compiled, layouts made and libraries set up in them."""


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


_one_at_a_time = threading.Lock()
"""torch captures one graph at a time; and what another first call waits for would break a capture off."""


class Replay:
    """A program, called as it is, that a CUDA graph replays from the second call of a batch size on.

    Any number of threads may call it, on any streams of their own: calls take turns. Inside a capture of the caller's
    the program itself runs, and so becomes part of what is captured.
    """

    def __init__(self, program: TorchProgram) -> None:
        self._program = program
        self._turn = threading.Lock()
        self._recordings: OrderedDict[int, _Recording] = OrderedDict()
        self._own: tuple[torch.cuda.Stream, Any] | None = None
        """The stream that recordings are made on, and the pool that they have their memory from."""
        self._done: torch.cuda.Event | None = None
        """When what all recordings share, their memory, is free again."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As the program's."""
        images = len(inputs[0])
        with torch.no_grad(), torch.cuda.device(self._program.device):
            if not images or torch.cuda.is_current_stream_capturing():
                return self._program(inputs)
            with self._turn:
                return self._replayed(images, inputs)

    def __del__(self) -> None:
        if self._done is not None:  # else memory would be given away that a replay still uses
            self._done.synchronize()

    def _replayed(self, images: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream()
        if self._done is not None:
            stream.wait_event(self._done)
        recording = self._recordings.get(images)
        if recording is None:
            with _one_at_a_time:
                recording = self._recordings[images] = self._record(inputs)
            if len(self._recordings) > MOST:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(images)
        for kept, x in zip(recording.inputs, inputs):
            kept.copy_(x)
        recording.graph.replay()
        outputs = [y.clone() for y in recording.outputs]
        self._done = stream.record_event()
        return outputs

    @torch.inference_mode(False)  # later calls, outside of it, write into what is made here
    @torch.no_grad()
    def _record(self, inputs: Sequence[Tensor]) -> _Recording:
        program = self._program
        if self._own is None:
            self._own = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream, pool = self._own
        kept = [program.taken(torch.zeros_like(x)) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        # No mode may send layers another way than they will go; and a capture that fails leaves its stream behind.
        with torch._C.DisableTorchFunction(), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                program(kept)
            # Libraries keep their workspaces for a stream: one in a pool would be gone with the graph that made it.
            torch._C._cuda_clearCublasWorkspaces()
            # Other threads may use the GPU meanwhile: only what this one does is forbidden or recorded.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = program(kept)
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.current_stream().wait_stream(stream)
        return _Recording(graph, kept, outputs)
