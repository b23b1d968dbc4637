"""Packed networks under threads: several that call one network at once, and any number of them inside a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.check import PRECISIONS
from bqnn.models import lenet5

CALLERS, CALLS = 8, 6
Inputs = Callable[[int], Tensor]


def linear_net() -> nn.Module:
    """Channels that fill tasks, and 66: a task of few, whose rows are cut differently for each number of threads."""
    return nn.Sequential(nn.Linear(141, 300), nn.ReLU(), nn.Linear(300, 66), nn.ReLU(), nn.Linear(66, 17))


def linear_inputs(batch: int) -> Tensor:
    return torch.randn(batch, 141)


def conv_net() -> nn.Module:
    """LeNet-5 behind convolutions of other geometries: strides, dilation, groups, one pixel."""
    return nn.Sequential(
        nn.Conv2d(4, 34, 3, stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(34, 18, (3, 1), padding=(1, 0), groups=2),
        nn.ReLU(),
        nn.Conv2d(18, 1, 1),
        lenet5(),
    )


def conv_inputs(batch: int) -> Tensor:
    return torch.randn(batch, 4, 28, 59)


NETS = [pytest.param(linear_net, linear_inputs, id="linear"), pytest.param(conv_net, conv_inputs, id="conv")]


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(make: Callable[[], nn.Module], precision: str) -> nn.Module:
    torch.manual_seed(0)
    return bqnn.pack(bqnn.convert(make(), 3), precision=precision, execution="packed")


def batches(inputs: Inputs) -> list[Tensor]:
    """One for each caller: full tiles, odd numbers of rows, single ones."""
    torch.manual_seed(1)
    return [inputs(size) for size in (1, 70, 3, 33, 16, 1, 47, 9)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("make", "inputs"), NETS)
def test_callers_at_once_get_what_one_gets(
    make: Callable[[], nn.Module], inputs: Inputs, precision: str, threads: int
) -> None:
    xs = batches(inputs)
    torch.set_num_threads(1)
    alone = packed(make, precision)
    expected = [alone(x) for x in xs]
    net = packed(make, precision)  # no layout yet: all callers find that at once
    start, wrong = threading.Barrier(CALLERS), []

    def call(index: int) -> None:
        try:
            torch.set_num_threads(threads)
            start.wait()
            for turn in range(CALLS):
                i = (index + turn) % CALLERS
                if not torch.equal(net(xs[i]), expected[i]):
                    wrong.append(f"caller {index}, call {turn}: another result")
        except Exception as error:
            wrong.append(repr(error))
            start.abort()

    callers = [threading.Thread(target=call, args=(index,)) for index in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("make", "inputs"), NETS)
def test_the_number_of_threads_does_not_change_a_bit(
    make: Callable[[], nn.Module], inputs: Inputs, precision: str
) -> None:
    net, xs, results = packed(make, precision), batches(inputs), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append([net(x) for x in xs])
    for other in results[1:]:
        for i in range(len(xs)):
            assert torch.equal(other[i], results[0][i]), f"batch {len(xs[i])}"
