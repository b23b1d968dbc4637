"""What this machine's rates are, kept in a file, so that each is measured once a machine and not once a process.

The file is ``rates-<processor>-<instruction set>.json`` in the user's cache folder for bqnn (on Linux ~/.cache/bqnn),
or in the folder that ``BQNN_CACHE`` names; ``BQNN_CACHE=`` with nothing after it keeps no file. It may be deleted, and
is then made again, and shipped to machines of the same kind. Rates of another version of bqnn or torch do not
count. A file that can not be read or written costs a measurement, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from bqnn.core.files import write_content
from bqnn.core.machine import cpuinfo, versions
from bqnn.core.native import cpu_isa
from bqnn.packed.cost import Rates

ENVIRONMENT = "BQNN_CACHE"

_log = logging.getLogger("bqnn")


def cache_file() -> Path | None:
    """Where the rates are kept; None where they are not to be kept."""
    folder = os.environ.get(ENVIRONMENT)
    if folder == "":
        return None
    root = Path(folder) if folder else platformdirs.user_cache_path("bqnn")
    return root / f"rates-{_processor()}-{cpu_isa()}.json"


def known(key: str) -> Rates | None:
    """The rates that an earlier process measured under this name, if there are any."""
    return _read().get(key)


def remember(measured: dict[str, Rates]) -> None:
    """Adds rates to the file, by name."""
    path = cache_file()
    if path is None:
        return
    entries = {**_read(), **measured}
    content = {"versions": _versions(), "rates": {name: each._asdict() for name, each in entries.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_content(path, json.dumps(content, indent=1))
    except OSError as error:
        _log.info("the measured rates are not kept: %s", error)


def _read() -> dict[str, Rates]:
    path = cache_file()
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["versions"] != _versions():
            return {}
        return {name: _rates_of(fields) for name, fields in content["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s holds no rates and is not used: %s", path, error)
        return {}


def _rates_of(fields: dict[str, Any]) -> Rates:
    """Raises ValueError, KeyError or TypeError where the fields are none of :class:`Rates`."""
    call, rows, seconds = float(fields["call_seconds"]), fields["rows"], [float(s) for s in fields["weight_seconds"]]
    if not all(type(count) is int and count > 0 for count in rows) or rows != sorted(set(rows)):
        raise ValueError(f"rows must be increasing counts, got {rows!r:.80}")
    if not rows or len(rows) != len(seconds) or not all(0.0 <= each < float("inf") for each in (call, *seconds)):
        raise ValueError("a time, not negative and finite, is needed for each number of rows")
    return Rates(call, tuple(rows), tuple(seconds))


def _versions() -> dict[str, str]:
    """Those that times depend on: Python's is none of them."""
    found = versions()
    return {name: found[name] for name in ("bqnn", "torch")}


@cache
def _processor() -> str:
    """The processor in a word: its name, and what tells its generations apart where Linux says it."""
    names = cpuinfo()
    parts = [platform.processor() or platform.machine()]
    parts += [names[field] for field in ("model name", "cpu family", "model") if field in names]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
