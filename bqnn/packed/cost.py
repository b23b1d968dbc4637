"""Never slower: how long a packed layer and its dense product are expected to take, and for how many rows which wins.

Data in, a plan out; the machine is asked in bqnn.packed.probes. With the cpu backend, expected times are those of
measured small layers. Otherwise the model is a roofline: a pass over a layer costs one call plus the longer of moving
its bytes and doing its operations. A GPU's kernels decode the weight once for each tile of rows.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch

from bqnn.core.codes import code_bits

# What the reference moves for one weight when it decodes: digits and remainders (uint8), the index written and read
# (int64 each time), the level (float32).
REFERENCE_DECODE_BYTES = 32

# The numbers of rows at which packed and dense are compared; beyond the last, the last decides.
COMPARED_ROWS = tuple(1 << exponent for exponent in range(17))

# Of the GPU kernels: instructions for each weight of a tile, by the bits of a code (counted in the loops of what Triton
# compiles for sm_90, in bfloat16, for 128 rows; with one bit for 16), the rows of the largest tile, and the share of a
# library's rate that products are taken to reach. The last is an estimate.
DECODE_INSTRUCTIONS = {1: 5.0, 2: 7.6, 4: 9.0}
GPU_TILE_ROWS = 128
GPU_PRODUCT_SHARE = 0.6

# The packed op is taken where it is expected to need this share of the dense time or less: measurements scatter, and a
# decoded weight that nobody uses is never made.
CLEARLY_FASTER = 0.97


class RowRange(NamedTuple):
    """From how many to how many rows (output positions times batch) a layer runs packed, both included."""

    first: float
    last: float


# For how many rows a layer runs packed: in none, one or several ranges.
Winning = tuple[RowRange, ...]

ALWAYS: Winning = (RowRange(0, math.inf),)
NEVER: Winning = ()


class Roofline(NamedTuple):
    """What a device does in a second with one dtype, and what a call costs before it does anything, in seconds."""

    bytes_per_second: float
    operations_per_second: float
    call_seconds: float

    def seconds(self, n_bytes: float, operations: float) -> float:
        """Expected seconds of one call that moves ``n_bytes`` and does ``operations`` (an addition counts as one)."""
        return self.call_seconds + max(n_bytes / self.bytes_per_second, operations / self.operations_per_second)


class Rates(NamedTuple):
    """What one way to run a layer costs."""

    call_seconds: float
    """Of a call that does next to nothing."""
    rows: tuple[int, ...]
    weight_seconds: tuple[float, ...]
    """Beyond that, for each weight, where so many rows are multiplied by it."""

    def seconds(self, weights: int, rows: int) -> float:
        """Expected seconds of one call with ``weights`` weights and ``rows`` output positions."""
        return self.call_seconds + weights * self._per_weight(rows)

    def _per_weight(self, rows: int) -> float:
        if rows <= self.rows[0]:
            return self.weight_seconds[0]
        if rows >= self.rows[-1]:
            return self.weight_seconds[-1] * rows / self.rows[-1]
        after = bisect.bisect(self.rows, rows)
        low, high = self.rows[after - 1 : after + 1]
        share = (rows - low) / (high - low)
        return (1 - share) * self.weight_seconds[after - 1] + share * self.weight_seconds[after]


class LayerWork(NamedTuple):
    """One pass over a layer: its weight is [channels, columns], each of ``rows`` output positions takes all of it."""

    op: str
    num_levels: int
    precision: str
    channels: int
    columns: int
    rows: int
    activations: int
    """Elements of input and output together."""
    packed_bytes: int
    """Bytes of codes and levels."""
    dtype: torch.dtype = torch.float32
    """Of the activations."""

    def dense_seconds(self, machine: Roofline, itemsize: int = 4) -> float:
        """Expected seconds of the product with the decoded weight, by the roofline, numbers taking ``itemsize``."""
        weights = self.channels * self.columns
        return machine.seconds(itemsize * (weights + self.activations), 2 * self.rows * weights)

    def packed_seconds(self, machine: Roofline, backend: str) -> float:
        """Expected seconds of the packed op, by the roofline: a kernel reads the codes instead of the weight; the
        reference decodes the whole weight and then does what dense does."""
        weights = self.channels * self.columns
        if backend == "reference":
            return machine.seconds(REFERENCE_DECODE_BYTES * weights, weights) + self.dense_seconds(machine)
        return machine.seconds(self.packed_bytes + 4 * self.activations, 2 * self.rows * weights)

    def gpu_seconds(self, float32: Roofline, bfloat16: Roofline, call_seconds: float) -> tuple[float, float]:
        """Expected seconds of the packed op on a GPU's kernels, a call of which takes ``call_seconds`` beside its work,
        and of the dense product, which is one of bfloat16 for "bf16" and activations of bfloat16, and one of float32
        else. Decoding and products are taken to follow each other."""
        weights = self.channels * self.columns
        dense_half = self.precision == "bf16" and self.dtype == torch.bfloat16
        units = float32 if self.precision == "fp32" else bfloat16
        # An instruction of a lane is half of a fused multiply-add's two operations.
        decode = DECODE_INSTRUCTIONS[code_bits(self.num_levels)] * weights * math.ceil(self.rows / GPU_TILE_ROWS)
        compute = 2 * decode / float32.operations_per_second
        compute += 2 * self.rows * weights / (GPU_PRODUCT_SHARE * units.operations_per_second)
        transfer = (self.packed_bytes + self.dtype.itemsize * self.activations) / float32.bytes_per_second
        dense = self.dense_seconds(bfloat16, 2) if dense_half else self.dense_seconds(float32)
        return call_seconds + max(transfer, compute), dense

    def cpu_seconds(self, packed: Rates, dense: Rates) -> tuple[float, float]:
        """Expected seconds of the packed op on the cpu backend, and of the dense product, by measured rates."""
        weights = self.channels * self.columns
        return packed.seconds(weights, self.rows), dense.seconds(weights, self.rows)


def winning_rows(seconds: Callable[[int], tuple[float, float]]) -> Winning:
    """For how many rows packed is expected to beat dense, by the seconds of both for a number of rows.

    Each of :data:`COMPARED_ROWS` decides for itself: a time that is wrong for one number of rows changes nothing for
    the others.
    """

    def wins(rows: int) -> bool:
        packed, dense = seconds(rows)
        return packed <= CLEARLY_FASTER * dense

    runs = [list(rows) for won, rows in groupby(COMPARED_ROWS, wins) if won]
    return tuple(RowRange(_downwards(rows[0]), _upwards(rows[-1])) for rows in runs)


def _downwards(rows: int) -> float:
    return 0 if rows == COMPARED_ROWS[0] else rows


def _upwards(rows: int) -> float:
    return math.inf if rows == COMPARED_ROWS[-1] else rows
