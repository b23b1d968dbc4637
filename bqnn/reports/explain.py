"""explain_speed: what runs in each packed layer, how long it was expected to take, and how long it took."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bqnn.core.codes import digits_per_byte
from bqnn.core.timing import median_seconds
from bqnn.packed.base import PackedLayer
from bqnn.packed.cost import LayerWork
from bqnn.packed.probes import expected_seconds
from bqnn.packed.visit import inputs_of_packed_layers


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
        wide = max(6, *(len(layer.layout) for layer in self)) + 2
        head = f"{'layer':<{width}}{'backend':<11}{'layout':<{wide}}{'rows':>8}  {'runs':<8}"
        lines = [
            f"{'':<{len(head)}}{'expected, us':>20}{'measured, us':>20}",
            head + f"{'packed':>10}{'dense':>10}" * 2,
        ]
        for layer in self:
            times = (layer.expected_packed, layer.expected_dense, layer.measured_packed, layer.measured_dense)
            lines.append(
                f"{layer.name:<{width}}{layer.backend:<11}{layer.layout:<{wide}}{layer.rows:>8}  {layer.execution:<8}"
                + "".join(f"{seconds * 1e6:>10.1f}" for seconds in times)
            )
        return "\n".join(lines)


def explain_speed(net: nn.Module, x: Tensor) -> SpeedReport:
    """Runs ``net`` on ``x`` and says, for each packed layer, what runs, what was expected and what was measured.

    Each layer is timed alone on its own input (the first one, where it runs more than once), packed and dense. The
    layout is how codes lie in memory when the packed op runs: on the reference as in the file; "ReLU" says that the
    layer's own outputs go through one, which is in all times.

    Returns:
        a list of :class:`LayerSpeed`, in the order in which the layers ran; ``print`` it for a table.

    Raises:
        ValueError: ``net`` has no packed layer, or none that ran.
        bqnn.BackendError: the backend that ``BQNN_BACKEND`` names can not run a layer.
    """
    with torch.inference_mode():
        names = {id(module): name for name, module in net.named_modules()}
        inputs = inputs_of_packed_layers(net, x)
        return SpeedReport(_explain_layer(names[id(layer)], layer, given) for layer, given in inputs.items())


def _explain_layer(name: str, layer: PackedLayer, x: Tensor) -> LayerSpeed:
    rows, num_levels = layer.rows(x), layer.num_levels
    backend, call = layer.backend_for(x)
    packed, _ = _with_execution(layer, "packed").backend_for(x)
    work = LayerWork(
        op=layer.op,
        num_levels=num_levels,
        precision=layer.precision,
        channels=layer.shape[0],
        columns=math.prod(layer.shape[1:]),
        rows=rows,
        activations=x.numel() + rows * layer.shape[0],
        packed_bytes=layer.codes.nbytes + layer.levels.nbytes,
        dtype=x.dtype,
    )
    expected_packed, expected_dense = expected_seconds(work, x.device, packed.name)
    described = (
        backend.describe(call) if backend.describe else f"{num_levels} levels, {digits_per_byte(num_levels)}/byte"
    )
    return LayerSpeed(
        name=name,
        backend=backend.name,
        layout=described + (", ReLU" if layer.relu else ""),
        rows=rows,
        execution=layer.execution_for(x),
        expected_packed=expected_packed,
        expected_dense=expected_dense,
        measured_packed=_measure_execution(layer, x, "packed"),
        measured_dense=_measure_execution(layer, x, "dense"),
    )


def _with_execution(layer: PackedLayer, execution: str) -> PackedLayer:
    """The layer as it would run with ``execution``; the layer itself stays as it is."""
    twin = copy.copy(layer)
    twin.execution = execution
    return twin


def _measure_execution(layer: PackedLayer, x: Tensor, execution: str) -> float:
    """Median seconds of the layer as it would run with ``execution``."""
    twin = _with_execution(layer, execution)
    return median_seconds(lambda: twin.forward(x), x.device)
