"""What the ops of the engine take: descriptions of drawn graphs, handles of programs, and lists of inputs.

Whatever description ``engine_program`` takes is run too, where the program is a small one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.engine.graph import Graph
from bqnn.engine.program import describe
from bqnn.engine.reference import run
from tests.support.answers import RETURNED, Answer, Answers, Arguments
from tests.support.breaks import INTEGERS, broken
from tests.support.draw_graphs import draw_graph
from tests.support.draws import Contract, Draw, Maker

GRAPHS = 60  # that programs are drawn from; the odd ones are quantized
MOST_BYTES = 2**20  # of an image, that a damaged program may take where it is run
STEP_WORDS = 33  # of a description, beside a step's inputs
OF_WEIGHTS = frozenset({"codes", "levels", "integers", "weight", "scale", "bias"})
LIMITS = {
    "cache": (0, 1, 2**10, 2**19, 2**63 - 1),
    "kept_panels": (0, 2**20),
    "wide_layer": (0, 100, 2**17, 2**63 - 1),
    "team": (0, 2, 2**63 - 1),
}


class Description(NamedTuple):
    """A graph, and what the extension is told of it."""

    graph: Graph
    inputs: tuple[Tensor, ...]
    words: Tensor
    numbers: Tensor
    tensors: list[Tensor]


@functools.cache
def description(number: int) -> Description:
    graph, inputs = draw_graph(number, quantized=number % 2 == 1)
    words, numbers, tensors = describe(graph)
    return Description(graph, inputs, torch.tensor(words), torch.tensor(numbers), tensors)


def drawn(draw: Draw) -> Description:
    if "graph" not in draw.facts:
        draw.facts["graph"] = draw.randrange(GRAPHS)
    return description(draw.facts["graph"])


@functools.cache
def handle_of(number: int) -> int:
    """A program that many calls have in common."""
    made = description(number)
    limits = {"kept_panels": (0, 2**20)[number % 3 > 0], "wide_layer": (1, 2**40)[number % 2], "team": number % 3}
    handle = torch.ops.bqnn_cpu.engine_program(made.words, made.numbers, made.tensors, **limits)
    _GRAPHS[handle] = number
    return handle


_GRAPHS: dict[int, int] = {}
"""By the handle of such a program, the number of its graph."""


def program(draw: Draw) -> int:
    drawn(draw)
    return handle_of(draw.facts["graph"])


def program_to_free(draw: Draw) -> int:
    """One of its own, so that the others stay."""
    made = description(0)
    handle = torch.ops.bqnn_cpu.engine_program(made.words, made.numbers, made.tensors)
    _TO_FREE.add(handle)
    return handle


_TO_FREE: set[int] = set()


def free(program: Any) -> None:
    """Frees what was made to be freed; what is not there is refused, and what somebody else made stays."""
    if not (isinstance(program, int) and program in _TO_FREE):
        with suppress(Exception):
            torch.ops.bqnn_cpu.engine_describe(program)
            return
    torch.ops.bqnn_cpu.engine_free(program)


def inputs(draw: Draw) -> list[Tensor]:
    """Float32 or bytes, of a batch of none to five."""
    batch = draw.choice((0, 1, 1, 2, 3, 5))
    found = [draw.normal(batch, *x.shape[1:]) for x in drawn(draw).inputs]
    return [(40 * x + 100).clamp(0, 255).byte() if draw.random() < 0.2 else x for x in found]


def limit(name: str) -> Maker:
    return lambda draw: draw.choice(LIMITS[name])


# --- what is wrong with them ------------------------------------------------------------------------------------------


def damaged_words(draw: Draw, words: Tensor, alone: bool) -> Tensor:
    """One or a few integers changed, the end cut off, or more added to it."""
    found = words.clone()
    if draw.random() < 0.1:
        length = draw.randrange(len(words))
        return found[:length].clone() if draw.random() < 0.5 else torch.cat([found, found[: length + 1]])
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(found))
        old = int(found[at])
        found[at] = draw.choice((-1, 0, 1, 2, 3, 5, 255, 2**20, *INTEGERS, old + 1, old - 1, 2 * old))
    return found


def damaged_list(draw: Draw, tensors: list[Tensor], alone: bool) -> list[Any]:
    """A tensor broken, or tensors swapped, repeated, left out or added."""
    found: list[Any] = list(tensors)
    if not found or draw.random() < 0.05:
        return draw.choice(([], [torch.zeros(1)], [torch.zeros(2, 3, 4, 5)]))
    at, other = draw.randrange(len(found)), draw.randrange(len(found))
    way = draw.random()
    if way < 0.7:
        found[at] = broken(draw, found[at], [], alone)
    elif way < 0.8:
        found[at], found[other] = found[other], found[at]
    elif way < 0.9:
        del found[at]
    else:
        found.insert(at, found[other])
    return found


# --- what they have to give -------------------------------------------------------------------------------------------


def shapes_of_inputs(words: list[int]) -> list[list[int]]:
    """The shapes of a graph's inputs, read from a description that is sound."""
    values = [words[1 + 6 * i : 7 + 6 * i] for i in range(words[0])]
    at = 1 + 6 * len(values)
    steps, at = words[at], at + 1
    for _ in range(steps):
        at += STEP_WORDS + words[at + 1]
    names = words[at + 1 : at + 1 + words[at]]
    return [values[name][1 : 1 + values[name][0]] for name in names]


