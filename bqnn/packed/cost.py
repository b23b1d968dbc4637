"""Never slower: the expected time of a packed layer and of its dense product, and the choice between them.

With the cpu backend, expected times are measured ones of small layers (bqnn.packed.probes). Otherwise the model is a
roofline: a pass over a layer costs one call plus the longer of moving its bytes and doing its operations, at rates
measured once a process and device. A GPU's kernels decode the weight once for each tile of rows;
:meth:`LayerWork.gpu_seconds`.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import NamedTuple

import torch

from bqnn.ops import dispatch
from bqnn.ops.backends.gpu_layout import code_bits
from bqnn.packed.probes import Roofline, cpu_rates, packed_call_seconds, roofline

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


ALWAYS, NEVER = RowRange(0, math.inf), RowRange(math.inf, 0)


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

    def gpu_seconds(self, device: torch.device) -> tuple[float, float]:
        """Expected seconds of the packed op on a GPU's kernels, and of the dense product, which is one of bfloat16 for
        "bf16" and activations of bfloat16, and one of float32 else. Decoding and products are taken to follow each
        other."""
        weights = self.channels * self.columns
        float32, bfloat16 = roofline(device), roofline(device, torch.bfloat16)
        dense_half = self.precision == "bf16" and self.dtype == torch.bfloat16
        units = float32 if self.precision == "fp32" else bfloat16
        # An instruction of a lane is half of a fused multiply-add's two operations.
        decode = DECODE_INSTRUCTIONS[code_bits(self.num_levels)] * weights * math.ceil(self.rows / GPU_TILE_ROWS)
        compute = 2 * decode / float32.operations_per_second
        compute += 2 * self.rows * weights / (GPU_PRODUCT_SHARE * units.operations_per_second)
        transfer = (self.packed_bytes + self.dtype.itemsize * self.activations) / float32.bytes_per_second
        call = packed_call_seconds(self.op, self.num_levels, self.precision, device)
        dense = self.dense_seconds(bfloat16, 2) if dense_half else self.dense_seconds(float32)
        return call + max(transfer, compute), dense

    def expected_seconds(self, device: torch.device, backend: str) -> tuple[float, float]:
        """Expected seconds of the packed op on ``backend``, and of the dense product."""
        if backend in ("cuda", "triton") and device.type == "cuda":
            return self.gpu_seconds(device)
        if backend != "cpu":
            machine = roofline(device)
            return self.packed_seconds(machine, backend), self.dense_seconds(machine)
        weights = self.channels * self.columns
        packed, dense = (
            cpu_rates(self.op, self.num_levels, self.precision, weights, execution).seconds(weights, self.rows)
            for execution in ("packed", "dense")
        )
        return packed, dense


def packed_rows(
    op: str,
    device: torch.device,
    shape: tuple[int, ...],
    num_levels: int,
    precision: str,
    packed_bytes: int,
    dtype: torch.dtype = torch.float32,
) -> RowRange:
    """For how many rows the packed ``op`` is expected to beat the dense product, for a weight of ``shape`` and
    activations of ``dtype``.

    Returns:
        NEVER, as with the reference; ALWAYS, also where no backend can run ``op``, so that the call itself says why; or
        what is between. Where packed wins in more than one range, the one of most doublings counts.
    """
    try:
        backend = dispatch.available(op, device)
    except dispatch.BackendError:
        return ALWAYS
    if backend == "reference":
        return NEVER  # It decodes first and is then the dense product: no rate has to be measured to know.
    if device.type == "cuda" and precision == "bf16" and dtype != torch.bfloat16:
        # A GPU's libraries multiply bfloat16 into bfloat16 only: to round wider activations, and keep the sums as wide,
        # takes the packed kernels, or a float32 product that is slower than they are.
        return ALWAYS
    channels, columns = shape[0], math.prod(shape[1:])

    def wins(rows: int) -> bool:
        activations = rows * (channels + columns)
        work = LayerWork(op, num_levels, precision, channels, columns, rows, activations, packed_bytes, dtype)
        packed, dense = work.expected_seconds(device, backend)
        return packed <= CLEARLY_FASTER * dense

    runs = [list(rows) for won, rows in groupby(COMPARED_ROWS, wins) if won]
    if not runs:
        return NEVER
    longest = max(runs, key=len)
    first = 0 if longest[0] == COMPARED_ROWS[0] else longest[0]
    return RowRange(first, math.inf if longest[-1] == COMPARED_ROWS[-1] else longest[-1])
