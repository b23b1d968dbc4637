"""What the stages of ``make gpu`` leave: rows, each a measurement or an answer, and the figures asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.gpu_timing import Cost


class Row(NamedTuple):
    """One variant of one case. The fields of :class:`bench.gpu_timing.Cost` are None where nothing was measured."""

    case: str
    variant: str
    seconds: float | None = None
    graph_seconds: float | None = None
    host_seconds: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    """The distance of its result from the reference's."""
    weight_bytes: int | None = None
    """Bytes of the weight, or of what is copied, where they count."""
    said: str = ""
    """The answer of what is no measurement, or what a measurement lacks and why."""
    failed: bool = False

    @property
    def best_seconds(self) -> float | None:
        """Of the device, as it is used best: in a graph where there is one."""
        found = [each for each in (self.graph_seconds, self.seconds) if each is not None]
        return min(found, default=None)


def measured(case: str, variant: str, cost: Cost, error: float | None = None, weight_bytes: int | None = None) -> Row:
    """The row of a measurement."""
    times = cost.seconds, cost.graph_seconds, cost.host_seconds, cost.peak_bytes
    return Row(case, variant, *times, error, weight_bytes, cost.said)


class Asked(NamedTuple):
    """How many times faster, and smaller in peak memory, than a variant the kernels shall be."""

    rival: str
    faster: float
    smaller: float | None = None


class Task(NamedTuple):
    """A part of a stage that is done as a whole: its name, which no other has, and what makes its rows."""

    name: str
    run: Callable[[], Iterable[Row]]


class Unfinished(Exception):
    """A task has to go on in a later call; the message says how far it came."""
