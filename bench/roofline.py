"""``python -m bench.roofline``: what GPU kernels can reach at most, beside what was measured.

A kernel here is a function that gives the :class:`Work` of one call for every case. A call takes as long as the longest
of four things: moving its bytes, its products, the integer instructions that are neither, and its multiplications of
integers, all of which run beside each other. Prints the table, and with ``--save`` keeps it as
bench/results/roofline_packed.json, where measured times stay as they are. Training: bench/roofline_training.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import RESULTS
from bqnn.ops.backends.cuda_packed import MAX_ROWS
from bqnn.ops.backends.gpu_layout import row_words

TABLE = RESULTS / "roofline_packed.json"


class Gpu(NamedTuple):
    """What a GPU does in a second."""

    datasheet_bytes: float
    bytes: float
    """What a copy was measured to read and write."""
    products: float
    """Operations of a large bfloat16 product, as measured; an addition and a multiplication are two."""
    int8_products: float
    """The data sheet says that they are twice as many."""
    integers: float
    """Lanes of the integer units; the multiplier has as many beside them."""
    issued: float
    """Lanes of instructions of any kind."""


H200 = Gpu(4.8e12, 4.3e12, 790e12, 2 * 790e12, 132 * 4 * 16 * 1.7e9, 132 * 4 * 32 * 1.7e9)
"""It has 132 multiprocessors of 4 schedulers at 1.7 GHz; each issues 32 lanes a cycle and has 16 for integers."""

Rows = list[dict[str, Any]]


class Work(NamedTuple):
    """One call: bytes that have to move, operations of its products, and lanes of its other instructions."""

    kernel: str
    case: str
    bytes: float
    operations: float
    integers: float = 0.0
    issued: float = 0.0
    int8: bool = False
    """Whether the products are of 8-bit integers."""

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """The least time of each kind of work, and of all of them at once ("expected")."""
        limits = {
            "datasheet memory": self.bytes / gpu.datasheet_bytes,
            "memory": self.bytes / gpu.bytes,
            "products": self.operations / (gpu.int8_products if self.int8 else gpu.products),
            "instructions": max(self.integers / gpu.integers, self.issued / gpu.issued),
        }
        return {**limits, "expected": max(list(limits.values())[1:])}

    def row(self, gpu: Gpu) -> dict[str, Any]:
        """What the table says of the call, times in microseconds."""
        times = {name: round(1e6 * seconds, 2) for name, seconds in self.seconds(gpu).items()}
        return {
            "kernel": self.kernel,
            "case": self.case,
            "bytes": int(self.bytes),
            "operations": int(self.operations),
            **times,
        }


def linear_bf16(rows: int, side: int) -> Work:
    """A dense layer of side x side in bfloat16: what cuBLAS has to do."""
    return Work(
        "linear bf16", f"{side}x{side} B{rows}", 2.0 * (side * side + 2 * rows * side), 2.0 * rows * side * side
    )


def packed_linear(rows: int, side: int, num_levels: int = 3) -> Work:
    """The same with packed weights, x and y in bfloat16; instructions are those of the kernel for few rows."""
    n_bytes = 4.0 * side * row_words(num_levels, side) + 2.0 * 2 * rows * side
    integers, issued = decoding(rows, num_levels)
    weights = side * side
    name = f"packed_linear M{num_levels} bf16"
    return Work(name, f"{side}x{side} B{rows}", n_bytes, 2.0 * rows * weights, integers * weights, issued * weights)


def packed_linear_int8(rows: int, side: int, num_levels: int = 3) -> Work:
    """The same in "int8": a pass for the largest activation of each row, one that rounds them, then the product."""
    activations = float(rows * side)
    rounding = (2.0 + 2.0 + 1.0 + 1.0) * activations
    n_bytes = 4.0 * side * row_words(num_levels, side) + rounding + 2.0 * activations
    return Work(
        f"packed_linear M{num_levels} int8", f"{side}x{side} B{rows}", n_bytes, 2.0 * rows * side * side, int8=True
    )


def conv2d_bf16(batch: int, channels: int, image: int) -> Work:
    """A dense 3x3 convolution that keeps channels and size, in bfloat16: what cuDNN has to do."""
    return _conv2d("conv2d bf16", batch, channels, image, 2.0 * channels * 9 * channels)


def packed_conv2d(batch: int, channels: int, image: int, num_levels: int = 3) -> Work:
    """The same with packed weights, decoded again for every block of pixels: its instructions hide behind products."""
    words = 4.0 * channels * row_words(num_levels, 9 * channels)
    return _conv2d(f"packed_conv2d M{num_levels} bf16", batch, channels, image, words)


def _conv2d(kernel: str, batch: int, channels: int, image: int, weight_bytes: float) -> Work:
    pixels = batch * image * image
    case = f"{channels}-{channels} 3x3 {image}x{image} B{batch}"
    return Work(kernel, case, weight_bytes + 2.0 * 2 * pixels * channels, 2.0 * pixels * channels * 9 * channels)


def decoding(rows: int, num_levels: int) -> tuple[float, float]:
    """Integer and all instructions a weight, of the kernel for sm_90 in cuda_resources.json; 0 where it has no part."""
    if rows > MAX_ROWS:
        return 0.0, 0.0
    capacity = next(size for size in (2, 4, 8, 16) if num_levels <= size)
    name = f"packed_linear_fwd_kernel<{capacity}, 1, {1 if rows <= 8 else 2}>"
    kernels = json.loads((RESULTS / "cuda_resources.json").read_text())["kernels"]
    kernel = next(kernel for kernel in kernels if (kernel["architecture"], kernel["name"]) == ("90", name))
    return max(kernel["integer"], kernel["multiplied"]), kernel["issued"]


def packed_cases() -> Iterator[tuple[Work, Work]]:
    """Every case, and the dense one that it is compared with."""
    for num_levels in (2, 3, 16):
        for side in (4096, 8192, 16384):
            for rows in (1, 8, 16, 64, 128, 1024):
                yield packed_linear(rows, side, num_levels), linear_bf16(rows, side)
    for side in (4096, 8192, 16384):
        yield packed_linear_int8(1024, side), linear_bf16(1024, side)
    yield packed_conv2d(128, 128, 32), conv2d_bf16(128, 128, 32)


def table(gpu: Gpu, measured: dict[str, float | None]) -> Rows:
    """A row for each case; ``measured`` by kernel and case."""
    rows = []
    for work, dense in packed_cases():
        ratio = dense.seconds(gpu)["expected"] / work.seconds(gpu)["expected"]
        rows.append(
            {
                **work.row(gpu),
                "dense / packed": round(ratio, 2),
                "measured": measured.get(work.kernel + work.case),
            }
        )
    return rows


def publish(path: Path, make_rows: Callable[[Gpu, dict[str, float | None]], Rows], description: str | None) -> None:
    """The command line: prints the rows for an H200, and writes them to ``path`` if asked to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {path.name}")
    save = parser.parse_args().save
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = make_rows(H200, {row["kernel"] + row["case"]: row["measured"] for row in kept})
    widths = [max(len(str(value)) for value in [name, *(row[name] for row in rows)]) for name in rows[0]]
    for line in (list(rows[0]), *(["-" if value is None else value for value in row.values()] for row in rows)):
        print("  ".join(f"{value:>{width}}" for value, width in zip(line, widths, strict=True)))
    if save:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        path.write_text(f'{{\n "gpu": {json.dumps(H200._asdict())},\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    publish(TABLE, table, __doc__)
