"""Packed products on a GPU against cuBLAS and cuDNN in bfloat16 and against packages that are installed.

What is timed are CUDA graphs of many calls over rotating weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bench.gpu_rivals import RIVALS, Absent, Rival, find
from bench.gpu_timing import ROUNDS, costs
from bench.gpu_training import Row
from bench.summary import Verdict
from bqnn.ops.backends.gpu_layout import row_words

CALLS = 50
ROTATED_BYTES = 256 << 20
"""Bytes of the weights that take turns: more than a second-level cache holds."""
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


def linear_rows(
    size: int, batch: int, device: torch.device, known: Mapping[str, Rival] = RIVALS, rounds: int = ROUNDS
) -> Iterator[Row]:
    """A linear layer: both precisions, nn.Linear in bfloat16, and rivals."""
    x = torch.randn(batch, size, device=device).bfloat16()
    problem = Problem(linear_case(size, batch), lambda: nn.Linear(size, size, bias=False), x, size * size, F.linear)
    yield from _rows(problem, {name: _rival(problem, known[name], size) for name in rivals(known)[0]}, rounds)


def conv2d_rows(
    device: torch.device, shape: tuple[int, int, int, int, int] = CONV, rounds: int = ROUNDS
) -> Iterator[Row]:
    """A 3x3 layer, channels-last."""
    inputs, channels, kernel, image, batch = shape
    x = torch.randn(batch, inputs, image, image, device=device).bfloat16().to(memory_format=torch.channels_last)
    problem = Problem(
        "packed_conv2d",
        lambda: nn.Conv2d(inputs, channels, kernel, padding=1, bias=False),
        x,
        inputs * channels * kernel * kernel,
        lambda x, weight: F.conv2d(x, weight, padding=1),
    )
    yield from _rows(problem, {}, rounds)


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
def _rows(problem: Problem, others: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> Iterator[Row]:
    case, make, x, weights, product = problem
    torch.manual_seed(0)
    quantized = bqnn.convert(nn.Sequential(make()), NUM_LEVELS).eval()
    calls, errors, weight_bytes = {}, {}, {}
    for precision in ALLOWED:
        packed = [bqnn.pack(quantized, precision=precision).to(x.device) for _ in range(_copies(x, weights, 2))]
        errors[precision] = _error(problem, packed[0], packed[0][0].decode())
        assert errors[precision] <= ALLOWED[precision], f"{case}: {precision} is {errors[precision]:.2g} off"
        calls[precision] = _replayed(packed, x)
        weight_bytes[precision] = packed[0][0].codes.nbytes + packed[0][0].levels.nbytes
        if packed[0][0].execution_for(x) == "dense":  # then that time says nothing of the kernel
            forced = copy.deepcopy(packed)
            for layer in forced:
                layer[0].execution = "packed"
            calls[f"{precision} packed"] = _replayed(forced, x)
    dense = [make().to(x.device, torch.bfloat16) for _ in range(_copies(x, weights, 16))]
    if x.dim() == 4:
        dense = [layer.to(memory_format=torch.channels_last) for layer in dense]
    calls[DENSE], weight_bytes[DENSE] = _replayed(dense, x), 2 * weights
    for name, other in others.items():
        try:
            calls[name] = other()
        except Exception as error:  # a rival's trouble is not ours
            print(f"{case}: no time for {name}, {type(error).__name__}: {error}", flush=True)
    for variant, cost in costs(calls, x.device, rounds).items():
        yield Row(case, variant, cost.seconds / CALLS, cost.peak_bytes, errors.get(variant), weight_bytes.get(variant))


def _rival(problem: Problem, rival: Rival, size: int) -> Callable[[], Callable[[], object]]:
    """Makes what is timed, once its result is seen to be right."""

    def make() -> Callable[[], object]:
        copies = _copies(problem.x, problem.weights, rival.bits)
        layers, dense = rival.make(size, copies, problem.x.device)
        error = _error(problem, layers[0], dense)
        assert error <= ALLOWED["bf16"], f"it is {error:.2g} off"
        return _replayed(layers, problem.x)

    return make


def _copies(x: Tensor, weights: int, bits: int) -> int:
    return max(1, min(CALLS, 8 * ROTATED_BYTES // (bits * weights))) if x.is_cuda else 1


def _error(problem: Problem, layer: nn.Module, dense: Tensor) -> float:
    """How far a layer's output is from the float32 product with the weight that it stands for."""
    exact = problem.product(problem.x.float(), dense.to(problem.x.device))
    found = layer(problem.x).float()
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _replayed(layers: list[nn.Module], x: Tensor) -> Callable[[], object]:
    """CALLS calls, the layers in turns, as one CUDA graph; on the CPU as a loop."""

    def loop() -> None:
        for i in range(CALLS):
            layers[i % len(layers)](x)

    if not x.is_cuda:
        return loop
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay


def verdicts(rows: list[Row], bandwidth: float, asked: Mapping[tuple[int, int], float] = FASTER) -> Iterator[Verdict]:
    """One for each figure that is asked, where its rows are; ``bandwidth`` of a copy, bytes a second."""
    found = {(row.case, row.variant): row for row in rows}

    def faster(case: str, variant: str, factor: float) -> Iterator[Verdict]:
        ours, dense = found.get((case, variant)), found.get((case, DENSE))
        if ours and dense:
            yield Verdict(f"{case}: time of {DENSE} over {variant}", factor, dense.seconds / ours.seconds)

    for (size, batch), factor in asked.items():
        yield from faster(linear_case(size, batch), "bf16", factor)
        if (size, batch) in INT8_FASTER:
            yield from faster(linear_case(size, batch), "int8", INT8_FASTER[size, batch])
    size, _ = max(asked)
    if gemv := found.get((linear_case(size, 1), "bf16")):
        share = 4 * size * row_words(NUM_LEVELS, size) / gemv.seconds / bandwidth
        yield Verdict(f"{gemv.case}: share of the copy's bandwidth, words of codes", GEMV_BANDWIDTH, share)
    yield from faster("packed_conv2d", "bf16", CONV_FASTER)
    conv2d, dense = (found.get(("packed_conv2d", variant)) for variant in ("bf16", DENSE))
    if conv2d and dense and conv2d.weight_bytes and dense.weight_bytes:
        ratio = dense.weight_bytes / conv2d.weight_bytes
        yield Verdict(f"packed_conv2d: bytes of the weight, {DENSE} over packed", CONV_SMALLER, ratio)
