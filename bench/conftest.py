"""One table of ratios after the benchmarks: each group against its baseline, medians."""

from __future__ import annotations

from typing import Any

import pytest

from bench.machine import describe_machine

BASELINE = "fpnn fp32"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(describe_machine())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = {}
    for bench in session.benchmarks if session else []:
        if bench.stats.rounds:
            groups.setdefault(bench.group, {})[bench.params["variant"]] = bench.stats.median
    if not groups:
        return
    variants = list(dict.fromkeys(name for medians in groups.values() for name in medians))
    terminalreporter.write_sep("-", f"median ms, and in brackets times faster than {BASELINE}")
    terminalreporter.write_line(f"{'group':<28}" + "".join(f"{name:>22}" for name in variants))
    for group, medians in groups.items():
        cells = []
        for name in variants:
            if name not in medians:
                cells.append(f"{'-':>22}")
                continue
            ratio = f"({medians[BASELINE] / medians[name]:.2f})" if BASELINE in medians else ""
            cells.append(f"{1e3 * medians[name]:>13.3f} {ratio:>8}")
        terminalreporter.write_line(f"{group:<28}" + "".join(cells))
