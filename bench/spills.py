"""``python -m bench.spills``: compiles what launchers choose for every kind of weight and product, and counts spills.

Without a GPU, for sm_80, sm_90 and sm_100 and every kind of call, or those that are named: ``python -m bench.spills 90
bf16 moment_linear``, where bf16, fp32 and int8 are the precisions of packed products. Prints each kernel that spills
registers, and exits with 1 where there is one. Tests compile a choice of these (tests/support/compile_cases.py): all of
them take about an hour a target.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

from bqnn.core.quantizer import MODES
from bqnn.kernels import moment_conv2d, sample_conv2d
from tests.support.aot import TARGETS, compiled
from tests.support.compile_cases import (
    call_conv2d,
    call_moment_linear,
    call_packed_conv2d,
    call_packed_linear,
    call_sample_linear,
    in_parts,
    in_tf32,
)
from tests.support.shapes import Conv2dShape

Codebooks = tuple[tuple[int, bool], ...]
Calls = Iterator[tuple[str, Callable[[], Any]]]

PACKED_ROWS = {"fp32": (1, 16, 32, 64), "bf16": (1, 16, 32, 64, 128), "int8": (1, 16, 32, 64, 128)}
PACKED_LEVELS = (2, 3, 4, 5, 16)
SIDES = {16: 4, 32: 5, 64: 8, 128: 12}
"""The side of an image with about so many pixels."""
CODEBOOKS = tuple(itertools.product((3, 4, 16), (False, True)))
"""(num_levels, channel) of the training ops: a codebook that is unrolled, one that stays in registers, and one that
does not."""
ROWS = {"bfloat16": (16, 32, 64, 128, 256), "float16": (64,), "float32": (16, 32, 64), "tf32": (16, 32, 64)}
COLUMNS = (512, 511)
# A convolution's kernels differ by mode and codebook, and not every mode has a kernel for every codebook.
CONV2D: dict[str, tuple[ModuleType, list[tuple[dict[str, Any], Codebooks]]]] = {
    "sample_conv2d": (sample_conv2d, [({}, CODEBOOKS)]),
    "moment_conv2d": (
        moment_conv2d,
        [({"mode": mode, "coarse": True}, CODEBOOKS if mode != "gaussian" else CODEBOOKS[:1]) for mode in MODES],
    ),
}


def packed_calls(precision: str) -> Calls:
    for num_levels, groups, rows in itertools.product(PACKED_LEVELS, (1, 512), PACKED_ROWS[precision]):
        name = f"{precision} M{num_levels} {'channel' if groups > 1 else 'tensor'} B{rows}"
        yield f"packed_linear {name}", partial(call_packed_linear, rows, precision, num_levels, groups)
        if rows > 1:
            shape = (1, 128, SIDES[rows], SIDES[rows])
            yield f"packed_conv2d {name}", partial(call_packed_conv2d, shape, 512, precision, num_levels, groups)


def products() -> Iterator[tuple[str, torch.dtype, Callable[[Callable[[], Any]], Any]]]:
    """Name, dtype, and what runs a call."""
    yield "bfloat16", torch.bfloat16, lambda call: call()
    yield "float16", torch.float16, lambda call: call()
    yield "float32", torch.float32, lambda call: call()
    yield "tf32", torch.float32, in_tf32


def sample_linear_calls() -> Calls:
    for name, dtype, run in products():
        for rows, columns, (num_levels, channel) in itertools.product(ROWS[name], COLUMNS, CODEBOOKS):
            call = partial(call_sample_linear, rows, dtype, columns, num_levels, 256 if channel else 1)
            described = f"sample_linear {name} B{rows} K{columns} M{num_levels} {channel=}"
            yield described, partial(run, call)
            if (num_levels, channel) == CODEBOOKS[-1]:
                yield f"{described} deterministic", partial(run, partial(call, stochastic=False))


def moment_linear_calls() -> Calls:
    weights = [("categorical", *codebook) for codebook in CODEBOOKS]
    weights += [("straight_through", 16, False), ("straight_through", 16, True), ("gaussian", 3, False)]
    for name, dtype, run in products():
        ways = itertools.product(ROWS[name][:4], COLUMNS, weights, ("coarse", "exact", "parts"))
        for rows, columns, (mode, num_levels, channel), way in ways:
            if way != "coarse" and (columns != COLUMNS[0] or (num_levels, channel) not in ((3, False), (16, True))):
                continue
            groups = 256 if channel else 1
            call = partial(call_moment_linear, rows, dtype, columns, num_levels, groups, mode, way != "exact")
            described = f"moment_linear {name} B{rows} K{columns} {mode} M{num_levels} {channel=} {way}"
            yield described, partial(run, partial(in_parts, call) if way == "parts" else call)


def conv2d_calls(name: str) -> Calls:
    op, modes = CONV2D[name]
    few, many = [(1, side, side) for side in SIDES.values()], (8, 16, 16)
    weights = [(mode, codebook) for mode, codebooks in modes for codebook in codebooks]
    same: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1)}
    # A product makes its weight for a few pixels only, from a block of its own width: other inputs and many pixels need
    # no other codebooks.
    plain = [
        (Conv2dShape(batch, inputs, channels, *size, **same), weights if inputs == 64 and batch == 1 else weights[:1])
        for channels, inputs, (batch, *size) in itertools.product((12, 32, 64, 128), (6, 16, 32, 64, 128), [*few, many])
    ]
    other = [
        (Conv2dShape(batch, inputs, 128, *size, **same, **geometry), weights[:1])
        for (batch, *size), inputs, geometry in itertools.product(
            (few[-1], many), (6, 64), ({"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2})
        )
    ]
    for dtype, tf32 in ((torch.bfloat16, True), (torch.float32, False), (torch.float32, True)):
        for shape, chosen in plain + other:
            for mode, (num_levels, channel) in chosen:
                described = f"{name} {dtype} {tf32=} {shape.id} M{num_levels} {channel=} {mode}"
                call = partial(call_conv2d, op, shape, dtype, num_levels, shape.channels if channel else 1, tf32)
                yield described, partial(call, **mode)
            if len(chosen) > 1:
                call = partial(call_conv2d, op, shape, dtype, tf32=tf32, **weights[0][0])
                yield f"{name} {dtype} {tf32=} {shape.id} parts", partial(in_parts, call)


KINDS: dict[str, Callable[[], Calls]] = {
    **{precision: partial(packed_calls, precision) for precision in PACKED_ROWS},
    "sample_linear": sample_linear_calls,
    "moment_linear": moment_linear_calls,
    "sample_conv2d": partial(conv2d_calls, "sample_conv2d"),
    "moment_conv2d": partial(conv2d_calls, "moment_conv2d"),
}


def main() -> None:
    named = sys.argv[1:]
    capabilities = [capability for capability in TARGETS if str(capability) in named] or TARGETS
    kinds = [kind for kind in KINDS if kind in named] or list(KINDS)
    spilled = 0
    for capability, kind in itertools.product(capabilities, kinds):
        for name, call in KINDS[kind]():
            for kernel in compiled(call, capability):
                if kernel.local or kernel.stack:
                    spilled += 1
                    print(f"sm_{capability} {name}: {kernel}", flush=True)
    print(f"{spilled} kernels spill registers")
    raise SystemExit(bool(spilled))


if __name__ == "__main__":
    main()
