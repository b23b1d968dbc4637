"""Packed products on a GPU against cuBLAS and cuDNN in bfloat16 and against packages that are installed.

Weights take turns, so that none is found in a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bench.gpu_rivals import RIVALS, Absent, Rival, find
from bench.gpu_rows import Row, measured
from bench.gpu_timing import Call, Meter
from bench.summary import Verdict
from bqnn.ops.backends.gpu_layout import row_words

NUM_LEVELS = 3
BATCHES = (1, 8, 16, 64, 128, 1024)
FASTER = {
    (size, batch): factor
    for size, factors in {
        4096: (2.5, 2.5, 2.0, 1.3, 1.0, 0.95),
        8192: (5.0, 5.0, 4.5, 2.2, 1.3, 0.95),
        16384: (6.0, 6.0, 5.0, 2.4, 1.3, 0.95),
    }.items()
    for batch, factor in zip(BATCHES, factors)
}
"""How many times faster than cuBLAS in bfloat16 layers of precision "bf16" shall be, by size and batch."""
INT8_FASTER = {(8192, 1024): 1.3, (16384, 1024): 1.3}
"""The same of precision "int8", by size and batch."""
GEMV_BANDWIDTH = 0.6
"""The share of a copy's bandwidth that reading the words of codes shall reach, at one row of the largest size."""
CONV = (128, 128, 3, 32, 128)
"""The convolution: inputs, channels, kernel, image, batch."""
CONV_FASTER, CONV_SMALLER = 0.85, 8.0
"""How many times faster than cuDNN the convolution shall be, and how many times smaller its weight."""
ALLOWED = {"bf16": 2e-2, "int8": 5e-2}
"""The root mean square error that each precision may have, relative to the product in float32."""
DENSE = "bf16 dense"


class Problem(NamedTuple):
    """A layer without a bias, and what it takes."""

    case: str
    make: Callable[[], nn.Module]
    x: Tensor
    weights: int
    product: Callable[[Tensor, Tensor], Tensor]


def linear_case(size: int, batch: int) -> str:
    return f"packed_linear-{size}-B{batch}"


def linear_rows(size: int, batch: int, meter: Meter, known: Mapping[str, Rival] = RIVALS) -> Iterator[Row]:
    """A linear layer: both precisions, nn.Linear in bfloat16, and rivals."""
    x = torch.randn(batch, size, device=meter.device).bfloat16()
    problem = Problem(linear_case(size, batch), lambda: nn.Linear(size, size, bias=False), x, size * size, F.linear)
    yield from _rows(problem, meter, {name: known[name] for name in rivals(known)[0]}, size)


def conv2d_rows(shape: tuple[int, int, int, int, int], meter: Meter) -> Iterator[Row]:
    """A 3x3 layer, channels-last."""
    inputs, channels, kernel, image, batch = shape
    x = torch.randn(batch, inputs, image, image, device=meter.device).bfloat16()
    problem = Problem(
        "packed_conv2d",
        lambda: nn.Conv2d(inputs, channels, kernel, padding=1, bias=False),
        x.to(memory_format=torch.channels_last),
        inputs * channels * kernel * kernel,
        lambda x, weight: F.conv2d(x, weight, padding=1),
    )
    yield from _rows(problem, meter)


def rivals(known: Mapping[str, Rival] = RIVALS) -> tuple[list[str], dict[str, str]]:
    """The rivals that are here, and why the others are not."""
    here, absent = [], {}
    for name, rival in known.items():
        try:
            find(rival.package)
        except Absent as error:
            absent[name] = str(error)
        else:
            here.append(name)
    return here, absent


