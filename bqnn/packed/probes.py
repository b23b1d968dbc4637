"""How long packed layers of the cpu backend and the dense products beside them take, from measurements on small ones.

A kernel decodes a weight once for many rows, and multiplies few rows in another way than many; libraries for dense
products do likewise, and caches help both. So no single rate is right: probe layers of a few sizes are run with a few
numbers of rows, and a layer is expected to take, for each of its weights, as long as the probe of the nearest size.

What else runs on the machine makes a measurement longer, never shorter. So a probe is measured in rounds that lie
apart, each round over all numbers of rows and both ways to run, so that neither way alone meets a busy machine; the
shortest time counts, and there are further rounds until another one comes near it. Where none does, the times serve
this process and are not kept for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.codes import pack_codes
from bqnn.core.geometry import Conv2dGeometry, Geometry, LinearGeometry
from bqnn.core.timing import median_seconds, seconds_of
from bqnn.ops import dispatch
from bqnn.ops.packed_product import PackedCall
from bqnn.packed import rates
from bqnn.packed.cost import ALWAYS, NEVER, LayerWork, Rates, Roofline, Winning, winning_rows

# Probes have as many channels out as in; those of convolutions have kernels of 3 x 3 and square images.
LINEAR_CHANNELS, LINEAR_ROWS = (64, 256, 1024, 2048), (1, 4, 16, 64, 256)
CONV2D_CHANNELS, CONV2D_SIDES, CONV2D_KERNEL = (8, 32, 128), (4, 8, 16, 32), 3

LEAST_ROUNDS, MOST_ROUNDS = 3, 12
AGREEMENT = 1.1  # by which the second shortest time of a round may be above the shortest


def packed_rows(
    op: str,
    device: torch.device,
    shape: tuple[int, ...],
    num_levels: int,
    precision: str,
    packed_bytes: int,
    dtype: torch.dtype = torch.float32,
) -> Winning:
    """For how many rows the packed ``op`` is expected to beat the dense product, for a weight of ``shape`` and
    activations of ``dtype``: NEVER with the reference; ALWAYS also where no backend can run ``op``, so that the call
    itself says why.
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

    def seconds(rows: int) -> tuple[float, float]:
        activations = rows * (channels + columns)
        work = LayerWork(op, num_levels, precision, channels, columns, rows, activations, packed_bytes, dtype)
        return expected_seconds(work, device, backend)

    return winning_rows(seconds)


def expected_seconds(work: LayerWork, device: torch.device, backend: str) -> tuple[float, float]:
    """Expected seconds of the packed op on ``backend`` of this machine, and of the dense product."""
    if backend in ("cuda", "triton") and device.type == "cuda":
        call = packed_call_seconds(work.op, work.num_levels, work.precision, device)
        return work.gpu_seconds(roofline(device), roofline(device, torch.bfloat16), call)
    if backend != "cpu":
        machine = roofline(device)
        return work.packed_seconds(machine, backend), work.dense_seconds(machine)
    packed, dense = cpu_rates(work.op, work.num_levels, work.precision, work.channels * work.columns)
    return work.cpu_seconds(packed, dense)


class Pair(NamedTuple):
    """The rates of both ways to run, measured in turns."""

    packed: Rates
    dense: Rates


EXECUTIONS = Pair._fields


def cpu_rates(op: str, num_levels: int, precision: str, weights: int) -> Pair:
    """The rates of the cpu backend for layers of about ``weights`` weights, measured once a machine.

    Args:
        op: "packed_linear" or "packed_conv2d".
        num_levels, precision: of the layer.
        weights: how many weights it has.
    """
    sizes, square = (LINEAR_CHANNELS, 1) if op == "packed_linear" else (CONV2D_CHANNELS, CONV2D_KERNEL**2)
    channels = min(sizes, key=lambda size: abs(math.log(size * size * square / weights)))
    return _rates(op, num_levels, precision, channels, torch.get_num_threads())


@cache
def _rates(op: str, num_levels: int, precision: str, channels: int, threads: int) -> Pair:
    keys = [rates_key(op, num_levels, precision, channels, execution, threads) for execution in EXECUTIONS]
    packed, dense = map(rates.known, keys)
    if packed is not None and dense is not None:
        return Pair(packed, dense)
    measured, is_settled = _measure(op, num_levels, precision, channels)
    if is_settled:
        rates.remember(dict(zip(keys, measured)))
    return measured


def rates_key(op: str, num_levels: int, precision: str, channels: int, execution: str, threads: int) -> str:
    """What the rates of a probe are called in the file."""
    return f"{op} M={num_levels} {precision} {channels} {execution} threads={threads}"


