"""Calls with hostile arguments of every op of the extension and of the public functions, and a judge of what they do.

    python -m tests.support.hostile --calls 1000 [--ops sample packed_linear ...] [--seed 0] [--first 0]

makes so many calls of each, and prints what became of them. A call has to answer, rightly, or to say which argument is
wrong. Call number i of an op and a seed is the same wherever it is made, so that ``--first i --calls 1`` repeats it.
``python -m tests.support.sanitized`` takes the same arguments, and runs the extension that is built with sanitizers.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch._dynamo  # takes seconds, which are not to be those of the call that needs it first
from torch import Tensor

from bqnn.ops.dispatch import BackendError
from tests.support.answers import RETURNED, Answer
from tests.support.breaks import broken
from tests.support.contracts import extension
from tests.support.draws import Contract, Draw
from tests.support.public_contracts import public

ODD = 0.05  # the share of calls whose sizes agree, and are odd ones
OWN_WAY = 0.8  # the share of broken arguments that are broken as their contract says, if it does
VALID = 0.15  # the share of calls that nothing is wrong with
SECONDS = 5.0  # that a call may take at most
MOST_TOLD = 10  # faults of one op that are printed
ORDINARY = {"tau": (0.01, 10.0), "scale": (0.01, 10.0), "log_sigma2": (-12.0, 6.0), "int8_scale": (1e-3, 10.0)}
ORDINARY["slab_sigma2"] = (0.01, 10.0)
"""Numbers between which float32 is near to float64; others may be up to 100 in size."""
INCREASING = ("levels", "thresholds")

# What torch says before the op, or in place of it, and is clear of itself.
OF_TORCH = (
    r"\w+::\w+\(\) (Expected a value of type|is missing value|expected at most)",
    r"Could not run '\w+::\w+' with arguments from the '\w+' backend",
    r"\w+::\w+: attempted to run this operator with Meta tensors",
    r".*can't allocate memory: you tried to allocate",
    r"There were no tensor arguments to this function",
    r"array is too big|(Storage size|Stride) calculation overflowed",
    r"Tensor on device \w+ is not on the expected device",
    r"Inference tensors cannot be saved for backward",
    r"Calculated padded input size per channel",
    r"Padding value causes wrapping around more than once",
    r"Expected Tensor but got None",
    r"Cannot access storage of \w+",
    r"(negation|conjugate) fallback does not support",
    r"setStorage: sizes",  # where it prints an argument whose storage somebody has made smaller
)


class Call(NamedTuple):
    """Arguments, and what has been done to them."""

    draw: Draw
    arguments: dict[str, Any]
    changed: set[str]
    """The names of those that are broken, or "sizes" for those that agree and are odd; of a valid call, none."""


class Fault(Exception):
    """What a call must not do."""


def draw(name: str, contract: Contract, seed: int, number: int) -> Call:
    """The call of this number: always the same."""
    choices, changed = Draw(f"{seed} {name} {number}"), set[str]()
    arguments = {each: make(choices) for each, make in contract.arguments.items()}
    if arguments and choices.random() < ODD:
        odd = Draw(f"{seed} {name} {number}", odd=True)
        with suppress(ArithmeticError, IndexError, RuntimeError, ValueError):  # there are no such arguments
            arguments = {each: make(odd) for each, make in contract.arguments.items()}
            return Call(odd, arguments, {"sizes"})
    if arguments and choices.random() >= VALID:
        names = choices.sample(list(arguments), min(len(arguments), choices.choice((1, 1, 1, 2, 3))))
        for each in names:
            others = [value for other, value in arguments.items() if other != each]
            if each in contract.kept:
                continue
            alone = contract.ours and len(names) == 1
            if each in contract.ways and choices.random() < OWN_WAY:
                arguments[each] = contract.ways[each](choices, arguments[each], alone)
            else:
                arguments[each] = broken(choices, arguments[each], others, alone)
            low, high = contract.costly.get(each, (0.0, 0.0))
            if low < _largest(arguments[each]) < high:
                arguments[each] = -1
            changed.add(each)
    return Call(choices, arguments, changed)


def _largest(value: Any) -> float:
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, (int, float)) else 0


def judge(contract: Contract, call: Call) -> str:
    """What became of the call: "refused", "right", or "answered" where the right answer is not known.

    Raises:
        Fault: an error that does not say what is wrong, a wrong answer, an answer of a valid call that is none, or a
            call that takes too long.
    """
    before = {
        name: value.clone() if name in contract.written and _is_readable(value) else value
        for name, value in call.arguments.items()
    }
    started = time.process_time()
    try:
        result = contract.run(**call.arguments)
    except Exception as error:
        if not _is_clear(error, contract) or not call.changed:
            raise Fault(f"{type(error).__name__}: {str(error)[:500]}") from error
        return "refused"
    finally:
        if time.process_time() - started > SECONDS:
            raise Fault(f"it took {time.process_time() - started:.1f} s")
    return _compared(contract, call, before, result)


def _is_clear(error: Exception, contract: Contract) -> bool:
    """Whether the error says which argument is wrong."""
    message = str(error)
    if "INTERNAL ASSERT" in message:
        return False
    if isinstance(error, (RuntimeError, ValueError)) and any(re.match(each, message, re.DOTALL) for each in OF_TORCH):
        return True
    if contract.ours:
        found = re.match(r"(\w+) must be .+, got .", message, re.DOTALL)
        names = contract.also_named | set(contract.arguments)
        return type(error) is ValueError and found is not None and found[1] in names
    words = set(re.findall(r"\w+", message))
    named = words & (set(contract.arguments) | contract.also_named)
    return isinstance(error, BackendError) or (type(error) in (TypeError, ValueError) and bool(named))


def _compared(contract: Contract, call: Call, before: dict[str, Any], result: Any) -> str:
    if not all(_is_ordinary(name, value) for name, value in before.items() if name not in contract.unread):
        return "answered"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = contract.answer(call.draw, before, call.changed)
        except Exception as error:
            raise Fault(f"it took what its reference does not: {type(error).__name__}: {str(error)[:300]}") from error
    outputs = {**call.arguments, **_named(result)} if contract.written else _named(result)
    for name, answer in expected.items():
        found = outputs.get(name)
        if found is not None:
            _check(name, found.detach(), answer)
    return "right" if expected else "answered"


def _named(result: Any) -> dict[str, Any]:
    if isinstance(result, (tuple, list)):
        return {f"{RETURNED} {i}": each for i, each in enumerate(result)}
    return {RETURNED: result}


def _check(name: str, found: Tensor, answer: Answer) -> None:
    if found.numel() != answer.value.numel():
        raise Fault(f"{name} has the shape {list(found.shape)} and not {list(answer.value.shape)}")
    low = answer.value.detach().reshape(-1)
    if answer.slack == 0.0:
        if not torch.equal(found.reshape(-1).to(low.dtype), low):
            raise Fault(f"{name} has other numbers than it has to have")
        return
    high = low if answer.high is None else answer.high.reshape(-1)
    found, low, high = found.reshape(-1).double(), torch.minimum(low, high), torch.maximum(low, high)
    finite = low.abs()[low.isfinite()]
    slack = answer.slack * max(float(finite.amax()) if len(finite) else 0.0, 1e-3)
    beyond = ~((found >= low - slack) & (found <= high + slack)) & ~(found.isnan() & low.isnan())
    if beyond.any():
        i = int(beyond.nonzero()[0])
        raise Fault(f"{name}[{i}] is {float(found[i]):g}, and not {float(low[i]):g} to {float(high[i]):g} +- {slack:g}")


def _is_readable(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.numel() > 10**6:
        return False
    if value.dim() > 32:
        return False  # references take a few dimensions more
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride())) + value.storage_offset()
    if value.numel() == 0:
        return max(value.shape) < 10**6  # as torch has tensors
    return (last + 1) * value.element_size() <= value.untyped_storage().nbytes()


def _is_ordinary(name: str, value: Any) -> bool:
    """Whether this argument lets the answer be compared with one in float64."""
    if not isinstance(value, Tensor):
        return True
    if not _is_readable(value):
        return False
    if not value.is_floating_point() or value.numel() == 0:
        return not value.is_complex()
    low, high = ORDINARY.get(name, (-100.0, 100.0))
    numbers = value.detach().double()
    if name in INCREASING and (numbers.dim() != 2 or not (numbers.diff(dim=1) > 1e-3).all()):
        return False
    small = (numbers != 0.0) & (numbers.abs() < 1e-6)
    return bool(((numbers >= low) & (numbers <= high) & ~small).all())


def contracts() -> dict[str, Contract]:
    """Everything that can be called, by name; the extension's ops are called "bqnn_cpu::<op>"."""
    return {**{f"bqnn_cpu::{name}": each for name, each in extension().items()}, **public()}