@torch.inference_mode()
def _rows(problem: Problem, meter: Meter, known: Mapping[str, Rival] | None = None, size: int = 0) -> Iterator[Row]:
    case, make, x, weights, _ = problem
    torch.manual_seed(0)
    quantized = bqnn.convert(nn.Sequential(make()), NUM_LEVELS).eval()
    calls, errors, weight_bytes, said = {}, {}, {}, {}
    for precision in ALLOWED:
        packed = bqnn.pack(quantized, precision=precision).to(x.device)
        errors[precision] = _checked(problem, packed, packed[0].decode(), ALLOWED[precision], meter)
        layers = [copy.deepcopy(packed) for _ in range(meter.copies(weights / 4))]
        calls[precision] = _calls(layers, x)
        weight_bytes[precision] = packed[0].codes.nbytes + packed[0].levels.nbytes
        if packed[0].execution_for(x) == "dense":  # then that time says nothing of the kernel
            forced = copy.deepcopy(layers)
            for layer in forced:
                layer[0].execution = "packed"
            calls[f"{precision} packed"] = _calls(forced, x)
    dense = [make().to(x.device, torch.bfloat16) for _ in range(meter.copies(2 * weights))]
    if x.dim() == 4:
        dense = [layer.to(memory_format=torch.channels_last) for layer in dense]
    calls[DENSE], weight_bytes[DENSE] = _calls(dense, x), 2 * weights
    for name, rival in (known or {}).items():
        try:
            calls[name] = _rival(problem, rival, size, meter)
        except Exception as error:  # a rival's trouble is not ours
            said[name] = f"{type(error).__name__}: {error}"
    for variant, cost in meter.costs(calls).items():
        yield measured(case, variant, cost, errors.get(variant), weight_bytes.get(variant))
    for name, reason in said.items():
        yield Row(case, name, said=reason)


def _rival(problem: Problem, rival: Rival, size: int, meter: Meter) -> list[Call]:
    """What is timed, once its result is seen to be right."""
    layers, dense = rival.make(size, meter.copies(problem.weights * rival.bits / 8), problem.x.device)
    _checked(problem, layers[0], dense, ALLOWED["bf16"], meter)
    return _calls(layers, problem.x)


def _calls(layers: Sequence[nn.Module], x: Tensor) -> list[Call]:
    return [partial(layer, x) for layer in layers]


def _checked(problem: Problem, layer: nn.Module, dense: Tensor, allowed: float, meter: Meter) -> float | None:
    """How far a layer's output is from the float32 product with the weight that it stands for."""
    exact = problem.product(problem.x.float(), dense.to(problem.x.device))
    error = meter.distance([layer(problem.x).float()], [exact])
    assert error is None or error <= allowed, f"{problem.case}: {error:.2g} off"
    return error


def verdicts(
    rows: Sequence[Row], bandwidth: float | None, asked: Mapping[tuple[int, int], float] = FASTER
) -> Iterator[Verdict]:
    """One for each figure that is asked, where its rows are; ``bandwidth`` of a copy, bytes a second."""
    found = {(row.case, row.variant): row for row in rows}

    def seconds(case: str, variant: str) -> float | None:
        row = found.get((case, variant))
        return None if row is None else row.best_seconds

    def faster(case: str, variant: str, factor: float) -> Iterator[Verdict]:
        ours, dense = seconds(case, variant), seconds(case, DENSE)
        if ours and dense:
            yield Verdict(f"{case}: time of {DENSE} over {variant}", factor, dense / ours)

    for (size, batch), factor in asked.items():
        yield from faster(linear_case(size, batch), "bf16", factor)
        if (size, batch) in INT8_FASTER:
            yield from faster(linear_case(size, batch), "int8", INT8_FASTER[size, batch])
    size, _ = max(asked)
    gemv = seconds(linear_case(size, 1), "bf16")
    if gemv and bandwidth:
        share = 4 * size * row_words(NUM_LEVELS, size) / gemv / bandwidth
        case = linear_case(size, 1)
        yield Verdict(f"{case}: share of the copy's bandwidth, words of codes", GEMV_BANDWIDTH, share)
    yield from faster("packed_conv2d", "bf16", CONV_FASTER)
    conv2d, dense = (found.get(("packed_conv2d", variant)) for variant in ("bf16", DENSE))
    if conv2d and dense and conv2d.weight_bytes and dense.weight_bytes:
        ratio = dense.weight_bytes / conv2d.weight_bytes
        yield Verdict(f"packed_conv2d: bytes of the weight, {DENSE} over packed", CONV_SMALLER, ratio)
