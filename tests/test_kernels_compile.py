"""Every Triton kernel, in every configuration it can choose, compiled for GPUs that need not be here.

``python -m bench.kernel_resources`` compiles all for all targets and writes a table, which has a digest of what each
kernel was compiled of. What the table knows is not compiled again, but for a few kernels that hold the table against
the compiler, since most of the time goes into that. Of the others each kernel of each dtype is compiled for every
target, by the first case that has it; the other cases, which are other tiles, codebooks and modes of the same kernels,
for one target each, in turns.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")

import triton
from triton.runtime.autotuner import Heuristics

from bqnn.kernels import spike_slab_kl
from tests.support.aot import SHARED_LIMIT, TABLE, TARGETS, Kernel, compiled, sources
from tests.support.compile_cases import CASES

# A changed constant may move the number of instructions by so much.
LEEWAY = 1.05
COMPILED_ANYWAY = 40
"""One in so many is compiled although the table knows it."""


def has_tensor_core_product(case: str, kernel: Kernel) -> bool:
    """Whether the case's products have a dtype that tensor cores take; an IEEE float32 product is made of FMA, and so
    is the product of one row."""
    if "float32" in case or "gemv" in kernel.name:
        return False
    return any(part in kernel.name for part in ("linear", "conv2d"))


def dtype_of(case: str) -> str:
    found = re.search("bfloat16|float16|float32|tf32|int8", case)
    return found[0] if found else ""


def compiled_for() -> Iterator[tuple[str, int]]:
    """Cases and the targets that each is compiled for."""
    targets, seen, others = json.loads(TABLE.read_text())["kernels"], set[tuple[str, str]](), itertools.cycle(TARGETS)
    for case in CASES:
        kernels = {(dtype_of(case), kernel["name"]) for cases in targets.values() for kernel in cases.get(case, ())}
        is_another = bool(kernels) and kernels <= seen
        seen |= kernels
        yield from ((case, capability) for capability in ([next(others)] if is_another else TARGETS))


ANYWAY = set(itertools.islice(compiled_for(), 0, None, COMPILED_ANYWAY))
COMPILED_FOR = [pytest.param(*each, id=f"{each[0]}-sm_{each[1]}") for each in compiled_for()]


def test_every_case_is_compiled_and_every_kernel_of_every_dtype_for_every_target() -> None:
    pairs = [(str(param.values[0]), param.values[1]) for param in COMPILED_FOR]
    assert {case for case, _ in pairs} == set(CASES)
    for target, cases in json.loads(TABLE.read_text())["kernels"].items():
        here = [case for case, capability in pairs if f"sm_{capability}" == target]
        found, needed = (
            {(dtype_of(case), kernel["name"]) for case in names for kernel in cases[case]} for names in (here, cases)
        )
        assert found == needed, target


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("case", "capability"), COMPILED_FOR)
def test_resources(case: str, capability: int) -> None:
    torch.use_deterministic_algorithms(False)  # nothing is computed: no need to fill what is allocated
    known = rows_of(case, capability)
    is_known = bool(known) and [row["source"] for row in known] == sources(CASES[case], capability)
    if is_known and (case, capability) not in ANYWAY:
        kernels = [kernel_of(row) for row in known]
    else:
        kernels = compiled(CASES[case], capability)
    assert kernels
    for kernel in kernels:
        assert (kernel.local, kernel.stack) == (0, 0), f"{kernel.name} spills: {kernel}"
        assert kernel.shared <= SHARED_LIMIT[capability], kernel
        assert bool(kernel.products) or not has_tensor_core_product(case, kernel), kernel
    assert_no_worse(kernels, table_of(case, capability))
    assert not is_known or kernels == table_of(case, capability), "the table is not what the compiler gives"


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        pytest.param({}, False, id="the-same"),
        pytest.param({"registers": 1}, True, id="registers"),
        pytest.param({"shared": 16}, True, id="shared"),
        pytest.param({"instructions": 8}, False, id="some-instructions"),
        pytest.param({"instructions": 1000}, True, id="instructions"),
    ],
)
def test_a_kernel_that_gets_worse_is_refused(change: dict[str, int], refused: bool) -> None:
    first, *rest = table_of("spike_slab_kl-M3", 90)
    changed = first._replace(**{name: getattr(first, name) + more for name, more in change.items()})
    with pytest.raises(AssertionError, match="before") if refused else nullcontext():
        assert_no_worse([changed, *rest], [first, *rest])


def test_a_source_is_another_after_any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the code, of a constant, and of the GPU that it is for; and the same where nothing has changed."""
    case = "spike_slab_kl-M3"
    before = sources(CASES[case], 90)
    assert len(before) == len(set(before)) == len(rows_of(case, 90)) and sources(CASES[case], 90) == before
    assert not set(before) & {*sources(CASES[case], 80), *sources(CASES["spike_slab_kl-M4"], 90)}
    # What the flags of a kernel are found by is wrapped around it.
    kernels = [getattr(value, "fn", None) for value in vars(spike_slab_kl).values() if isinstance(value, Heuristics)]
    for kernel in kernels:
        monkeypatch.setattr(kernel, "hash", f"another {kernel.cache_key}")
    assert not set(before) & set(sources(CASES[case], 90))


def rows_of(case: str, capability: int) -> list[dict[str, Any]]:
    """The rows of ``python -m bench.kernel_resources``; none where another Triton made them."""
    table = json.loads(TABLE.read_text())
    rows: list[dict[str, Any]] = table["kernels"][f"sm_{capability}"][case]
    return rows if table["triton"] == triton.__version__ else []


def table_of(case: str, capability: int) -> list[Kernel]:
    """The kernels of :func:`rows_of`; skips the test where there are none."""
    rows = rows_of(case, capability)
    if not rows:
        pytest.skip(f"compared with no table: it is of another Triton, and this is {triton.__version__}")
    return [kernel_of(row) for row in rows]


def kernel_of(row: dict[str, Any]) -> Kernel:
    return Kernel(**{name: row[name] for name in Kernel._fields})


def assert_no_worse(kernels: list[Kernel], before: list[Kernel]) -> None:
    assert [kernel.name for kernel in kernels] == [kernel.name for kernel in before], "make the table again"
    for kernel, old in zip(kernels, before):
        assert kernel.registers <= old.registers and kernel.shared <= old.shared, f"{kernel}, before {old}"
        assert kernel.instructions <= LEEWAY * old.instructions, f"{kernel}, before {old}"
