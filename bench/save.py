"""The results of `make bench`: one file a machine, bench/results/<cpu>.json, where a group's measurement is the unit.

    {"machine": {...}, "groups": {<group>: {"bench", "date", "versions", "elsewhere", "rows": {<variant>: {...}}}}}

The variants of a group were timed in turns and are only compared with each other, so that a group is replaced as a
whole; others keep their dates.
"""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.interleaved import Race
from bench.machine import RESULTS, cpu_name, versions


def describe(race: Race, bench: str) -> dict[str, Any]:
    """A group as the file has it: medians and quartiles in seconds, and what the checks returned."""
    rows = {}
    for variant, seconds in race.seconds.items():
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        times = {"seconds": median, "quartiles": [first, third], "rounds": len(seconds)}
        rows[variant] = {**times, **race.infos[variant]}
    date = datetime.now(timezone.utc).date().isoformat()
    return {"bench": bench, "date": date, "versions": versions(), "elsewhere": race.elsewhere, "rows": rows}


def save(groups: dict[str, dict[str, Any]], machine: dict[str, Any], folder: Path = RESULTS) -> list[str]:
    """Puts measured groups into the file of ``machine``, which is what :func:`bench.machine.describe_cpu` gives.

    Returns lines that say which file that is, and which groups stay out because they lack a variant of the group in the
    file, as when a part of its variants was selected.
    """
    path = folder / f"{cpu_name(machine)}.json"
    results = json.loads(path.read_text()) if path.exists() else {"machine": machine, "groups": {}}
    lines = [f"saved as {path}"]
    for name, group in groups.items():
        missing = set(results["groups"].get(name, {"rows": {}})["rows"]) - set(group["rows"])
        if missing:
            lines.append(f"{name} is not saved: it ran without {', '.join(sorted(missing))}")
        elif group["rows"]:
            results["groups"][name] = group
    write(results, path)
    return lines


def write(results: dict[str, Any], path: Path) -> None:
    """One line for the machine, for each group's head and for each variant."""
    groups = []
    for name, group in sorted(results["groups"].items(), key=lambda item: (item[1]["bench"], _natural(item[0]))):
        rows = ",\n".join(f"    {json.dumps(variant)}: {json.dumps(row)}" for variant, row in group["rows"].items())
        head = json.dumps({key: value for key, value in group.items() if key != "rows"})
        groups.append(f'  {json.dumps(name)}: {head[:-1]}, "rows": {{\n{rows}\n  }}}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    machine, lines = json.dumps(results["machine"]), ",\n".join(groups)
    path.write_text(f'{{\n "machine": {machine},\n "groups": {{\n{lines}\n }}\n}}\n')


def _natural(name: str) -> list[Any]:
    """Words and numbers of a name, so that batch 8 comes before batch 64."""
    return [(0, int(word)) if word.isdigit() else (1, word) for word in name.replace("x", " ").replace(",", "").split()]
