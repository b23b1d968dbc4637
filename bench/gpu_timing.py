"""Time and peak memory of calls on a GPU, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

ROUNDS, WARMUP = 30, 5
FLUSH_BYTES = 256 << 20
"""Bytes that are written before each call: more than any second-level cache holds."""


class Cost(NamedTuple):
    """Median seconds, and the most bytes allocated during a call above what was there before it."""

    seconds: float
    peak_bytes: int


def costs(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS) -> dict[str, Cost]:
    """The cost of every call, warm, with cold caches; on the CPU (to try a bench out) time alone."""
    timer = _gpu_seconds if device.type == "cuda" else _cpu_seconds
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    peaks = {name: _peak_bytes(call, device) for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, device=device, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            flush.zero_()
            seconds[name].append(timer(call))
    return {name: Cost(statistics.median(seconds[name]), peaks[name]) for name in calls}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 20), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    found = costs({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.numel() / found.seconds


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _gpu_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
