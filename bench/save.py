"""Keeps what a run of the benches measured, for publication.

    make bench ARGS=--benchmark-json=run.json
    python -m bench.save run.json

Writes bench/results/<op or network>_<cpu>.json, one a bench file, in pytest-benchmark's form, a line a measurement;
without the commit, which the file is part of, and without single rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_name(machine: dict[str, Any]) -> str:
    """Short, for a file name: "xeon-6-207-amx" for a Xeon of family 6, model 207, with AMX in use."""
    family, model, _ = machine["cpu_family_model_stepping"]
    brand = "xeon" if "Xeon" in machine["cpu"] else machine["cpu"].split()[0].lower()
    return f"{brand}-{family}-{model}-{machine['cpu_isa']}"


def save(run: dict[str, Any]) -> list[Path]:
    """Writes the files for pytest-benchmark's JSON ``run`` and returns their paths."""
    run["machine_info"].pop("node", None)
    by_stem: dict[str, list[dict[str, Any]]] = {}
    for benchmark in run["benchmarks"]:
        stem = Path(benchmark["fullname"].split("::")[0]).stem.removeprefix("bench_")
        del benchmark["stats"]["data"], benchmark["options"]
        by_stem.setdefault(stem, []).append(benchmark)
    paths = []
    for stem, benchmarks in by_stem.items():
        path = RESULTS / f"{stem}_{cpu_name(run['machine_info'])}.json"
        head = {key: run[key] for key in ("machine_info", "datetime", "version")}
        lines = ",\n".join("  " + json.dumps(benchmark) for benchmark in benchmarks)
        path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "benchmarks": [\n' + lines + "\n ]\n}\n")
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    for path in save(json.loads(parser.parse_args().run.read_text())):
        print(path)


if __name__ == "__main__":
    main()
