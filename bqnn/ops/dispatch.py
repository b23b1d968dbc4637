"""Which implementation of an op runs: the one place that decides it.

An op has a list of backends, in the order of preference of :data:`ORDER`. A backend is usable for a device or it is
not, and then it has a reason. ``BQNN_BACKEND=name`` in the environment, or ``backend=name`` in a call, forces one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from bqnn.core import native

ORDER = ("cuda", "triton", "cpu", "reference")

_log = logging.getLogger("bqnn")
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}


class Status(NamedTuple):
    """Whether a backend can run an op on a device, and why not (empty where it can)."""

    usable: bool
    reason: str


class BackendError(RuntimeError):
    """A backend was asked for by name and can not run the op; the message says why."""


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Makes ``implementation`` what ``backend`` runs for ``op``; called once, by the op's own module."""
    _implementations.setdefault(op, {})[backend] = implementation
    _choose.cache_clear()


def status(op: str, backend: str, device_type: str) -> Status:
    """Whether ``backend`` can run ``op`` on devices of ``device_type`` ("cpu", "cuda")."""
    if backend not in ORDER:
        return Status(False, f"there is no such backend; there are {', '.join(ORDER)}")
    if backend not in _implementations.get(op, {}):
        return Status(False, "not installed")
    if backend == "cpu" and device_type != "cpu":
        return Status(False, f"it runs on the CPU and the tensors are on {device_type}")
    if backend == "cpu" and native.MISSING:
        return Status(False, native.MISSING)
    if backend == "triton":
        return _triton_status(device_type)
    if backend == "cuda" and device_type != "cuda":
        return Status(False, f"it runs on a GPU and the tensors are on {device_type}")
    if backend == "cuda" and native.cuda_missing():
        return Status(False, native.cuda_missing())
    return Status(True, "")


def _triton_status(device_type: str) -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status(False, "Triton is not installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (interpreted and device_type == "cpu"):
        return Status(False, f"it runs on a GPU, or with TRITON_INTERPRET=1, and the tensors are on {device_type}")
    return Status(True, "")


@cache
def _choose(op: str, device_type: str, forced: str | None) -> str:
    if forced is not None:
        usable, reason = status(op, forced, device_type)
        if not usable:
            raise BackendError(f"backend {forced!r} can not run bqnn::{op}: {reason}")
        return forced
    table = [(name, status(op, name, device_type)) for name in ORDER]
    chosen = next(name for name, state in table if state.usable)
    passed_over = [f"{name} ({state.reason})" for name, state in table[: ORDER.index(chosen)]]
    _log.info("bqnn::%s on %s: %s; passed over: %s", op, device_type, chosen, ", ".join(passed_over) or "none")
    return chosen


def choose(op: str, device: torch.device, backend: str | None = None) -> str:
    """The name of the backend that runs ``op`` on ``device``.

    Raises:
        BackendError: ``backend``, or else ``BQNN_BACKEND``, names one that can not run it.
    """
    return _choose(op, device.type, backend or os.environ.get("BQNN_BACKEND") or None)


def implementation(op: str, device: torch.device, backend: str | None = None) -> Callable[..., Any]:
    """What runs ``op`` on ``device``; raises as :func:`choose` does."""
    return _implementations[op][choose(op, device, backend)]


class Backends(dict[str, dict[str, dict[str, Status]]]):
    """``{op: {device type: {backend: Status}}}``, printed as a table with the chosen backend of each device."""

    def __str__(self) -> str:
        lines = [f"{'op':<28}{'device':<8}{'runs on':<12}not usable"]
        for op, devices in self.items():
            for device, table in devices.items():
                chosen = next((name for name, state in table.items() if state.usable), "-")
                reasons: dict[str, list[str]] = {}
                for name, state in table.items():
                    if not state.usable:
                        reasons.setdefault(state.reason, []).append(name)
                others = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
                lines.append(f"{op:<28}{device:<8}{chosen:<12}{others}")
        return "\n".join(lines)


def backends() -> Backends:
    """The table of every op, device type and backend; needs no GPU."""
    return Backends(
        {
            op: {device: {name: status(op, name, device) for name in ORDER} for device in ("cpu", "cuda")}
            for op in sorted(_implementations)
        }
    )
