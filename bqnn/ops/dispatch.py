"""Which implementation of an op runs: the one place that decides it.

An op has a list of backends, in the order of preference of :data:`ORDER`. A backend can be there or not for a device,
and then it serves a call or it does not; where it can not, it has a reason. ``BQNN_BACKEND=name`` in the environment,
or ``backend=name`` in a call, forces one, which then runs or says why it can not; the automatic choice takes the first
that can, and logs it once.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core import native
from bqnn.core.check import named
from bqnn.core.precision import is_autocasting

ORDER = ("cuda", "triton", "cpu", "reference")
BY_NAME_ONLY = ("dense",)
"""Backends that no call gets unless it asks for them."""

_MADE_FOR = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # the device that a backend has kernels for
_NO_KERNEL = "not installed"  # of an op that a backend has nothing for
_BACKWARD = "_backward"  # what the name of an op's gradient ends with

_log = logging.getLogger("bqnn")

Bound = Callable[[Tensor, "Tensor | None"], Tensor]


class Backend(NamedTuple):
    """One implementation of an op. ``call`` is the op's NamedTuple of arguments, its first field a tensor."""

    name: str
    run: Callable[[Any], Any]
    """call -> the op's outputs."""
    serves: Callable[[Any], str]
    """call -> why it can not run this call; empty where it can."""
    bind: Callable[[Any], Bound] | None = None
    """call -> what runs further calls that differ in the values of x and bias alone, with everything else looked up;
    of the packed ops."""
    describe: Callable[[Any], str] | None = None
    """call -> the kernel, and the layout of its weight, in a few words."""


class Status(NamedTuple):
    """Whether a backend can run an op on a device, and why not (empty where it can)."""

    usable: bool
    reason: str


class BackendError(RuntimeError):
    """A backend was asked for by name and can not run the op; the message says why."""


_backends: dict[str, dict[str, Backend]] = {}


def serves_all(call: Any) -> str:
    """Of a backend that serves every call."""
    return ""


def register(
    op: str,
    backend: str,
    run: Callable[[Any], Any],
    serves: Callable[[Any], str] = serves_all,
    bind: Callable[[Any], Bound] | None = None,
    describe: Callable[[Any], str] | None = None,
) -> None:
    """Makes ``run`` what ``backend`` runs for ``op``; called once, by the op's own module. See :class:`Backend`."""
    _backends.setdefault(op, {})[backend] = Backend(backend, run, serves, bind, describe)
    _candidates.cache_clear()


def status(op: str, backend: str, device_type: str) -> Status:
    """Whether ``backend`` can run ``op`` on devices of ``device_type`` ("cpu", "cuda"); a call may still be one that
    it does not serve."""
    if backend not in ORDER + BY_NAME_ONLY:
        return Status(False, f"there is no such backend; there are {', '.join(ORDER)}")
    if backend not in _backends.get(op, {}):
        return Status(False, _NO_KERNEL)
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


def choose(op: str, call: Any, forced: str | None = None) -> Backend:
    """The backend that runs ``call`` of ``op``.

    Raises:
        BackendError: ``forced``, or else ``BQNN_BACKEND``, names one that can not run it.
        TypeError: ``forced`` is neither a string nor None.
    """
    if forced is not None and not isinstance(forced, str):
        raise TypeError(f"backend must be a string or None, got {type(forced).__name__}")
    forced = forced or os.environ.get("BQNN_BACKEND") or None
    device_type = call[0].device.type
    for candidate in _candidates(op, device_type, forced):
        reason = candidate.serves(call)
        if not reason:
            _log_choice(op, device_type, forced, candidate.name)
            return candidate
    raise BackendError(f"backend {candidate.name!r} can not run bqnn::{op}: {reason}")


def backend(op: str, name: str) -> Backend:
    """What is registered for ``op`` under this name, whether or not it can run here."""
    return _backends[op][name]


def available(op: str, device: torch.device, forced: str | None = None) -> str:
    """The name of the backend that runs those calls of ``op`` on ``device`` that it serves.

    Raises:
        BackendError: as :func:`choose` does.
    """
    return _candidates(op, device.type, forced or os.environ.get("BQNN_BACKEND") or None)[0].name


def run(op: str, call: Any, forced: str | None = None) -> Any:
    """Runs ``call`` of ``op``; raises as :func:`choose` does."""
    return without_autocast(choose(op, call, forced).run, call)


def without_autocast(function: Callable[[Any], Any], call: Any) -> Any:
    """``function(call)``, whose products have the dtypes that an op gives them: autocast would round what is wide."""
    device_type = call[0].device.type
    if not is_autocasting(device_type):
        return function(call)
    with torch.autocast(device_type, enabled=False):
        return function(call)


@cache
def _candidates(op: str, device_type: str, forced: str | None) -> tuple[Backend, ...]:
    """Those that are there, in the order in which they are asked; the reference, which serves all calls, is last."""
    if forced is not None:
        usable, reason = status(op, forced, device_type)
        if not usable:
            raise BackendError(f"backend {named(forced)} can not run bqnn::{op}: {reason}")
        return (_backends[op][forced],)
    if device_type == "cpu":
        native.warn_of_missing()
    return tuple(_backends[op][name] for name in ORDER if status(op, name, device_type).usable)


@cache
def _log_choice(op: str, device_type: str, forced: str | None, chosen: str) -> None:
    if forced is None:
        table = {name: status(op, name, device_type) for name in ORDER[: ORDER.index(chosen)]}
        passed_over = [f"{name} ({state.reason or 'it does not serve this call'})" for name, state in table.items()]
        _log.info("bqnn::%s on %s: %s; passed over: %s", op, device_type, chosen, ", ".join(passed_over) or "none")


class Backends(dict[str, dict[str, dict[str, Status]]]):
    """``{op: {device type: {backend: Status}}}``, printed as a table of what runs on each device, with the reasons why
    a backend is missing there; it fits a screen of 80 by 24."""

    def __str__(self) -> str:
        forward = [op for op in self if not op.endswith(_BACKWARD)]
        width = max((len(op) for op in forward), default=0) + 2
        rows = [("op", "on the CPU", "on a GPU")]
        rows += [(op, self._runs_on(op, "cpu"), self._runs_on(op, "cuda")) for op in forward]
        lines = [f"{op:<{width}}{cpu:<28}{gpu}".rstrip() for op, cpu, gpu in rows]
        return "\n".join([*lines, *self._reasons()])

    def _runs_on(self, op: str, device: str) -> str:
        """The backend that is chosen for an op, and for its gradient where that is another one."""
        chosen = [_first_usable(self[name][device]) for name in (op, op + _BACKWARD) if name in self]
        return chosen[0] if len(set(chosen)) == 1 else f"{chosen[0]}, backward {chosen[1]}"

    def _reasons(self) -> list[str]:
        """Why a backend runs nothing on the devices that it is for."""
        found = {}
        for devices in self.values():
            for backend, device in _MADE_FOR.items():
                state = devices[device][backend]
                if not state.usable and state.reason != _NO_KERNEL:
                    found[backend] = state.reason
        return [
            textwrap.fill(f"{backend} is not usable: {reason}", 80, subsequent_indent="  ", max_lines=3)
            for backend, reason in found.items()
        ]


def _first_usable(table: dict[str, Status]) -> str:
    return next((name for name, state in table.items() if state.usable), "-")


def backends() -> Backends:
    """The table of every op, device type and backend; needs no GPU."""
    return Backends(
        {
            op: {device: {name: status(op, name, device) for name in ORDER} for device in ("cpu", "cuda")}
            for op in sorted(_backends)
        }
    )
