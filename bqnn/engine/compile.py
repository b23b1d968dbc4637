"""compile: a network, or several, for the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bqnn.core.check import check_precision
from bqnn.core.ensemble import Ensemble
from bqnn.engine.calibrate import calibrate
from bqnn.engine.capture import Captured, capture
from bqnn.engine.compiled import DEVICES, CompiledNetwork, compile_captured, why_not
from bqnn.engine.ensemble import check_members, join
from bqnn.engine.partition import EnginePart
from bqnn.engine.quantize import quantize

Batches = Iterable[Tensor | tuple[Tensor, ...]]
S = TypeVar("S")
T = TypeVar("T")


def compile(
    net: nn.Module | Sequence[nn.Module],
    example: Tensor | tuple[Tensor, ...],
    *,
    precision: str = "fp32",
    calibration: Batches | None = None,
) -> CompiledNetwork:
    """A network for inference in one call: its packed layers, what lies between them and all else.

    The network is captured by torch.export in evaluation mode, with any size of the batch, and rewritten for the
    engine. What the engine has no operator for stays torch's; ``print`` of the result says what, and why. ``net`` stays
    as it is; what changes in it later, the compiled network does not see. The precision that packed layers were made
    with does not matter, but where torch runs them. An input that the network changes in place is left alone.

    On a GPU packed layers keep their codes, tensor cores multiply what "auto" decodes of them, and all that a batch
    launches is recorded in a CUDA graph. Products that torch makes there round float32 to TF32 where torch's own layers
    would, by the flags of torch.backends at the first call of a batch size.

    Args:
        net: on the CPU or a GPU, where the compiled network then runs; Bayes layers in it are packed first, and plain
            layers are taken with their dense weights. A list or tuple of networks that take the same inputs, or a
            :class:`bqnn.Ensemble` of them, becomes an ensemble; each has to return one tensor, all of the same shape.
        example: an input [batch, ...], or a tuple of the inputs, on the network's device; their shapes count, but for
            the batch's size, which has to be 1 or more. To the network, inputs that are floating point or uint8 are
            float32.
        precision: "fp32"; "bf16", which on the CPU at present computes as "fp32" does; or "int8", quantized activations
            and weights, on the CPU alone.
        calibration: for "int8", batches of inputs like ``example``, whose ranges the scales are made of.

    Returns:
        a module that takes inputs as ``net`` does, in order or by name, and returns what it returns; of several
        networks a :class:`CompiledEnsemble`, which returns what each of them does, stacked: [networks, batch, classes].

    Raises:
        TypeError, ValueError: an argument is wrong, or torch.export can not capture the network with a batch of any
            size; the message says why, and which network of an ensemble it is about.
    """
    check_precision(precision)
    given = checked_inputs(example)
    device = checked_device(*given)
    if refusal := why_not(device, precision):
        raise ValueError(f"precision must be another, got {precision!r}: {refusal}")
    inputs = tuple(x.float() if x.is_floating_point() or x.dtype == torch.uint8 else x for x in given)
    if (precision == "int8") != (calibration is not None):
        raise ValueError(
            "calibration must be batches of inputs where precision is 'int8', and None elsewhere, got "
            f"{'None' if calibration is None else 'some'} with {precision!r}"
        )
    if isinstance(calibration, Tensor):
        raise TypeError("calibration must be batches of inputs, a list for example, got a single tensor")

    def captured(net: Any) -> Captured:
        return capture(_checked_network(net, inputs), inputs)

    def finished(captured: Captured) -> CompiledNetwork:
        compiled = compile_captured(captured, inputs, precision)
        return compiled if calibration is None else _quantized(compiled, calibration)

    with torch.autocast(device.type, enabled=False):
        if not isinstance(net, (list, tuple, Ensemble)):
            return finished(captured(net)).to(device)
        networks = list(net)
        if not networks:
            raise ValueError("net must be a network, or one or more in a list, got none")
        calibration = None if calibration is None else list(calibration)
        captures = _each(captured, networks)
        check_members(captures)
        return join(_each(finished, captures)).to(device)


def _each(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """What ``function`` gives for each of the networks of an ensemble; errors say which one they are about."""
    found = []
    for index, each in enumerate(items):
        try:
            found.append(function(each))
        except (TypeError, ValueError) as error:
            raise type(error)(f"network {index}: {error}") from error
    return found


def _quantized(net: CompiledNetwork, batches: Batches) -> CompiledNetwork:
    """``net`` with the engine's parts in 8 bits, each calibrated on what it gets where ``net`` runs the batches."""
    engine = {index: part for index, part in enumerate(net.parts) if isinstance(part, EnginePart)}
    given: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in engine}
    # What the last of them gets, the parts before it give: the input alone, in most networks.
    before = CompiledNetwork(net.inputs, net.parts[: max(engine, default=0)], (), None, net.constants, net.precision)
    for number, batch in enumerate(batches):
        try:
            found = before.values((batch,) if isinstance(batch, Tensor) else tuple(batch))
        except (TypeError, ValueError) as error:
            raise type(error)(f"calibration batch {number}: {error}") from error
        for index, part in engine.items():
            given[index].append(tuple(found[name] for name in part.inputs))
    quantized = {
        index: EnginePart(quantize(part.graph, *calibrate(part.graph, given[index]))) for index, part in engine.items()
    }
    for part in quantized.values():
        part.graph.check()
    parts = tuple(quantized.get(index, part) for index, part in enumerate(net.parts))
    return CompiledNetwork(net.inputs, parts, net.outputs, net.structure, net.constants, net.precision)


def _checked_network(net: Any, inputs: Sequence[Tensor]) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    checked_device(*net.parameters(), *net.buffers(), *inputs)
    return net


def checked_inputs(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of ``example``: one or more, with one batch; TypeError or ValueError otherwise."""
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example must be a tensor or a tuple of tensors, got {type(example).__name__}")
    for x in inputs:
        if not x.dim() or len(x) != len(inputs[0]) or not len(x):
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise ValueError(f"example must have one batch of 1 or more as the first dimension, got {shapes}")
    return tuple(inputs)


def checked_device(*tensors: Tensor) -> torch.device:
    """Where all of a network's tensors and inputs are; raises ValueError unless that is the CPU, or one GPU."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(device.type not in DEVICES for device in devices):
        listed = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"net and example must be on the CPU, or on one GPU, got tensors on {listed}")
    return devices.pop()
