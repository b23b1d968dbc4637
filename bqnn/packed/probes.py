"""How long packed layers of the cpu backend and the dense products beside them take, from measurements on small ones.

A kernel decodes a weight once for many rows, and multiplies few rows in another way than many; libraries for dense
products do likewise, and caches help both. So no single rate is right: probe layers of a few sizes are run with a few
numbers of rows, and a layer is expected to take, for each of its weights, as long as the probe of the nearest size.
"""

from __future__ import annotations

import bisect
import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bqnn.core.codes import pack_codes
from bqnn.core.timing import seconds_of

if TYPE_CHECKING:
    from bqnn.packed.base import PackedLayer

# Probes have as many channels out as in; those of convolutions have kernels of 3 x 3 and square images.
LINEAR_CHANNELS, LINEAR_ROWS = (64, 256, 1024, 2048), (1, 4, 16, 64, 256)
CONV2D_CHANNELS, CONV2D_SIDES, CONV2D_KERNEL = (8, 32, 128), (4, 8, 16, 32), 3


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


def cpu_rates(op: str, num_levels: int, precision: str, weights: int, execution: str) -> Rates:
    """The rates of the cpu backend for layers of about ``weights`` weights, measured once a process.

    Args:
        op: "packed_linear" or "packed_conv2d".
        num_levels, precision: of the layer.
        weights: how many weights it has.
        execution: "packed" or "dense".
    """
    sizes, square = (LINEAR_CHANNELS, 1) if op == "packed_linear" else (CONV2D_CHANNELS, CONV2D_KERNEL**2)
    channels = min(sizes, key=lambda size: abs(math.log(size * size * square / weights)))
    return _measure(op, num_levels, precision, channels, execution, torch.get_num_threads())


@cache
def _measure(op: str, num_levels: int, precision: str, channels: int, execution: str, threads: int) -> Rates:
    layer = _probe(op, num_levels, precision, channels, execution)
    sides = LINEAR_ROWS if op == "packed_linear" else CONV2D_SIDES
    call = _measure_call(op, num_levels, precision, execution, threads)
    rows, seconds = [], []
    for side in sides:
        x = _probe_input(op, channels, side)
        rows.append(layer.rows(x))
        seconds.append(max(_time(layer, x) - call, 0.0) / math.prod(layer.shape))
    return Rates(call, tuple(rows), tuple(seconds))


@cache
def packed_call_seconds(op: str, num_levels: int, precision: str, device: torch.device) -> float:
    """Seconds of a call of the packed ``op`` on a GPU that does next to nothing, measured once a process."""
    return _time(_probe(op, num_levels, precision, 1, "packed").to(device), _probe_input(op, 1, 1).to(device), 51)


@cache
def _measure_call(op: str, num_levels: int, precision: str, execution: str, threads: int) -> float:
    return _time(_probe(op, num_levels, precision, 1, execution), _probe_input(op, 1, 1), repeats=201)


def _time(layer: PackedLayer, x: Tensor, repeats: int = 7) -> float:
    """The least of the times: a rate lasts as long as the process, and what else ran when it was measured does not."""
    with torch.inference_mode():
        return min(seconds_of(lambda: layer(x), x.device, repeats))


def _probe(op: str, num_levels: int, precision: str, channels: int, execution: str) -> PackedLayer:
    from bqnn.packed.layers import PackedConv2d, PackedLinear

    columns = channels if op == "packed_linear" else channels * CONV2D_KERNEL**2
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        codes = torch.randint(num_levels, (channels, columns), dtype=torch.uint8, generator=generator)
        levels = torch.linspace(-1.0, 1.0, num_levels, dtype=torch.float32).unsqueeze(0)
        packed = pack_codes(codes, num_levels)
        bias = torch.zeros(channels, dtype=torch.float32)
    if op == "packed_linear":
        return PackedLinear(channels, packed, levels, bias, precision, execution)
    options = {"padding": CONV2D_KERNEL // 2, "precision": precision, "execution": execution}
    return PackedConv2d(channels, CONV2D_KERNEL, packed, levels, bias, **options)  # type: ignore[arg-type]


def _probe_input(op: str, channels: int, side: int) -> Tensor:
    """[side, channels], or one image of side x side."""
    shape = (side, channels) if op == "packed_linear" else (1, channels, side, side)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
