"""bqnn.kernels.launch.launch: what it finds in its table is what Triton would have run, with the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.jit import JITFunction

from bench import host_time
from bqnn import ops
from bqnn.kernels import launch
from bqnn.ops.backends.triton import kernels
from tests.support.helpers import make_case
from tests.support.launches import Launched, gpu_stands_in
from tests.support.shapes import INTERPRETED, LinearShape

if INTERPRETED:
    pytest.skip("the interpreter has no launches", allow_module_level=True)


@pytest.fixture
def launches() -> Iterator[list[Launched]]:
    with gpu_stands_in(keeps_arguments=True) as done:
        yield done


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that Triton itself was asked to launch, from an empty table on."""
    names: list[str] = []
    run = JITFunction.run

    def noted(self: Any, *args: Any, **keywords: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **keywords)

    monkeypatch.setattr(launch, "_tables", {})
    monkeypatch.setattr(JITFunction, "run", noted)
    return names


def linear(
    x: Callable[[Tensor], Tensor] = lambda x: x, seed: int = 1, offset: int = 0, with_variance: bool = True
) -> None:
    torch.manual_seed(0)
    case = make_case(LinearShape(32, 64, 64), 3, "tensor")
    variance = case.log_sigma2 if with_variance else None
    ops.sample_linear(
        x(case.x), case.weight, variance, case.levels, case.thresholds, case.bias, torch.tensor(seed), offset
    )


@pytest.mark.parametrize("name", [name for name in host_time.OPS if name != "codebook_from_raw"])
def test_the_table_launches_what_triton_does(name: str, asked: list[str], launches: list[Launched]) -> None:
    op = host_time.OPS[name]()
    op.step()
    by_triton = [each.numbers() for each in launches]
    assert asked == [name for name, _, _ in by_triton]
    launches.clear()
    asked.clear()
    op.step()
    assert [each.numbers() for each in launches] == by_triton
    assert not asked


def test_a_new_seed_is_no_new_kernel(asked: list[str], launches: list[Launched]) -> None:
    for seed, offset in [(1, 0), (16, 1), (2**40, 2**35)]:
        linear(seed=seed, offset=offset)
    assert asked == ["sample_linear_fwd_kernel"]
    assert [each.arguments[3:5] for each in launches] == [(1, 0), (16, 1), (2**40, 2**35)]


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    "other",
    [{"x": unaligned}, {"x": Tensor.bfloat16}, {"x": lambda x: x[:16]}, {"with_variance": False}],
    ids=["alignment", "dtype", "rows", "variance"],
)
def test_what_a_kernel_is_compiled_for_has_its_own(
    other: dict[str, Any], asked: list[str], launches: list[Launched]
) -> None:
    for options in ({}, other, {}, other):
        linear(**options)
    assert asked == 2 * ["sample_linear_fwd_kernel"]
    assert len(launches) == 4


def test_hooks_of_triton_see_every_launch(
    asked: list[str], launches: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernels("sample_linear").sample_linear_fwd_kernel
    seen: list[int] = []
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *args, **keywords: seen.append(1)])
    linear()
    linear()
    assert len(seen) == len(asked) == 2


def test_the_table_has_an_end(monkeypatch: pytest.MonkeyPatch, asked: list[str], launches: list[Launched]) -> None:
    monkeypatch.setattr(launch, "MOST_LAUNCHES", 2)
    for rows in (1, 2, 3, 4, 5):
        linear(partial(torch.narrow, dim=0, start=0, length=rows))
        (table,) = launch._tables.values()
        assert len(table.compiled) <= 2
