"""Call: an ATen operator's call, as the functions that lower it see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bqnn.engine.capture import Captured
from bqnn.engine.graph import NO_ACTIVATION, Activation, Graph, Node, Shape, Value


class Unlowered(Exception):
    """The engine has nothing for a call, which stays torch's; the message says why, in words."""


class Lowering:
    """What has been lowered so far: of each call the engine's value, or why it has none.

    Values and nodes have the names of the calls whose results they are; what lies between two of them has the name of
    the second with a number. So whatever crosses from a part of the network to another has one name in both.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.values: dict[str, Value] = {}
        self.names: dict[fx.Node, str] = {}
        """Of calls, and inputs, that are a value: its name, another call's where nothing is to be computed."""
        self.nodes: dict[fx.Node, list[Node]] = {}
        """Of lowered calls: what computes them, none where they are another value."""
        self.elements: dict[fx.Node, list[Callable[[Call], str]]] = {}
        """Of lowered calls that give several tensors: what lowers the call that takes one."""
        self.reasons: dict[fx.Node, str] = {}
        """Of the calls that stay torch's: why."""
        self.no_value: dict[fx.Node, str] = {}
        """Of inputs and calls that the engine can not take as values: why, for the calls that take them."""

    def enter(self, node: fx.Node) -> None:
        """Makes a value of what torch gives, where it can be one."""
        try:
            self.values[node.name] = Value(node.name, self.shape_of(node))
            self.names[node] = node.name
        except Unlowered as error:
            self.no_value[node] = str(error).replace("it gives", "it takes", 1)

    def shape_of(self, node: fx.Node) -> Shape:
        """The shape, without the batch, of what a call gives; raises Unlowered where it can be no value."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise Unlowered("it gives several tensors")
        sizes = list(value.shape)
        if value.dtype != torch.float32:
            raise Unlowered(f"it gives {str(value.dtype).removeprefix('torch.')}")
        if value.device != self.captured.inputs[0].meta["val"].device:
            raise Unlowered(f"it runs on {value.device}")
        if len(sizes) not in (2, 4):
            raise Unlowered(f"it gives {shown_shape(sizes)}, neither [batch, C, H, W] nor [batch, F]")
        if not self.captured.is_batch(sizes[0]) or not all(type(size) is int for size in sizes[1:]):
            raise Unlowered(f"it gives {shown_shape(sizes)}, whose first dimension alone must be the batch")
        if 0 in sizes[1:]:
            raise Unlowered(f"it gives {shown_shape(sizes)}, without elements")
        return tuple(sizes[1:])


class Call:
    """A call with its arguments by name, and the nodes that are made of it.

    A method that can not give what is asked for raises Unlowered.
    """

    def __init__(self, lowering: Lowering, node: fx.Node) -> None:
        self.node = node
        self.made: list[Node] = []
        self._lowering = lowering
        self._values: dict[str, Value] = {}
        self._arguments = _arguments(node)

    def of(self, other: Call) -> Call:
        """This call, which takes one of the tensors that ``other`` gives, with the arguments of ``other``."""
        self._arguments = other._arguments
        return self

    def __getitem__(self, name: str) -> Any:
        """An argument that is no tensor."""
        value = self._arguments[name]
        if any(isinstance(each, (fx.Node, torch.SymInt)) for each in (value if isinstance(value, list) else [value])):
            raise Unlowered(f"its argument {name} depends on an input")
        return value

    def given(self, name: str) -> bool:
        """Whether an argument is there, and not None."""
        return self._arguments.get(name) is not None

    def has(self, name: str) -> bool:
        """Whether the operator has the argument."""
        return name in self._arguments

    def node_of(self, name: str) -> Any:
        """An argument as the call has it."""
        return self._arguments[name]

    def shape(self) -> Shape:
        """Of what the call gives."""
        return self._lowering.shape_of(self.node)

    def is_whole(self, node: fx.Node, shape: Shape) -> bool:
        """Whether another call gives, for each image, the given shape."""
        try:
            return self._lowering.shape_of(node) == shape
        except Unlowered:
            return False

    def is_value(self, name: str) -> bool:
        argument = self._arguments[name]
        return isinstance(argument, fx.Node) and argument not in self._lowering.captured.constants

    def value(self, argument: str | fx.Node = "self") -> Value:
        """The engine's value that an argument is."""
        node = self._arguments[argument] if isinstance(argument, str) else argument
        if not isinstance(node, fx.Node) or node in self._lowering.captured.constants:
            raise Unlowered("it takes a constant where the engine takes a value")
        if node not in self._lowering.names:
            raise Unlowered(self._lowering.no_value.get(node, "it takes what is no single tensor"))
        return self._lowering.values[self._lowering.names[node]]

    def constant(self, name: str) -> Tensor:
        """The tensor, finite and floating point, that an argument is whatever the inputs are."""
        node = self._arguments[name]
        constant = self._lowering.captured.constants.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(constant, Tensor):
            raise Unlowered(f"its {name} depends on an input")
        if constant.is_floating_point() and not bool(constant.isfinite().all()):
            raise Unlowered(f"its {name} is not finite")
        return constant

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        shape: Shape | None = None,
        attributes: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
        activation: Activation = NO_ACTIVATION,
    ) -> str:
        """Adds a node; returns the name of its output.

        Args:
            op: the engine's operator.
            inputs: names of values.
            shape: of the output; None where it is that of the call, whose result the node is.
        """
        name = self.node.name if shape is None else f"{self.node.name}.{len(self.made)}"
        self._values[name] = Value(name, self.shape() if shape is None else shape)
        self.made.append(Node(op, tuple(inputs), name, attributes or {}, tensors or {}, activation))
        return name

    def gives(self, elements: list[Callable[[Call], str]]) -> None:
        """Says that the call gives several tensors, each of which is lowered where one takes it."""
        self._lowering.elements[self.node] = elements

    def element(self) -> Callable[[Call], str]:
        """Of a call that takes one of several tensors: what lowers it."""
        source, index = self.node.args
        elements = self._lowering.elements.get(source) if isinstance(source, fx.Node) else None
        if elements is None or not isinstance(index, int):
            raise Unlowered("it takes one of several tensors")
        return elements[index]

    def done(self, name: str | None) -> None:
        """Enters the call as the value ``name``, or as one that gives several."""
        lowering = self._lowering
        values = {**self._values}
        for node in self.made:
            inputs = tuple(dict.fromkeys(node.inputs))
            values |= {each: lowering.values[each] for each in inputs if each not in values}
            try:
                known = {each: values[each] for each in (*inputs, node.output)}
                Graph(inputs, (node.output,), known, (node,)).check()
            except ValueError as error:
                raise Unlowered(f"the engine has no such {node.op}: {str(error).partition(': ')[2]}") from error
        lowering.nodes[self.node] = self.made
        lowering.values |= self._values
        if name is not None:
            lowering.names[self.node] = name


def name_of(node: fx.Node) -> str:
    """The operator of a call, as "aten::add", whatever its overload; empty where it is none of torch's."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    arguments = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args) and not argument.kwarg_only:
            value: Any = node.args[index]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            value = argument.default_value
        arguments[argument.name] = list(value) if isinstance(value, (list, tuple)) else value
    return arguments


def shown_shape(sizes: Sequence[Any]) -> str:
    """A shape in a message; sizes that depend on the batch are stars."""
    return f"[{', '.join(str(size) if type(size) is int else '*' for size in sizes)}]"
