"""torch.compile(net, backend="bqnn"): the engine behind torch's own capture.

setup.py names :func:`backend` to torch. It never fails: what the engine is not for runs as torch.compile handed it
over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing

from bqnn.core.derived import version_of
from bqnn.core.text import shown
from bqnn.engine.capture import capture_as_is
from bqnn.engine.compile import checked_device
from bqnn.engine.compiled import compile_captured
from bqnn.engine.partition import EnginePart

logger = logging.getLogger("bqnn")

# Of a placeholder that stands for a parameter or buffer of the network, and not for an input.
_STATE = "_dynamo_static_input_type"


class _Unserved(Exception):
    """The engine is not for a graph; the message says why."""


def backend(
    graph: fx.GraphModule, example: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """What runs a graph that torch.compile has captured.

    The engine runs it where no gradients are recorded (torch.no_grad, torch.inference_mode), inputs are float32 and all
    have the batch as their first dimension; parameters and buffers are constants, and where one has changed since, or
    is another tensor, the graph runs as it was handed over, as it does in every other case.

    Args:
        graph: of torch's functions.
        example: its inputs: those of the network, its parameters and buffers, and sizes.
        options: ``precision``, "fp32" (as without) or "bf16".
    """
    try:
        return _Compiled(graph, example, **(options or {}))
    except Exception as error:  # of any kind: the graph itself runs in any case
        logger.info("torch.compile: the engine is not used: %s", shown(str(error)))
        return graph.forward


class _Inputs(nn.Module):
    """A graph as a network of its inputs alone."""

    def __init__(self, graph: fx.GraphModule, example: Sequence[Any]) -> None:
        super().__init__()
        self.graph = graph
        placeholders = graph.graph.find_nodes(op="placeholder")
        self.states: dict[int, Tensor] = {}
        for index, (node, value) in enumerate(zip(placeholders, example)):
            if _STATE in (node.meta.get("tensor_dict") or {}):
                self.states[index] = value
                self.register_buffer(f"state_{index}", value)
        self.sizes = {index for index, value in enumerate(example) if not isinstance(value, Tensor)}
        self.inputs = [index for index in range(len(example)) if index not in self.states and index not in self.sizes]
        self._check(placeholders, example)

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        size = inputs[0].shape[0]
        arguments = [
            getattr(self, f"state_{index}") if index in self.states else size if index in self.sizes else next(given)
            for index in range(len(self.states) + len(self.sizes) + len(inputs))
        ]
        return self.graph(*arguments)

    def _check(self, placeholders: Sequence[fx.Node], example: Sequence[Any]) -> None:
        """Raises _Unserved where a size is no batch's, or an input has none."""
        if not self.inputs:
            raise _Unserved("it has no inputs")
        shapes = [placeholders[index].meta["example_value"].shape for index in self.inputs]
        if any(not shape or not all(type(size) is int for size in shape[1:]) for shape in shapes):
            raise _Unserved("more than the first dimension of an input varies")
        batch = shapes[0][0]
        sizes = [placeholders[index].meta["example_value"] for index in self.sizes]
        for size in (*(shape[0] for shape in shapes), *sizes):
            if _expression(size) != _expression(batch):
                raise _Unserved("its inputs have no common batch")
        if any(example[index].dtype != torch.float32 for index in self.inputs):
            raise _Unserved("an input is not float32")


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


class _Compiled:
    """A graph that the engine runs for as long as its parameters and buffers stay as they are."""

    def __init__(self, graph: fx.GraphModule, example: Sequence[Any], precision: str = "fp32") -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16' for torch.compile, got {precision!r}")
        tensors = [value for value in example if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise _Unserved("gradients are recorded")
        net = _Inputs(graph, example)
        device = checked_device(*tensors)
        if torch.is_autocast_enabled(device.type):
            raise _Unserved("autocast is on")
        self.graph, self.inputs = graph, net.inputs
        self.states = [(index, tensor, version_of(tensor)) for index, tensor in net.states.items()]
        inputs = tuple(example[index] for index in net.inputs)
        with tracing(None):  # what is captured here is not part of what torch.compile is capturing
            captured = capture_as_is(net, inputs)
        if captured.writes:
            raise _Unserved("it changes an input")
        self.net = compile_captured(captured, inputs, precision).to(device)
        if not any(isinstance(part, EnginePart) for part in self.net.parts):
            raise _Unserved("it has no part for the engine")

    def __call__(self, *arguments: Any) -> Any:
        for index, tensor, version in self.states:
            if arguments[index] is not tensor or version_of(tensor) != version:
                return self.graph(*arguments)
        return self.net(*(arguments[index] for index in self.inputs))
