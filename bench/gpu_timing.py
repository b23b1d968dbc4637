"""What calls on a GPU cost: the device's time, as they come and as a CUDA graph, the host's time, and peak memory.

A GPU that waits for its host is no measure of a kernel. So the device's time is taken with the queue filled before: the
GPU sleeps while the host hands it the calls, and then works through them without a gap. What the host takes for a call
is a figure of its own. Inputs take turns, so that no call finds its own in the second-level cache.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ROUNDS, WARMUP = 15, 3
SECONDS = 20.0
"""After so many seconds no further round of a case is begun."""
ROTATED_BYTES = 256 << 20
"""Bytes of what takes turns: several times what a second-level cache holds."""
MOST_COPIES = 50
QUEUED_SECONDS = 3e-3
"""The host may spend so long on handing over the calls of one measurement: a queue holds about a thousand launches."""
GRAPH_CALLS = 10
"""A graph has at least so many calls, of which each then bears a share of what it takes to start one."""
SAID = 300
"""Characters of an error that are kept."""
CYCLES = 2e9
"""Cycles that a GPU's clock does not exceed in a second."""

Call = Callable[[], object]


class Cost(NamedTuple):
    """Medians of one call; None where nothing was measured."""

    seconds: float | None = None
    """Of the device, the queue filled before."""
    graph_seconds: float | None = None
    """Of the device, as a part of a CUDA graph."""
    host_seconds: float | None = None
    """Of the host, until it has handed the call over."""
    peak_bytes: int | None = None
    """Allocated during the call, above what was there before it."""
    said: str = ""
    """Why there is no graph, where there is none."""


class Meter(Protocol):
    """What benches are given to measure with."""

    device: torch.device

    def costs(self, variants: Mapping[str, Sequence[Call]]) -> dict[str, Cost]:
        """The cost of every variant, which is one call for each of the inputs that take turns. A variant that raises
        has no times, and says why; where all do, so does this."""
        ...

    def copies(self, n_bytes: float) -> int:
        """How many inputs of so many bytes take turns."""
        ...

    def distance(self, found: Iterable[Tensor], expected: Iterable[Tensor]) -> float | None:
        """The greatest relative root mean square difference; None where nothing was computed."""
        ...

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """By torch.compile."""
        ...


class GpuMeter:
    """Measures on a GPU; variants in turns, so that what happens to its clock happens to all of them."""

    def __init__(self, device: torch.device, rounds: int = ROUNDS, seconds: float = SECONDS) -> None:
        self.device, self._rounds, self._seconds = device, rounds, seconds

    def copies(self, n_bytes: float) -> int:
        return max(1, min(MOST_COPIES, math.ceil(ROTATED_BYTES / n_bytes)))

    def distance(self, found: Iterable[Tensor], expected: Iterable[Tensor]) -> float | None:
        return max(relative_distance(a, b) for a, b in zip(found, expected, strict=True))

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function)

    def costs(self, variants: Mapping[str, Sequence[Call]]) -> dict[str, Cost]:
        runs: dict[str, _Variant] = {}
        found: dict[str, Cost] = {}
        for name, calls in variants.items():
            try:
                runs[name] = _Variant(calls)
            except Exception as error:  # the others are still worth their time
                if len(found) + 1 == len(variants):
                    raise
                found[name] = Cost(said=f"{type(error).__name__}: {error}"[:SAID])
        end = time.monotonic() + self._seconds
        for i in range(self._rounds):
            if i > 2 and time.monotonic() > end:
                break
            for run in runs.values():
                run.measure()
        found |= {name: run.cost() for name, run in runs.items()}
        return {name: found[name] for name in variants}


class _Variant:
    """A variant's calls, warm and captured, and the times that were taken of them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._next = calls, 0
        for _ in range(max(WARMUP, len(calls))):
            self._run(1)
        self._peak = _peak_bytes(lambda: self._run(1))
        self._host = [self._host_seconds() for _ in range(WARMUP)]
        self._burst = max(1, min(MOST_COPIES, int(QUEUED_SECONDS / min(self._host))))
        self._in_graph = max(len(calls), GRAPH_CALLS)
        self._graph, self._said = _captured(lambda: self._run(self._in_graph))
        self._eager: list[float] = []
        self._replayed: list[float] = []

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._calls[self._next % len(self._calls)]()
            self._next += 1

    def measure(self) -> None:
        self._host.append(self._host_seconds())
        self._eager.append(_queued_seconds(lambda: self._run(self._burst), self._burst * self._host[-1]) / self._burst)
        if self._graph is not None:
            self._replayed.append(_queued_seconds(self._graph.replay, 1e-3) / self._in_graph)

    def cost(self) -> Cost:
        replayed = statistics.median(self._replayed) if self._replayed else None
        return Cost(statistics.median(self._eager), replayed, statistics.median(self._host), self._peak, self._said)

    def _host_seconds(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._run(1)
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """The root mean square difference, relative to the expected one's."""
    scale = expected.detach().double().square().mean().sqrt().clamp(min=1e-30)
    return float((found.detach().double() - expected.detach().double()).square().mean().sqrt() / scale)


def _queued_seconds(run: Call, host_seconds: float) -> float:
    """Seconds of the device, which sleeps until the host, in ``host_seconds``, has handed ``run`` over."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(CYCLES * (1.5 * host_seconds + 1e-4)))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(call: Call) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """The call as a CUDA graph; or none, and why."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # whatever a variant does that no graph can hold is an answer, not a failure
        torch.cuda.synchronize()
        return None, f"no graph: {type(error).__name__}: {error}"[:SAID]
    return graph, ""


class DryMeter:
    """Runs every call once, on the CPU, and measures nothing: to see that a bench comes to its end."""

    device = torch.device("cpu")

    def costs(self, variants: Mapping[str, Sequence[Call]]) -> dict[str, Cost]:
        for calls in variants.values():
            for call in calls:
                call()
        return dict.fromkeys(variants, Cost())

    def copies(self, n_bytes: float) -> int:
        return 2

    def distance(self, found: Iterable[Tensor], expected: Iterable[Tensor]) -> float | None:
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.shape}, {a.dtype} for {b.shape}, {b.dtype}"
        return None

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return function