class Journal:
    """A file that says which call is being made, for who finds the process dead."""

    def __init__(self, path: str | None) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) if path else None

    def note(self, text: str) -> None:
        if self._file is not None:
            os.pwrite(self._file, text.ljust(80).encode() + b"\n", 0)


def run(
    names: Iterable[str], calls: int, seed: int = 0, first: int = 0, journal: Journal | None = None
) -> dict[str, collections.Counter[str]]:
    """What became of so many calls of each; what was a :class:`Fault` is printed, and counted as "fault"."""
    found, table = {}, contracts()
    for name in names:
        counts: collections.Counter[str] = collections.Counter()
        for number in range(first, first + calls):
            if journal:
                journal.note(f"--ops {name} --seed {seed} --first {number} --calls 1")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = draw(name, table[name], seed, number)
                fate = _fate(table[name], call)
            if isinstance(fate, Fault):
                counts["fault"] += 1
                if counts["fault"] <= MOST_TOLD:
                    where = f"--ops {name} --seed {seed} --first {number} --calls 1"
                    print(f"{where}: broken {', '.join(sorted(call.changed)) or 'nothing'}: {fate}", flush=True)
            else:
                counts[fate] += 1
        found[name] = counts
    return found


def _fate(contract: Contract, call: Call) -> str | Fault:
    try:
        return judge(contract, call)
    except Fault as fault:
        return fault


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=500, help="of each op")
    parser.add_argument("--ops", nargs="*", default=["*"], help="names, or patterns such as 'bqnn_cpu::*'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--journal", help="a file that says which call is being made")
    options = parser.parse_args(arguments)
    names = [name for name in contracts() if any(fnmatchcase(name, each) for each in options.ops)]
    journal, faults = Journal(options.journal), 0
    print(f"{'':32}{'calls':>8}{'refused':>9}{'right':>8}{'answered':>9}{'faults':>8}{'seconds':>9}")
    for name in names:
        started = time.process_time()
        (counts,) = run([name], options.calls, options.seed, options.first, journal).values()
        faults += counts["fault"]
        columns = "".join(f"{counts[kind]:>{width}}" for kind, width in (("refused", 9), ("right", 8), ("answered", 9)))
        seconds = time.process_time() - started
        print(f"{name:32}{counts.total():>8}{columns}{counts['fault']:>8}{seconds:>9.1f}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
