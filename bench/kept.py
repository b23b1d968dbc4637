"""Results of training runs, which take hours: a row is kept in a file once there is one, and tables are files too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import describe_machine
from bqnn.core.files import write_content


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What is in ``path``, JSON; where there is no such file, it is made and written."""
    if path.exists():
        return json.loads(path.read_text())
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_content(path, json.dumps(found))
    return found


def save_table(path: Path, **content: Any) -> None:
    """Writes a table of bench/results, and on which machine it was made."""
    write_content(path, json.dumps({"machine": describe_machine(), **content}, indent=1) + "\n")
