"""The way from calls to one table: checked, timed in turns, handed to pytest-benchmark, summed up.

A bench module has a fixture-driven test with the parameters of its group and one called ``variant``. It hands the
fixture ``race`` a function that makes the group: a :class:`bench.summary.Group`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.interleaved import Race, Replay
from bench.machine import describe_machine
from bench.summary import Group, Measured, write_summary

REPLAY = Replay()
MODULES = pytest.StashKey[dict[str, Any]]()
RACE = pytest.StashKey[dict[tuple[Any, ...], Race]]()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(describe_machine())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    raced = [item for item in items if "race" in getattr(item, "fixturenames", ())]
    for item in raced:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    first: dict[Any, int] = {}
    for number, item in enumerate(items):
        first.setdefault(_group_key(item), number)
    # The variants of a group are raced together, so they stand together.
    items.sort(key=lambda item: first[_group_key(item)])
    config.stash[MODULES] = {item.nodeid.split("::")[0]: item.module for item in raced}  # type: ignore[attr-defined]


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Callable[..., Group]], None]:
    """Runs the test's variant in the group that the given function makes of the test's other parameters.

    The first test of a group times all that were selected; the others report what is theirs.
    """

    stash = request.config.stash.setdefault(RACE, {})

    def run(make: Callable[..., Group]) -> None:
        params = dict(request.node.callspec.params)
        variant = params.pop("variant")
        key = _group_key(request.node)
        if key not in stash:
            stash.clear()  # the group before is freed before this one is made
            variants = [item.callspec.params["variant"] for item in request.session.items if _group_key(item) == key]
            stash[key] = Race(make(**params), variants, not benchmark.disabled)
        found = stash[key]
        benchmark.group = found.name
        if variant in found.failures:
            raise found.failures[variant]
        benchmark.extra_info.update(found.infos[variant])
        seconds = found.seconds.get(variant, [])
        REPLAY.load(seconds)
        benchmark.pedantic(lambda: None, rounds=max(1, len(seconds)))

    return run


def _group_key(item: Any) -> tuple[Any, ...]:
    """The same for all variants of a group; for a test that takes no part in this, its own."""
    if "race" not in getattr(item, "fixturenames", ()):
        return (item.nodeid,)
    return item.function, *(value for name, value in item.callspec.params.items() if name != "variant")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    measured: dict[str, list[Measured]] = {}
    for bench in session.benchmarks if session else []:
        if bench.stats.rounds:
            module = bench.fullname.split("::")[0]
            row = Measured(bench.group, bench.params["variant"], bench.stats.median, bench.extra_info)
            measured.setdefault(module, []).append(row)
    for name, rows in measured.items():
        module = next((m for key, m in config.stash[MODULES].items() if key.endswith(name)), None)
        if module is not None:
            write_summary(terminalreporter, module, rows)
