"""CompiledNetwork: a network as parts that run in turn, the engine's and torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from bqnn.core.leaf import NotScriptable
from bqnn.core.native import cpu_isa, warn_of_missing
from bqnn.engine import reference
from bqnn.engine.capture import Captured, Structure, nested
from bqnn.engine.graph import RELU, Activation, Graph
from bqnn.engine.lower import lower
from bqnn.engine.partition import EnginePart, Part, TorchPart, partition
from bqnn.engine.passes import optimize
from bqnn.engine.program import Program
from bqnn.engine.replay import Replay
from bqnn.engine.torch_program import TorchProgram
from bqnn.engine.traced import new_number, run_compiled

_making = threading.Lock()
_compiling, _transforms = torch.compiler.is_dynamo_compiling, torch._C._are_functorch_transforms_active

Run = Callable[[Sequence[Tensor]], Sequence[Any]]


CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda")
"""Types of those that compiled networks run on."""


def executor(graph: Graph, precision: str, device: torch.device = CPU) -> Run:
    """What runs a graph on a device: it takes float32 tensors [batch, *shape] and gives those of its outputs."""
    if device.type == "cuda":
        return Replay(TorchProgram(graph, device, precision))
    if cpu_isa() == "none":
        warn_of_missing()
        return partial(reference.run, graph, dtype=torch.float32)
    return Program(graph)


@dataclass(frozen=True)
class Input:
    """What a compiled network takes."""

    name: str
    shape: tuple[int, ...]
    """Without the batch."""
    dtype: str = "float32"
    """Of the tensor that parts get; of an input that is float32, any floating point or uint8 tensor will do."""

    def check(self, x: Any, device: torch.device) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name} must be a tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{self.name} must be a dense tensor, got one that is nested or sparse")
        if x.device != device:
            place = f"{'the CPU' if device == CPU else device}, where the compiled network runs"
            raise ValueError(f"{self.name} must be on {place}, got one on {x.device}")
        if tuple(x.shape[1:]) != self.shape or not x.dim():
            needed = ", ".join(["batch", *map(str, self.shape)])
            raise ValueError(f"{self.name} must have the shape [{needed}], got {list(x.shape)}")
        if self.dtype == "float32":
            if not (x.is_floating_point() or x.dtype == torch.uint8):
                raise TypeError(f"{self.name} must be floating point or uint8, got {x.dtype}")
        elif str(x.dtype) != f"torch.{self.dtype}":
            raise TypeError(f"{self.name} must be torch.{self.dtype}, as in the example, got {x.dtype}")
        if (x.requires_grad and torch.is_grad_enabled()) or _has_tangent(x):
            raise RuntimeError(
                f"{self.name} must not require a gradient, which a compiled network has none of: call it under "
                "torch.no_grad(), or with a detached tensor"
            )


def _has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation goes through ``x``."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


class CompiledNetwork(NotScriptable, nn.Module):
    """A network that :func:`bqnn.compile` made. It has no parameters and no gradients.

    It runs on the device that it was compiled for, and ``to`` and ``cuda`` take it to another: the CPU, or a GPU where
    its precision is not "int8". There a size of the batch is recorded in a CUDA graph when it first comes, the last 16
    sizes are kept, and calls take turns.

    ``forward`` takes the inputs that the network took, each [batch, ...] with any size of the batch, 0 included, in any
    strides: float32, float64, float16, bfloat16 or uint8. All are computed in float32, float64 too; outputs that are
    float32 get the dtype of the first floating point input. An input that requires a gradient, where gradients are
    recorded, is an error. Autocast does not reach inside. Several threads may call it at once. In graphs of
    torch.compile and torch.export, and under torch.vmap, each part of the engine's is an op.

    ``print`` shows the parts that run in turn, a line a node.

    Args:
        inputs: what forward takes.
        parts: the engine's and torch's, in the order in which they run.
        outputs: names of inputs, of what parts give, or of constants.
        structure: how outputs are nested.
        constants: outputs that depend on no input.
        precision: "fp32", "bf16" or "int8".
    """

    def __init__(
        self,
        inputs: tuple[Input, ...],
        parts: tuple[Part, ...],
        outputs: tuple[str, ...],
        structure: Structure,
        constants: dict[str, Tensor],
        precision: str,
    ) -> None:
        super().__init__()
        self.inputs, self.parts, self.outputs, self.structure = inputs, parts, outputs, structure
        self.constants, self.precision = constants, precision
        self.device = CPU
        self.training = False
        self._runs: tuple[Run, ...] | None = None
        self._only: Callable[[list[Tensor]], Sequence[Any]] | None = None
        """What runs the one part of a network that has one, with one input and one output."""
        self._number = new_number(self)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """As every module's. A small network takes less time than the way of torch's modules to ``forward``, and the
        checks there: the usual call goes past them, to the extension, which checks the input itself."""
        only = self._only
        if only is not None and len(inputs) == 1 and not named and not self._is_hooked() and not _compiling():
            x = inputs[0]
            if type(x) is Tensor and x.dtype is torch.float32 and not x.requires_grad and not x.is_nested:
                if not torch.is_autocast_enabled("cpu") and forward_ad._current_level < 0:
                    try:
                        return only([x])[0]
                    except (ValueError, RuntimeError):
                        pass  # torch.vmap has a way of its own below; errors are raised again, and name the input
        return super().__call__(*inputs, **named)

    def _is_hooked(self) -> bool:
        own = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return bool(own) or self._compiled_call_impl is not None or _has_any_global_hook()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The network's outputs, nested as the network nests them; inputs may be given by their names.

        Raises:
            TypeError, ValueError: an input has a wrong dtype, shape or device; the message names it.
            RuntimeError: an input requires a gradient, and gradients are recorded.
        """
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self.forward(*inputs, **named)
        inputs = (*inputs, *self._positional(len(inputs), named))
        found = self.values(inputs)
        dtype = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
        outputs = [found[name] for name in self.outputs]
        return nested(self.structure, [y.to(dtype) if y.dtype == torch.float32 else y for y in outputs])

    def values(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """What parts hand on, by name: inputs and the outputs of parts, as they are computed."""
        self._check(inputs)
        found: dict[str, Any] = dict(self.constants)
        for each, x in zip(self.inputs, inputs):
            found[each.name] = x.float() if each.dtype == "float32" else x
        run = self._run_traced if torch.compiler.is_compiling() or _transforms() else self.run_part
        with torch.no_grad():
            for index, part in enumerate(self.parts):
                found.update(zip(part.outputs, run(index, [found[name] for name in part.inputs])))
        return found

    def run_part(self, index: int, inputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one of the parts, for its inputs as they are computed."""
        return (self._runs or self._prepared())[index](inputs)

    def _run_traced(self, index: int, inputs: list[Any]) -> Sequence[Any]:
        """As :meth:`run_part`, where a compiler or a transform looks on."""
        part = self.parts[index]
        if isinstance(part, TorchPart):
            return run_torch(part, inputs)
        return run_compiled(self._number, index, inputs)

    def train(self, mode: bool = True) -> CompiledNetwork:
        """Leaves the network as it is: it is always in evaluation mode."""
        return self

    def __repr__(self) -> str:
        lines = [f"{self._title()}, {self.precision}" + (f", {self.device}" if self.device != CPU else "")]
        lines += [f"  input {each.name} [{', '.join(['batch', *map(str, each.shape)])}]" for each in self.inputs]
        for index, part in enumerate(self.parts):
            lines.append(f"part {index}, {'the engine' if isinstance(part, EnginePart) else 'torch'}")
            lines += _table(_rows(part))
        return "\n".join(lines)

    def _title(self) -> str:
        return type(self).__name__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": None, "_only": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = new_number(self)

    def _positional(self, given: int, named: Mapping[str, Any]) -> list[Any]:
        """Inputs by name, in their order, after ``given`` ones that are positional."""
        rest = [each.name for each in self.inputs[given:]]
        if others := sorted(named.keys() - set(rest)):
            names = ", ".join(each.name for each in self.inputs)
            raise TypeError(f"the network takes the inputs {names}, each once, got {others[0]!r}")
        return [named[name] for name in rest[: len(named)] if name in named]

    def _check(self, inputs: Sequence[Any]) -> None:
        if len(inputs) != len(self.inputs):
            names = ", ".join(each.name for each in self.inputs)
            raise TypeError(f"the network takes {len(self.inputs)} inputs, {names}, got {len(inputs)}")
        for each, x in zip(self.inputs, inputs):
            each.check(x, self.device)
            images = inputs[0].shape[0]  # not len, which would fix the batch of what torch.export traces
            if x.shape[0] != images:
                raise ValueError(f"{each.name} must have {images} images, as the first input, got {x.shape[0]}")

    def _prepared(self) -> tuple[Run, ...]:
        with _making:
            if self._runs is None:
                self._runs = tuple(
                    executor(part.graph, self.precision, self.device)
                    if isinstance(part, EnginePart)
                    else partial(run_torch, part)
                    for part in self.parts
                )
                if self.device != CPU:
                    return self._runs
                names = tuple(each.name for each in self.inputs)
                ends = [(part.inputs, part.outputs) for part in self.parts if isinstance(part, EnginePart)]
                single = len(self.parts) == len(names) == len(self.outputs) == 1 and self.structure == 0
                if single and ends == [(names, self.outputs)]:
                    only = self._runs[0]
                    self._only = only.run if isinstance(only, Program) else only
            return self._runs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledNetwork:
        try:
            moved = fn(torch.empty(0, dtype=torch.float32, device=self.device))
        except (RuntimeError, AssertionError) as error:  # there is no such device here
            raise RuntimeError(f"a compiled network can not be moved there: {error}") from error
        if moved.dtype != torch.float32:
            raise RuntimeError(
                "a compiled network has the precision that it was compiled for: compile the network again for another"
            )
        if refusal := why_not(moved.device, self.precision):
            raise RuntimeError(refusal)
        if moved.device != self.device:
            self.device = moved.device
            self.constants = {name: constant.to(self.device) for name, constant in self.constants.items()}
            self.parts = tuple(part.on(self.device) if isinstance(part, TorchPart) else part for part in self.parts)
            self._runs = self._only = None
        return self


def why_not(device: torch.device, precision: str) -> str:
    """Why networks that are compiled for ``precision`` do not run on ``device``; "" where they do."""
    if device.type not in DEVICES:
        return f"a compiled network runs on the CPU or a GPU, not on {device}"
    if device.type == "cuda" and precision == "int8":
        return "what is compiled for 'int8' runs on the CPU alone; a GPU has 'fp32' and 'bf16'"
    return ""


def run_torch(part: TorchPart, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of a part of torch's."""
    # Views were captured on contiguous tensors.
    return part.module(*(x.contiguous() if isinstance(x, Tensor) else x for x in inputs))


def compile_captured(captured: Captured, example: tuple[Tensor, ...], precision: str) -> CompiledNetwork:
    """The compiled network of a captured one, whose inputs are like ``example``."""
    split = partition(lower(captured))
    parts = tuple(_finished(part) for part in split.parts)
    described = tuple(
        Input(node.name, tuple(x.shape[1:]), str(x.dtype).removeprefix("torch."))
        for node, x in zip(captured.inputs, example)
    )
    return CompiledNetwork(described, parts, split.outputs, captured.structure, split.constants, precision)


def _finished(part: Part) -> Part:
    if isinstance(part, TorchPart):
        return part
    graph = optimize(part.graph)
    graph.check()
    return EnginePart(graph)


def _rows(part: Part) -> list[tuple[str, ...]]:
    if isinstance(part, TorchPart):
        return [(call.name, call.op, call.reason) for call in part.calls]
    rows: list[tuple[str, ...]] = []
    for node in part.graph.nodes:
        value = part.graph.values[node.output]
        shape = f"[{', '.join(map(str, value.shape))}]"
        rows.append((node.output, node.op, shape, value.dtype, _shown(node.activation)))
    return rows


def _shown(activation: Activation) -> str:
    if activation.name == "none":
        return ""
    if activation == RELU:
        return "relu"
    numbers = {"clamp": f"({activation.low:g}, {activation.high:g})", "leaky_relu": f"({activation.low:g})"}
    return activation.name + numbers.get(activation.name, "")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return ["  " + "".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
