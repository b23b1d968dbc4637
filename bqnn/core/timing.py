"""Medians of measured times: of one call, and of several that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median of ``repeats`` timed calls after two that are not timed; a GPU is synchronised around each."""
    return statistics.median(seconds_of(call, device, repeats))


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for repeat in range(repeats + 2):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return times


TIMING_REPEATS = 15


def measure_side_by_side(
    nets: Sequence[Callable[[Tensor], Tensor]], x: Tensor, repeats: int = TIMING_REPEATS
) -> list[float]:
    """The median seconds of each network's forward pass on ``x``, on the CPU.

    The networks take turns, so that what else the machine does falls on all of them alike; two rounds go before, for
    what is done once.
    """
    times: list[list[float]] = [[] for _ in nets]
    with torch.inference_mode():
        for _ in range(repeats + 2):
            for net, row in zip(nets, times, strict=True):
                started = time.perf_counter()
                net(x)
                row.append(time.perf_counter() - started)
    return [statistics.median(row[2:]) for row in times]
