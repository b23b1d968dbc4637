"""What the rows of ``make gpu`` say of the figures that are asked, and a line for each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench import gpu_packed, gpu_training
from bench.gpu_record import BEGUN, DONE, FAILED, Record
from bench.gpu_rows import Asked, Row, Task
from bench.gpu_stages import Plan
from bench.summary import Verdict

KL_BYTES = 24
"""Bytes of memory traffic a weight: two parameters are read in forward and in backward, two gradients are written."""
KL_BANDWIDTH = 0.7
"""The share of a copy's bandwidth that is asked of the divergence."""
KL_KEPT = 8.5
"""Bytes a weight that a step may hold at most: two gradients, and the sums of blocks of weights."""


def asked_of(case: str) -> list[Asked]:
    """Those of the longest name in ASKED that the case begins with."""
    names = [name for name in gpu_training.ASKED if case.startswith(name)]
    return gpu_training.ASKED[max(names, key=len)] if names else []


def verdicts(rows: Sequence[Row], ours: str, bandwidth: float | None, plan: Plan) -> Iterator[Verdict | str]:
    """Of each figure that is asked; a line instead where a result is too far off to have one."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.variant] = row
    for case, variants in by_case.items():
        own = variants.get(ours)
        if own is None or own.best_seconds is None:
            continue
        if own.error is not None and not own.error <= gpu_training.ALLOWED:
            if asked_of(case):
                yield f"{case}: no figure, the result is {own.error:.2g} away from the reference's"
            continue
        yield from _of_training(case, own, variants)
        if case.startswith("spike_slab_kl"):
            if bandwidth:
                share = KL_BYTES * plan.divergence_weights / own.best_seconds / bandwidth
                yield Verdict(f"{case}: share of the copy's bandwidth", KL_BANDWIDTH, share)
            kept = KL_KEPT * plan.divergence_weights / max(1, own.peak_bytes or 0)
            yield Verdict(f"{case}: bytes of the gradients over peak memory", 1.0, kept)
    yield from gpu_packed.verdicts(rows, bandwidth, plan.packed_linear)


def _of_training(case: str, own: Row, variants: dict[str, Row]) -> Iterator[Verdict]:
    for want in asked_of(case):
        rival = variants.get(want.rival)
        if rival is None or rival.best_seconds is None or own.best_seconds is None:
            continue
        ratio = rival.best_seconds / own.best_seconds
        yield Verdict(f"{case}: time of {rival.variant} over ours", want.faster, ratio)
        if want.smaller is not None:
            ratio = (rival.peak_bytes or 0) / max(1, own.peak_bytes or 0)
            yield Verdict(f"{case}: peak memory of {rival.variant} over ours", want.smaller, ratio)


def stage_line(
    stage: str, tasks: Sequence[Task], record: Record, figures: Sequence[Verdict | str], seconds: float
) -> str:
    """What became of a stage: its tasks, what failed in them, and the figures of its rows."""
    known: dict[str, dict[str, Any]] = record.tasks(stage)
    pending = {task.name for task in record.pending(stage, tasks)}
    by_state: dict[str, list[str]] = {}
    for task in tasks:
        by_state.setdefault(known.get(task.name, {}).get("state", ""), []).append(task.name)
    parts = [f"{len(by_state.get(DONE, []))} of {len(tasks)} tasks done"]
    lists = {
        "failed": by_state.get(FAILED, []),
        "ended their process": [name for name in by_state.get(BEGUN, []) if name not in pending],
        "to go on with": [task.name for task in tasks if task.name in pending],
        "WRONG": [f"{row.case} {row.variant}" for row in record.rows_of(stage) if row.failed],
    }
    parts += [f"{name}: {', '.join(found)}" for name, found in lists.items() if found]
    if figures:
        met = sum(isinstance(figure, Verdict) and figure.met for figure in figures)
        parts.append(f"{met} of {len(figures)} figures met")
    return f"{stage}: {'; '.join(parts)}; {seconds:.0f} s"
