"""Hostile arguments, drawn: every op of the extension and every public function answers rightly, or says what is wrong.

`make sanitize` makes more of these calls, with the extension built with sanitizers.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core import native
from tests.support import hostile
from tests.support.answers import RETURNED, Answer
from tests.support.contracts import extension
from tests.support.draws import Contract, Draw
from tests.support.public_contracts import public

needs_extension = pytest.mark.skipif(bool(native.MISSING), reason="no CPU kernels")
EXTENSION = sorted(extension())
PUBLIC = sorted(public())


def schemas() -> dict[str, Any]:
    found = {each.name.split("::")[1]: each for each in torch._C._jit_get_all_schemas() if "bqnn_cpu::" in each.name}
    assert found
    return found


@needs_extension
def test_every_op_of_the_extension_is_declared() -> None:
    """With its arguments in their order, and what it writes."""
    declared = extension()
    assert set(declared) == set(schemas())
    for name, schema in schemas().items():
        assert list(declared[name].arguments) == [each.name for each in schema.arguments], name
        written = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        # A result in "mean" and "variance" of an op that changes the second only where it is asked to is both.
        assert sorted(declared[name].written) == sorted(written), name


def test_every_public_op_is_declared() -> None:
    assert set(bqnn.ops.__all__) <= set(PUBLIC)


@needs_extension
@pytest.mark.parametrize("op", EXTENSION)
def test_ops_of_the_extension(op: str) -> None:
    name = f"bqnn_cpu::{op}"
    counts = hostile.run([name], calls=250)[name]
    assert counts["fault"] == 0
    if op != "isa":
        assert counts["refused"] > 50, "most broken arguments have to be refused"
        assert counts["right"] + counts["answered"] > 40, "and what is right has to be answered"
    if hostile.contracts()[name].written:
        assert counts["right"] > 30, "with the right answer"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name: str) -> None:
    counts = hostile.run([name], calls=150)[name]
    assert counts["fault"] == 0
    assert counts["refused"] > 15
    assert counts["right"] + counts["answered"] > 12


def told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape, hostile._is_readable(value) and value.detach().double().tolist()
    return value if isinstance(value, (int, float, str, list, tuple, type(None))) else type(value)


def test_a_number_and_a_seed_are_one_call() -> None:
    for name in ("assign_codes", "packed_conv2d", "BayesLinear"):
        contract, seen = public()[name], set()
        for number in range(60):
            calls = [hostile.draw(name, contract, seed, number) for seed in (0, 0, 1)]
            first, again, other = (repr({key: told(each) for key, each in call.arguments.items()}) for call in calls)
            assert first == again != other
            seen.add(first)
        assert len(seen) == 60


def judged(run: Any, answer: Any = lambda draw, given, changed: {}, changed: set[str] | None = None) -> str:
    contract = Contract(run, {"x": lambda draw: torch.zeros(2)}, answer)
    arguments = {"x": torch.zeros(2)}
    return hostile.judge(contract, hostile.Call(Draw(""), arguments, {"x"} if changed is None else changed))


def raising(error: Exception) -> Any:
    def run(x: Tensor) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ValueError("y must be a matrix, got 3"), id="another-name"),
        pytest.param(ValueError("x is wrong"), id="another-form"),
        pytest.param(RuntimeError("x must be a matrix, got 3"), id="another-kind"),
        pytest.param(RuntimeError("x INTERNAL ASSERT FAILED"), id="assert"),
        pytest.param(SystemError("error return without exception set"), id="system"),
        pytest.param(IndexError("list index out of range"), id="index"),
    ],
)
def test_an_unclear_error_is_a_fault(error: Exception) -> None:
    assert judged(raising(ValueError("x must be a matrix, got 3"))) == "refused"
    with pytest.raises(hostile.Fault, match=re.escape(str(error))):
        judged(raising(error))


def test_a_valid_call_has_to_be_answered() -> None:
    with pytest.raises(hostile.Fault):
        judged(raising(ValueError("x must be a matrix, got 3")), changed=set())


def test_a_wrong_answer_is_a_fault() -> None:
    def answer(draw: Draw, given: dict[str, Any], changed: set[str]) -> dict[str, Answer]:
        return {RETURNED: Answer(torch.ones(2, dtype=torch.float64))}

    assert judged(lambda x: x + 1.0, answer) == "right"
    for wrong in (lambda x: x + 1.1, lambda x: x, lambda x: x / x, lambda x: torch.ones(3)):
        with pytest.raises(hostile.Fault, match=RETURNED):
            judged(wrong, answer)
