"""Whole networks, M = 3, every layer packed, against the fastest ways to run the full-precision network.

What they are stands in bench/networks.py, which runs one of them by itself. torch.compile takes minutes for each and
takes part where ``--compiled`` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.network_rivals import RIVALS
from bench.networks import NETWORKS, OURS, NetworkGroup, group_name, rivals_of
from bench.summary import Medians, Verdict, fastest, times_faster

BASELINES = ("torch fp32", "torch fp32 nhwc")

ASKED = 1.0
"""How many times faster than the fastest rival the best of ours shall be."""


def cases(compiled: bool) -> list[Any]:
    return [
        pytest.param(net, batch, variant, id=f"{net}-B{batch}-{variant}")
        for net, network in NETWORKS.items()
        for batch in network.batches
        for variant in (*rivals_of(net, compiled), *OURS)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("net, batch, variant", cases(metafunc.config.getoption("--compiled", False)))


def test_network(race: Any, net: str, batch: int, variant: str) -> None:
    race(NetworkGroup)


def claims(medians: Medians) -> Iterator[Verdict]:
    """The best of ours against the best rival, each with its name."""
    for net, network in NETWORKS.items():
        for batch in network.batches:
            group = medians.get(group_name(net, batch), {})
            measured = times_faster(group, OURS, RIVALS)
            if measured is not None:
                text = f"{group_name(net, batch)}: {fastest(group, OURS)} over {fastest(group, RIVALS)}"
                yield Verdict(text, ASKED, measured)