def numbers_for(shapes: list[list[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, generator=generator) for shape in shapes]


def made_and_run(words: Tensor, numbers: Tensor, tensors: list[Tensor], *limits: Any, **named: Any) -> list[Tensor]:
    """What the program gives that this makes; nothing, where it is a large one."""
    handle = torch.ops.bqnn_cpu.engine_program(words, numbers, tensors, *limits, **named)
    try:
        local, shared = torch.ops.bqnn_cpu.engine_describe(handle).splitlines()[0].split()
        if int(local) + int(shared) > MOST_BYTES:
            return []
        return torch.ops.bqnn_cpu.engine_run(handle, numbers_for(shapes_of_inputs(words.flatten().tolist())))
    finally:
        torch.ops.bqnn_cpu.engine_free(handle)


def _expected(graph: Graph, given: list[Tensor]) -> Answers:
    """Where there are integers, a float32 sum that is rounded the other way is a step at once, and then a few."""
    quantized = any(value.dtype == "uint8" for value in graph.values.values())
    slack = 0.02 if quantized else 1e-4
    return {f"{RETURNED} {i}": Answer(y, slack) for i, y in enumerate(run(graph, given))}


def answer_of_a_new_program(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    if changed & {"words", "numbers", "tensors"}:
        return {}  # another graph
    graph = drawn(draw).graph
    return _expected(graph, numbers_for([list(graph.values[name].shape) for name in graph.inputs]))


def answer_of_a_run(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    number = _GRAPHS.get(int(given["program"]))
    if number is None:
        return {}  # somebody else's program
    read = [x.detach().double() for x in given["inputs"]]
    if not all(bool(x.isfinite().all()) and bool((x.abs() < 300.0).all()) for x in read):
        return {}
    return _expected(description(number).graph, read)


def no_answer(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {}


_DESCRIPTION: dict[str, Maker] = {
    "words": lambda draw: drawn(draw).words.clone(),
    "numbers": lambda draw: drawn(draw).numbers.clone(),
    "tensors": lambda draw: list(drawn(draw).tensors),
    **{name: limit(name) for name in LIMITS},
}
_CALL: dict[str, Maker] = {"program": program, "inputs": inputs}
_WAYS: dict[str, Callable[[Draw, Any, bool], Any]] = {
    "words": damaged_words,
    "tensors": damaged_list,
    "inputs": damaged_list,
}


def engine() -> dict[str, Contract]:
    """The contracts, by name."""
    ops = torch.ops.bqnn_cpu
    return {
        "engine_program": Contract(
            made_and_run, _DESCRIPTION, answer_of_a_new_program, ways=_WAYS, also_named=OF_WEIGHTS
        ),
        "engine_run": Contract(ops.engine_run, _CALL, answer_of_a_run, ways=_WAYS),
        "engine_times": Contract(ops.engine_times, _CALL, no_answer, ways=_WAYS),
        "engine_describe": Contract(
            ops.engine_describe, {"program": program, "images": lambda draw: draw.choice((0, 1, 2, 64))}, no_answer
        ),
        "engine_free": Contract(free, {"program": program_to_free}, no_answer),
    }
