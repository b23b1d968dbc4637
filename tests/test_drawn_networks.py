"""Networks as users write them, drawn at random: compiled in both precisions, on every instruction set."""

from __future__ import annotations

import pytest

import bqnn
from tests.support.draw_networks import check_network
from tests.support.helpers import lower_isas, run_on_isa

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_drawn_networks(first: int, count: int = 8) -> None:
    for seed in range(first, first + count):
        check_network(seed)


def a_few() -> str:
    test_drawn_networks(24, 3)
    return "right"


@pytest.mark.parametrize("isa", lower_isas())
def test_drawn_networks_on_every_instruction_set(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_drawn_networks", "a_few") == "right"
