"""Never slower: the expected time of a packed layer and of its dense product, the choice between them, and a check.

The model is a roofline. A pass over a layer costs one call plus the longer of moving its bytes and doing its
operations, at rates measured once a process and device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn import dispatch
from bqnn.packing import digits_per_byte

if TYPE_CHECKING:
    from bqnn.packed_layer import PackedLayer

# What the reference moves for one weight when it decodes: digits and remainders (uint8), the index written and read
# (int64 each time), the level (float32).
REFERENCE_DECODE_BYTES = 32

# Batches beyond this many rows are never bound by the bytes of the weight.
MAX_ROWS = 1 << 16


class Roofline(NamedTuple):
    """What a device does in a second with float32, and what a call costs before it does anything, in seconds."""

    bytes_per_second: float
    operations_per_second: float
    call_seconds: float

    def seconds(self, n_bytes: float, operations: float) -> float:
        """Expected seconds of one call that moves ``n_bytes`` and does ``operations`` (an addition counts as one)."""
        return self.call_seconds + max(n_bytes / self.bytes_per_second, operations / self.operations_per_second)


class LayerWork(NamedTuple):
    """One pass over a layer: its weight is [channels, columns], each of ``rows`` output positions takes all of it."""

    channels: int
    columns: int
    rows: int
    activations: int
    """Elements of input and output together."""
    packed_bytes: int
    """Bytes of codes and levels."""

    def dense_seconds(self, machine: Roofline) -> float:
        """Expected seconds of the product with the decoded float32 weight."""
        weights = self.channels * self.columns
        return machine.seconds(4 * (weights + self.activations), 2 * self.rows * weights)

    def packed_seconds(self, machine: Roofline, backend: str) -> float:
        """Expected seconds of the packed op: a kernel reads the codes instead of the weight; the reference decodes
        the whole weight and then does what dense does."""
        weights = self.channels * self.columns
        if backend == "reference":
            return machine.seconds(REFERENCE_DECODE_BYTES * weights, weights) + self.dense_seconds(machine)
        return machine.seconds(self.packed_bytes + 4 * self.activations, 2 * self.rows * weights)


def packed_row_limit(op: str, device: torch.device, channels: int, columns: int, packed_bytes: int) -> float:
    """Up to how many rows (output positions times batch) the packed ``op`` is expected to beat the dense product.

    0 where it never does, as with the reference; a power of two; or infinity, also where no backend can run ``op``, so
    that the call itself says why.
    """
    try:
        backend = dispatch.choose(op, device)
    except dispatch.BackendError:
        return math.inf
    if backend == "reference":
        return 0  # It decodes first and is then the dense product: no rate has to be measured to know.
    machine, limit, rows = roofline(device), 0, 1
    while rows <= MAX_ROWS:
        work = LayerWork(channels, columns, rows, rows * (channels + columns), packed_bytes)
        if work.packed_seconds(machine, backend) >= work.dense_seconds(machine):
            return limit
        limit, rows = rows, 2 * rows
    return math.inf


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median of ``repeats`` timed calls after two that are not timed; a GPU is synchronised around each."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for repeat in range(repeats + 2):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def roofline(device: torch.device) -> Roofline:
    """The rates of ``device``, measured once for its number of threads: a copy, a square product, a tiny one."""
    return _measure(str(device), torch.get_num_threads())


@cache
def _measure(device_name: str, threads: int) -> Roofline:
    device = torch.device(device_name)
    side = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        matrix = torch.randn(side, side, device=device, generator=generator)
        block = torch.randn(16 * side * side, device=device, generator=generator)
        target = torch.empty_like(block)
        copy_seconds = median_seconds(lambda: target.copy_(block), device)
        product_seconds = median_seconds(lambda: F.linear(matrix, matrix), device)
        call_seconds = median_seconds(lambda: F.linear(matrix[:1, :1], matrix[:1, :1]), device, repeats=101)
    return Roofline(2 * block.nbytes / copy_seconds, 2 * side**3 / product_seconds, call_seconds)


class LayerSpeed(NamedTuple):
    """One packed layer in :func:`explain_speed`; all times in seconds."""

    name: str
    backend: str
    layout: str
    rows: int
    execution: str
    expected_packed: float
    expected_dense: float
    measured_packed: float
    measured_dense: float


class SpeedReport(list[LayerSpeed]):
    """The layers in the order in which they ran; printed as a table, times in microseconds."""

    def __str__(self) -> str:
        width = max(5, *(len(layer.name) for layer in self)) + 2
        head = f"{'layer':<{width}}{'backend':<11}{'layout':<16}{'rows':>8}  {'runs':<8}"
        lines = [
            f"{'':<{width + 45}}{'expected, us':>20}{'measured, us':>20}",
            head + f"{'packed':>10}{'dense':>10}" * 2,
        ]
        for layer in self:
            times = (layer.expected_packed, layer.expected_dense, layer.measured_packed, layer.measured_dense)
            lines.append(
                f"{layer.name:<{width}}{layer.backend:<11}{layer.layout:<16}{layer.rows:>8}  {layer.execution:<8}"
                + "".join(f"{seconds * 1e6:>10.1f}" for seconds in times)
            )
        return "\n".join(lines)


def explain_speed(net: nn.Module, x: Tensor) -> SpeedReport:
    """Runs ``net`` on ``x`` and says, for each packed layer, what runs, what was expected and what was measured.

    Each layer is timed alone on its own input (the first one, where it runs more than once), packed and dense.

    Returns:
        a list of :class:`LayerSpeed`, in the order in which the layers ran; ``print`` it for a table.

    Raises:
        ValueError: ``net`` has no packed layer, or none that ran.
        bqnn.BackendError: the backend that ``BQNN_BACKEND`` names can not run a layer.
    """
    from bqnn.packed_layer import PackedLayer  # that module chooses by this one's model

    inputs: dict[PackedLayer, Tensor] = {}
    names = {module: name for name, module in net.named_modules() if isinstance(module, PackedLayer)}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, PackedLayer):
            inputs.setdefault(module, arguments[0])

    hooks = [module.register_forward_pre_hook(keep) for module in names]
    try:
        with torch.inference_mode():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs:
        raise ValueError("net must have a packed layer that runs, as bqnn.pack and bqnn.load make them, got none")
    with torch.inference_mode():
        return SpeedReport(_explain_layer(names[layer], layer, layer_input) for layer, layer_input in inputs.items())


def _explain_layer(name: str, layer: PackedLayer, x: Tensor) -> LayerSpeed:
    backend, machine = dispatch.choose(layer.op, x.device), roofline(x.device)
    rows, columns = layer.rows(x), math.prod(layer.shape[1:])
    work = LayerWork(
        channels=layer.shape[0],
        columns=columns,
        rows=rows,
        activations=x.numel() + rows * layer.shape[0],
        packed_bytes=layer.codes.nbytes + layer.levels.nbytes,
    )
    return LayerSpeed(
        name=name,
        backend=backend,
        layout=f"{layer.num_levels} levels, {digits_per_byte(layer.num_levels)}/byte",
        rows=rows,
        execution=layer.execution_for(x),
        expected_packed=work.packed_seconds(machine, backend),
        expected_dense=work.dense_seconds(machine),
        measured_packed=median_seconds(lambda: layer.run_packed(x), x.device),
        measured_dense=median_seconds(lambda: layer.run_dense(x), x.device),
    )
