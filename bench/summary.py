"""The closing table of `make bench`: medians and ratios, shares of the machine's limits, and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from bench.machine import known_limits

CELL, NAME = 19, 34
DISTURBED = 0.03
"""The share of the cores that may go elsewhere before a group's ratios are in doubt."""


class Group(Protocol):
    """Variants that are compared with each other: one problem, one input."""

    name: str
    """ "family, condition": groups of one family stand in one table, a column each."""
    budget: float
    """Seconds for all rounds together."""

    def call(self, variant: str) -> Callable[[], object]:
        """What is timed."""

    def check(self, variant: str, output: Any) -> dict[str, Any]:
        """Raises AssertionError where ``output`` is wrong; returns what is kept beside the times."""


class Measured(NamedTuple):
    """A variant's median seconds, what its check returned, and the share of the cores that something else took."""

    group: str
    variant: str
    seconds: float
    info: dict[str, Any]
    elsewhere: float | None = None


class Verdict(NamedTuple):
    """A figure that is asked, and the one that was measured; the larger, the better."""

    text: str
    asked: float
    measured: float

    @property
    def met(self) -> bool:
        return self.measured >= self.asked

    def __str__(self) -> str:
        verdict = "met" if self.met else "NOT MET"
        return f"{self.text:<78} asked {self.asked:>6.2f}  measured {self.measured:>6.2f}  {verdict}"


Medians = dict[str, dict[str, float]]
"""Seconds, by group and variant."""


def times_faster(group: dict[str, float], ours: Iterable[str], rivals: Iterable[str]) -> float | None:
    """How many times faster the fastest of ``ours`` is than the fastest of ``rivals``; None where one side is empty."""
    mine, theirs = ([group[name] for name in names if name in group] for names in (ours, rivals))
    return min(theirs) / min(mine) if mine and theirs else None


def fastest(group: dict[str, float], names: Iterable[str]) -> str:
    """The fastest of ``names`` in ``group``."""
    return min((name for name in names if name in group), key=group.__getitem__)


def write_summary(reporter: Any, module: ModuleType, rows: list[Measured]) -> None:
    """Writes all of it for the groups of one bench module.

    The module has BASELINES, names of variants, whose fastest the ratios refer to, and may have
    ``claims(medians) -> Iterator[Verdict]``.
    """
    families: dict[str, list[Measured]] = {}
    for row in rows:
        families.setdefault(row.group.split(", ")[0], []).append(row)
    for family, members in families.items():
        reporter.write_sep(
            "-", f"{family}: median ms, and in brackets times faster than {' or '.join(module.BASELINES)}"
        )
        for line in _ratios(members, module.BASELINES):
            reporter.write_line(line)
        for line in _shares(members):
            reporter.write_line(line)
        disturbed = {row.group: row.elsewhere for row in members if (row.elsewhere or 0.0) > DISTURBED}
        for group, share in disturbed.items():
            reporter.write_line(f"NOT ALONE: something else took {share:.0%} of the cores during {group}", red=True)
    verdicts = list(module.claims(_medians(rows))) if hasattr(module, "claims") else []
    if verdicts:
        met = sum(verdict.met for verdict in verdicts)
        reporter.write_sep("-", f"{module.__name__}: {met} of {len(verdicts)} figures met")
        for verdict in verdicts:
            reporter.write_line(str(verdict))


def _medians(rows: list[Measured]) -> Medians:
    medians: Medians = {}
    for row in rows:
        medians.setdefault(row.group, {})[row.variant] = row.seconds
    return medians


def _grid(rows: list[Measured], cell: Callable[[Measured], str]) -> Iterator[str]:
    columns = list(dict.fromkeys(row.group for row in rows))
    yield " " * NAME + "".join(f"{group.split(', ', 1)[-1]:>{CELL}}" for group in columns)
    cells = {(row.variant, row.group): cell(row) for row in rows}
    for variant in dict.fromkeys(row.variant for row in rows):
        line = "".join(f"{cells.get((variant, group), '-'):>{CELL}}" for group in columns)
        yield f"{variant:<{NAME}}{line}"


def _ratios(rows: list[Measured], baselines: tuple[str, ...]) -> Iterator[str]:
    medians = _medians(rows)

    def cell(row: Measured) -> str:
        ratio = times_faster(medians[row.group], [row.variant], baselines)
        return f"{1e3 * row.seconds:.4g}" + (f" {f'({ratio:.2f})':>8}" if ratio else " " * 9)

    yield from _grid(rows, cell)


def _shares(rows: list[Measured]) -> Iterator[str]:
    """Weight bytes and operations a second, and the share of this machine's limits, where a check gave the numbers."""
    limits = known_limits()
    ours = [row for row in rows if "packed_bytes" in row.info]
    if not ours:
        return

    def cell(row: Measured) -> str:
        n_bytes, operations, precision = (row.info[key] for key in ("packed_bytes", "operations", "precision"))
        share = "-" if limits is None else f"{limits.share(n_bytes, operations, precision, row.seconds):.0%}"
        return f"{1e-9 * n_bytes / row.seconds:.3g} {1e-12 * operations / row.seconds:.2f} {share:>4}"

    yield "GB/s of packed weight, TFLOP/s, share of the machine's limit:"
    yield from _grid(ours, cell)
    distant = [row for row in ours if "distance" in row.info]
    if distant:
        yield "relative distance to the exact product:"
        yield from _grid(distant, lambda row: f"{row.info['distance']:.2g}")
