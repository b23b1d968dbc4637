"""The way from calls to one table: checked, timed in turns, summed up and saved.

A bench module has BASELINES, the variants that ratios refer to, perhaps ``claims``, and a test with the parameters of
its group and one called ``variant``. The test hands the fixture ``race`` a function that makes the group: a
:class:`bench.summary.Group`. pytest-benchmark gets the times that were taken, one a round: its table, comparisons and
JSON are of these; with ``--benchmark-disable`` results are checked and no times taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from bench.interleaved import Race, Replay
from bench.save import describe, save
from bench.summary import Group, Measured, write_summary
from bqnn.core.machine import describe_cpu

REPLAY = Replay()
RACES = pytest.StashKey[dict[Any, tuple[ModuleType, Race]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", action="store_true", help="put what is measured into bench/results/<cpu>.json")
    parser.addoption("--compiled", action="store_true", help="time whole networks by torch.compile too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The variants of a group are raced together, so they stand together."""
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    first: dict[Any, int] = {}
    for number, item in enumerate(items):
        first.setdefault(_group_key(item), number)
    items.sort(key=lambda item: first[_group_key(item)])


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Callable[..., Group]], None]:
    """Runs the test's variant in the group that the given function makes of the test's other parameters.

    The first test of a group times all that were selected; the others report what is theirs.
    """
    races = request.config.stash.setdefault(RACES, {})

    def run(make: Callable[..., Group]) -> None:
        params = dict(request.node.callspec.params)
        variant, key = params.pop("variant"), _group_key(request.node)
        if key not in races:
            variants = [item.callspec.params["variant"] for item in request.session.items if _group_key(item) == key]
            races[key] = request.module, Race(make(**params), variants, not benchmark.disabled)
        _, found = races[key]
        if variant in found.failures:
            raise found.failures[variant]
        benchmark.group = found.name
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
    by_module: dict[ModuleType, list[Race]] = {}
    for module, race in config.stash.get(RACES, {}).values():
        if race.seconds:
            by_module.setdefault(module, []).append(race)
    for module, races in by_module.items():
        rows = [
            Measured(race.name, variant, statistics.median(seconds), race.infos[variant], race.elsewhere)
            for race in races
            for variant, seconds in race.seconds.items()
        ]
        write_summary(terminalreporter, module, rows)
    if config.getoption("--save", False) and by_module:
        groups = {
            race.name: describe(race, module.__name__.rpartition(".")[2].removeprefix("bench_"))
            for module, races in by_module.items()
            for race in races
        }
        for line in save(groups, describe_cpu()):
            terminalreporter.write_line(line)
