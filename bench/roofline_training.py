"""``python -m bench.roofline_training``: what training kernels can reach at most on a GPU, beside what was measured.

As bench/roofline.py, times in microseconds, a row for the forward and one for the backward pass; with ``--save`` it is
kept as bench/results/roofline_training.json. Products are bfloat16, M is 3, parameters are float32. Bytes are those of
the tensors that an op takes and gives, each moved once: nothing between.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.machine import RESULTS
from bench.roofline import Gpu, Rows, Work, publish
from tests.support.shapes import Conv2dShape

TABLE = RESULTS / "roofline_training.json"

# These are instructions a weight, counted in the machine code for sm_90, loops as often as they run; those of sampling
# and of moments are of the passes that make a whole weight. Special functions have an eighth of the lanes, so that
# eleven of them in spike_slab_kl's forward pass count 88, and bind rather than its 86.7 instructions; the backward pass
# has 137.1, and 17 special ones.
SAMPLE = 69.0
MOMENTS = 81.0
KL_FORWARD, KL_BACKWARD = 88.0, 137.1
# The loops of mixture_kl, 209 and 310 instructions for four weights of a thread, with six special ones for each.
MIXTURE_FORWARD, MIXTURE_BACKWARD = 52.3, 77.5
CODES, PACKED_CODES = 15.0, 26.0

WEIGHT_BYTES = 8.0
"""Bytes of mu and log_sigma2, a weight; their gradients are as many."""


def product(op: str, case: str, operations: float, x: float, y: float, weights: float) -> Iterator[Work]:
    """A product with ``weights`` weights: ``operations`` for one of its matrix products, sizes x and y in elements.

    A moment op multiplies mean and variance, and keeps dy/dVar in bfloat16. The weight is made once in the forward
    pass, before the product or by a single block of rows, and once for either gradient.
    """
    moment = op.startswith("moment")
    products, kept, made = (2, 2.0 * y, MOMENTS) if moment else (1, 0.0, SAMPLE)
    moved, parameters = 2.0 * (x + y) + kept, WEIGHT_BYTES * weights
    yield Work(f"{op} forward", case, moved + parameters, products * operations, issued=made * weights)
    n_bytes = moved + 2.0 * x + 2.0 * parameters
    yield Work(f"{op} backward", case, n_bytes, 2 * products * operations, issued=2 * made * weights)


def linear(op: str, rows: int, side: int) -> Iterator[Work]:
    weights = side * side
    return product(op, f"{side}x{side} B{rows}", 2.0 * rows * weights, rows * side, rows * side, weights)


def conv2d(op: str, shape: Conv2dShape) -> Iterator[Work]:
    """A convolution that keeps the image's size."""
    pixels = shape.batch * shape.height * shape.width
    weights = shape.channels * shape.inputs * shape.kernel[0] * shape.kernel[1]
    kernel, image = f"{shape.kernel[0]}x{shape.kernel[1]}", f"{shape.height}x{shape.width}"
    case = f"{shape.inputs}-{shape.channels} {kernel} {image} B{shape.batch}"
    return product(op, case, 2.0 * pixels * weights, pixels * shape.inputs, pixels * shape.channels, weights)


def spike_slab_kl(weights: int) -> Iterator[Work]:
    case = f"{weights >> 20} M weights"
    yield Work("spike_slab_kl forward", case, WEIGHT_BYTES * weights, 0.0, issued=KL_FORWARD * weights)
    yield Work("spike_slab_kl backward", case, 2 * WEIGHT_BYTES * weights, 0.0, issued=KL_BACKWARD * weights)


def mixture_kl(weights: int) -> Iterator[Work]:
    case = f"{weights >> 20} M weights"
    yield Work("mixture_kl forward", case, WEIGHT_BYTES * weights, 0.0, issued=MIXTURE_FORWARD * weights)
    yield Work("mixture_kl backward", case, 2 * WEIGHT_BYTES * weights, 0.0, issued=MIXTURE_BACKWARD * weights)


def assign_codes(weights: int) -> Iterator[Work]:
    case = f"{weights >> 20} M weights"
    yield Work("assign_codes", case, 5.0 * weights, 0.0, issued=CODES * weights)
    yield Work("assign_codes packed", case, 4.2 * weights, 0.0, issued=PACKED_CODES * weights)


def training_cases() -> Iterator[Work]:
    for estimator in ("sample", "moment"):
        for rows in (256, 2048):
            yield from linear(f"{estimator}_linear", rows, 4096)
        for shape in (Conv2dShape(128, 128, 128, 32, 32, (3, 3)), Conv2dShape(256, 160, 12, 32, 32, (3, 3))):
            yield from conv2d(f"{estimator}_conv2d", shape)
    yield from spike_slab_kl(1 << 24)
    yield from mixture_kl(1 << 24)
    yield from assign_codes(1 << 24)


def table(gpu: Gpu, measured: dict[str, float | None]) -> Rows:
    """A row for each case; ``measured`` by kernel and case."""
    return [{**work.row(gpu), "measured": measured.get(work.kernel + work.case)} for work in training_cases()]


if __name__ == "__main__":
    publish(TABLE, table, __doc__)
