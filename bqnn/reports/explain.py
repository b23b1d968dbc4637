"""explain_speed: what runs in each packed layer, how long it was expected to take, and how long it took."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from bqnn.core.codes import digits_per_byte
from bqnn.core.timing import median_seconds
from bqnn.engine.compiled import CompiledNetwork
from bqnn.packed.base import PackedLayer
from bqnn.packed.cost import LayerWork
from bqnn.packed.probes import expected_seconds
from bqnn.packed.visit import inputs_of_packed_layers
from bqnn.reports.explain_compiled import CompiledSpeed, explain_compiled


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


@overload
def explain_speed(net: CompiledNetwork, x: Tensor | tuple[Tensor, ...]) -> CompiledSpeed: ...  # type: ignore[overload-overlap]


@overload
def explain_speed(net: nn.Module, x: Tensor) -> SpeedReport: ...


def explain_speed(net: nn.Module, x: Tensor | tuple[Tensor, ...]) -> SpeedReport | CompiledSpeed:
    """Runs ``net`` on ``x`` and says what runs in it and how long that takes.

    Of a packed network, each packed layer is timed alone on its own input (the first one, where it runs more than
    once), packed and dense, beside what was expected. The layout is how codes lie in memory when the packed op runs: on
    the reference as in the file; "ReLU" says that the layer's own outputs go through one, which is in all times.

    Of a network that :func:`bqnn.compile` made, each step of a call is timed inside of calls, a median over several:
    which kernel runs for a node, its share of the whole call and its products a second; each of torch's parts is one
    step. What steps do not explain is on a line of its own. Without the extension there is the whole call's time, and
    that of torch's parts.

    Args:
        net: a network with packed layers, or a compiled one.
        x: [batch, ...], its input; of a compiled network that takes several, a tuple of them.

    Returns:
        a list of :class:`LayerSpeed` or :class:`~bqnn.reports.explain_compiled.StepSpeed`, in the order in which they
        ran; ``print`` it for a table.

    Raises:
        ValueError: ``net`` has no packed layer, or none that ran; ``x`` does not fit a compiled network, or is empty.
        TypeError: ``x`` does not fit a compiled network.
        bqnn.BackendError: the backend that ``BQNN_BACKEND`` names can not run a layer.
    """
    if isinstance(net, CompiledNetwork):
        return explain_compiled(net, x if isinstance(x, tuple) else (x,))
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor where net is not compiled, got {type(x).__name__}")
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
