"""A program on a GPU without the host's time: what it launches is recorded once a batch size, and then replayed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

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


class Replay:
    """A program, called as it is, that a CUDA graph replays from the second call of a batch size on.

    Any number of threads may call it, on any streams of their own: calls take turns. Inside a capture of the caller's
    the program itself runs, and so becomes part of what is captured.
    """

    def __init__(self, program: TorchProgram) -> None:
        self._program = program
        self._turn = threading.Lock()
        self._recordings: OrderedDict[int, _Recording] = OrderedDict()
        self._done: torch.cuda.Event | None = None
        """When what all recordings share, their memory, is free again."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As the program's."""
        images = len(inputs[0])
        if not images or torch.cuda.is_current_stream_capturing():
            return self._program(inputs)
        with self._turn, torch.no_grad(), torch.cuda.device(self._program.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            recording = self._recordings.get(images)
            if recording is None:
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
        kept = [program.taken(torch.zeros_like(x)) for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                program(kept)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        others = next(iter(self._recordings.values()), None)
        # Other threads may use the GPU meanwhile: only what this one does is forbidden or recorded.
        with torch.cuda.graph(
            graph, pool=None if others is None else others.graph.pool(), capture_error_mode="thread_local"
        ):
            outputs = program(kept)
        return _Recording(graph, kept, outputs)