def _measure(op: str, num_levels: int, precision: str, channels: int) -> tuple[Pair, bool]:
    """The rates, and whether they were measured undisturbed."""
    sides = LINEAR_ROWS if op == "packed_linear" else CONV2D_SIDES
    nothing = _probe(op, num_levels, precision, 1, 1)
    probes = [_probe(op, num_levels, precision, channels, side) for side in sides]
    calls = [_bound(op, probe, execution) for probe in (nothing, *probes) for execution in EXECUTIONS]
    seconds, is_settled = least_seconds(calls)
    count, rows = channels * probes[0].columns, tuple(probe.geometry.rows(probe.x) for probe in probes)

    def rates_of(call: float, *times: float) -> Rates:
        return Rates(call, rows, tuple(max(each - call, 0.0) / count for each in times))

    ways = len(EXECUTIONS)
    return Pair(*(rates_of(*seconds[way::ways]) for way in range(ways))), is_settled


def _five_times(call: Callable[[], object]) -> list[float]:
    return seconds_of(call, torch.device("cpu"), 5)


def least_seconds(calls: list[Any], measure: Callable[[Any], list[float]] = _five_times) -> tuple[list[float], bool]:
    """The shortest time of each call, and whether it is undisturbed as far as repeating can tell; ``measure`` times a
    call a few times."""
    rounds: list[list[float]] = []
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and _is_disturbed(rounds)):
        rounds.append([min(measure(call)) for call in calls])
    return [min(times) for times in zip(*rounds)], not _is_disturbed(rounds)


def _is_disturbed(rounds: list[list[float]]) -> bool:
    """Whether the shortest time of some call was reached in one round alone."""
    return any(second > AGREEMENT * first for first, second in (sorted(times)[:2] for times in zip(*rounds)))


def _bound(op: str, probe: PackedCall, execution: str) -> Callable[[], object]:
    """A call of the probe as a layer makes it from the second time on."""
    backend = dispatch.choose(op, probe, "dense" if execution == "dense" else "cpu")
    assert backend.bind is not None
    run, x, bias = backend.bind(probe), probe.x, probe.bias

    def timed() -> Tensor:
        with torch.inference_mode():
            return run(x, bias)

    return timed


@cache
def packed_call_seconds(op: str, num_levels: int, precision: str, device: torch.device) -> float:
    """Seconds of a call of the packed ``op`` on a GPU that does next to nothing, measured once a process."""
    probe = _probe(op, num_levels, precision, 1, 1)
    here = {name: getattr(probe, name).to(device) for name in ("x", "codes", "levels", "bias")}
    with torch.inference_mode():
        return min(seconds_of(lambda: dispatch.run(op, probe._replace(**here)), device, 51))


def _probe(op: str, num_levels: int, precision: str, channels: int, side: int) -> PackedCall:
    """A layer of ``channels`` channels on [side, channels], or on one image of side x side."""
    geometry: Geometry = LinearGeometry()
    shape: tuple[int, ...] = (side, channels)
    if op == "packed_conv2d":
        kernel, padding = (CONV2D_KERNEL, CONV2D_KERNEL), (CONV2D_KERNEL // 2, CONV2D_KERNEL // 2)
        geometry, shape = Conv2dGeometry(kernel, (1, 1), padding, (1, 1), 1), (1, channels, side, side)
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode(False):
        x = torch.randn(shape, generator=generator, dtype=torch.float32)
        size = (channels, geometry.columns(x))
        codes = torch.randint(num_levels, size, dtype=torch.uint8, generator=generator)
        levels = torch.linspace(-1.0, 1.0, num_levels, dtype=torch.float32).unsqueeze(0)
        bias = torch.zeros(channels, dtype=torch.float32)
        return PackedCall(x, pack_codes(codes, num_levels), levels, bias, geometry, precision, None, False)


def roofline(device: torch.device, dtype: torch.dtype = torch.float32) -> Roofline:
    """The rates of ``device``, measured once for its number of threads: a copy, a square product, a tiny one."""
    return _roofline(str(device), torch.get_num_threads(), dtype)


@cache
def _roofline(device_name: str, threads: int, dtype: torch.dtype) -> Roofline:
    device = torch.device(device_name)
    side = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        matrix = torch.randn(side, side, device=device, generator=generator).to(dtype)
        block = torch.randn(16 * side * side, device=device, generator=generator)
        target = torch.empty_like(block)
        copy_seconds = median_seconds(lambda: target.copy_(block), device)
        product_seconds = median_seconds(lambda: F.linear(matrix, matrix), device)
        call_seconds = median_seconds(lambda: F.linear(matrix[:1, :1], matrix[:1, :1]), device, repeats=101)
    return Roofline(2 * block.nbytes / copy_seconds, 2 * side**3 / product_seconds, call_seconds)
