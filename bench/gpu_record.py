"""The file of ``make gpu``: rows, written the moment they exist, and what was begun and done, so that a call can be cut
off anywhere and the next one goes on.

    {"machine": {...}, "tasks": {<stage>: {<task>: {"state", "seconds", "said"}}}, "rows": [...]}
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.gpu_rows import Row, Task, Unfinished
from bqnn.core.files import write_content

DONE, FAILED, BEGUN, UNFINISHED = "done", "failed", "begun", "unfinished"
ATTEMPTS = 2
"""So often a task is begun that ends its process, or is cut off, before it is given up."""
SAID = 500


class Record:
    """What is known so far; every change is in the file at once.

    Args:
        path: of the file, which is read where it is there.
        machine: what it was measured on; a file of another one is not gone on with.

    Raises:
        ValueError: the file is of another machine.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"machine": machine, "tasks": {}, "rows": []}
        if path.exists():
            before = json.loads(path.read_text())
            if "tasks" not in before:
                raise ValueError(f"{path} was not written by this bench; move it, or name another folder with --out")
            if before["machine"].get("gpu") != machine["gpu"]:
                raise ValueError(f"{path} is of {before['machine'].get('gpu')}, and this is {machine['gpu']}")
            self._content = {**before, "machine": machine}

    def rows_of(self, stage: str | None = None) -> list[Row]:
        """All rows, or those of a stage."""
        rows = [row for row in self._content["rows"] if stage is None or row["task"].startswith(_key(stage, ""))]
        return [Row(**{key: value for key, value in row.items() if key != "task"}) for row in rows]

    def tasks(self, stage: str) -> dict[str, dict[str, Any]]:
        """What has become of the tasks of a stage, by name."""
        return self._content["tasks"].setdefault(stage, {})

    def pending(self, stage: str, tasks: Sequence[Task]) -> list[Task]:
        """The tasks that are neither done nor given up."""
        found = self.tasks(stage)
        return [task for task in tasks if not self._is_over(found.get(task.name))]

    @staticmethod
    def _is_over(known: dict[str, Any] | None) -> bool:
        if known is None or known["state"] == UNFINISHED:
            return False
        return known["state"] in (DONE, FAILED) or known["attempts"] >= ATTEMPTS

    def forget(self, stage: str) -> None:
        """All of a stage is pending again, and its rows are gone."""
        names = [_key(stage, name) for name in self.tasks(stage)]
        self._content["tasks"][stage] = {}
        self._drop_rows(names)
        self._write()

    def do(self, stage: str, task: Task) -> Iterator[Row]:
        """Runs a task; each of its rows is in the file before it is handed on. An error is noted, and no error."""
        with self._noted(stage, task.name):
            for row in task.run():
                self._content["rows"].append({"task": _key(stage, task.name), **row._asdict()})
                self._write()
                yield row

    @contextmanager
    def _noted(self, stage: str, name: str) -> Iterator[None]:
        entry = self.tasks(stage).setdefault(name, {"attempts": 0})
        entry |= {"state": BEGUN, "attempts": entry["attempts"] + 1, "said": ""}
        self._drop_rows([_key(stage, name)])  # of an earlier attempt
        self._write()
        start = time.perf_counter()
        try:
            yield
            entry["state"] = DONE
        except Unfinished as left:
            entry |= {"state": UNFINISHED, "said": str(left)}
        except Exception as error:  # the other tasks are still worth their time
            entry |= {"state": FAILED, "said": f"{type(error).__name__}: {error}"[:SAID]}
        finally:
            entry["seconds"] = round(time.perf_counter() - start, 1)
            self._write()

    def _drop_rows(self, tasks: list[str]) -> None:
        self._content["rows"] = [row for row in self._content["rows"] if row["task"] not in tasks]

    def _write(self) -> None:
        rows = ",\n  ".join(json.dumps(row) for row in self._content["rows"])
        head = json.dumps({key: value for key, value in self._content.items() if key != "rows"}, indent=1)
        text = f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
        write_content(self._path, text)


def _key(stage: str, task: str) -> str:
    return f"{stage}/{task}"
