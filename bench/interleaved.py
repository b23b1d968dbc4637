"""Times of several calls, taken in turns: what else the machine does then falls on all of them alike.

A round visits every call in a new order. At each visit the call first runs untimed until threads, clock and caches
are its own again, as in a loop of nothing else, and then often enough for the clock to measure. How long all that is
done is a :class:`Pace`; a group may have its own.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from bench.machine import Elsewhere
from bench.summary import Group

LEAST_ROUNDS = 15


class Pace(NamedTuple):
    """The parts of a visit, in seconds where nothing else is said."""

    pause: float = 0.003
    """A sleep comes first: the idle threads of one library spin before they sleep."""
    settle: float = 0.006
    """Untimed calls take so long that the largest weights are in the last cache again."""
    burst: float = 0.006
    """Timed calls take about so long; a longer call is made once."""
    long: float = 0.020
    """A call that takes longer has settled before it ends, and is not made untimed for ``settle``."""
    warm: int = 0
    """So many untimed calls are made whatever they take."""


PACE = Pace()


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], budget: float, pace: Pace = PACE, least_rounds: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Seconds a call of each of ``calls``, one figure a round.

    Args:
        budget: seconds that all rounds together may take; there are at least ``least_rounds`` whatever it says.
        pace: of each visit.
    """
    estimates = {name: _estimate(call, pace) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        rounds = 0
        while rounds < least_rounds or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                times[name].append(_visit(calls[name], estimates[name], pace))
            rounds += 1
    finally:
        gc.enable()
    return times


def _estimate(call: Callable[[], object], pace: Pace) -> float:
    time.sleep(pace.pause)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _visit(call: Callable[[], object], estimate: float, pace: Pace) -> float:
    time.sleep(pace.pause)
    for _ in range(pace.warm):
        call()
    settled = time.perf_counter() + pace.settle
    while estimate < pace.long and time.perf_counter() < settled:
        call()
    repeats = max(1, round(pace.burst / estimate))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class Replay:
    """A timer for pytest-benchmark under which one round after the other takes the seconds that were measured."""

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: list[float] = []
        self._running = False

    def load(self, seconds: list[float]) -> None:
        """Has the next ``len(seconds)`` rounds take so long."""
        self._seconds = seconds[::-1]

    def __call__(self) -> float:
        if self._running:
            self._now += self._seconds.pop()
        self._running = not self._running
        return self._now


class Race:
    """The selected variants of one group: made, checked, and those that are right timed against each other.

    Args:
        pace: of each visit; by default the group's own where it has one, else :data:`PACE`.
    """

    def __init__(
        self,
        group: Group,
        variants: list[str],
        timed: bool,
        pace: Pace | None = None,
        least_rounds: int = LEAST_ROUNDS,
    ) -> None:
        self.name = group.name
        self.failures: dict[str, BaseException] = {}
        self.seconds: dict[str, list[float]] = {}
        self.infos: dict[str, dict[str, Any]] = {}
        self.elsewhere: float | None = None
        """The share of the cores that something else took meanwhile, where times were taken and the system tells."""
        calls: dict[str, Callable[[], object]] = {}
        for variant in variants:
            try:
                call = group.call(variant)
                with torch.inference_mode():
                    output = call()
                self.infos[variant] = group.check(variant, output)
                calls[variant] = call
            except (Exception, pytest.skip.Exception) as failure:
                self.failures[variant] = failure
        if timed and calls:
            elsewhere = Elsewhere()
            with torch.inference_mode():
                own = pace or getattr(group, "pace", PACE)
                self.seconds = interleaved_seconds(calls, group.budget, own, least_rounds)
            self.elsewhere = elsewhere.share()
