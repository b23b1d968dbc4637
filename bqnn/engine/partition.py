"""partition: a lowered network as parts that run in turn, each the engine's or torch's.

A part holds the calls of one level: the engine's have even levels, torch's odd ones, and a call's level is the lowest
that is not below those of the calls it takes. So no part waits for what it gives, and there are as few as the longest
way through the network changes sides.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from bqnn.engine.capture import place
from bqnn.engine.graph import Graph, Node
from bqnn.engine.lowering.call import Lowering, name_of

WORK = ("conv2d", "linear")
"""Operators that make an engine part worth a change from torch and back."""
_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
SMALL = "it stands between calls of torch's, with too little work for a part of the engine"


@dataclass(frozen=True)
class TorchCall:
    """A call that stayed torch's."""

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class EnginePart:
    """A part that the engine runs; its inputs and outputs are those of the graph."""

    graph: Graph

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.graph.outputs


@dataclass(frozen=True)
class TorchPart:
    """A part that torch runs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: fx.GraphModule
    """Takes the inputs, gives a tuple of the outputs."""
    calls: tuple[TorchCall, ...]

    def on(self, device: torch.device) -> TorchPart:
        """The part with its constants on ``device``, and what tensors it makes of nothing there too."""
        module = copy.deepcopy(self.module)
        place(module, device)
        return replace(self, module=module)


Part = EnginePart | TorchPart


@dataclass(frozen=True)
class Partition:
    """Parts in the order in which they run."""

    parts: tuple[Part, ...]
    outputs: tuple[str, ...]
    """Of the network: names of its inputs, of what parts give, or of constants."""
    constants: dict[str, Tensor]


def partition(lowered: Lowering) -> Partition:
    """The parts of a lowered network."""
    by_torch = dict(lowered.reasons)
    _add_takers(lowered, by_torch)
    levels = _levels(lowered, by_torch)
    while by_torch and (small := _small(lowered, by_torch, levels)):
        by_torch |= dict.fromkeys(small, SMALL)
        _add_takers(lowered, by_torch)
        levels = _levels(lowered, by_torch)
    members: dict[int, list[fx.Node]] = {}
    for node, level in levels.items():
        members.setdefault(level, []).append(node)
    captured = lowered.captured
    constants = {node.name: captured.constants[node] for node in captured.outputs if node in captured.constants}
    outputs = tuple(_name(lowered, node, by_torch) for node in captured.outputs)
    parts: list[Part] = []
    wanted = set(outputs)
    for level in sorted(members, reverse=True):
        if level % 2:
            part: Part = _torch_part(lowered, members[level], wanted, by_torch)
        else:
            part = _engine_part(lowered, members[level], wanted)
        if part.outputs:
            parts.append(part)
            wanted |= set(part.inputs)
    return Partition(tuple(reversed(parts)), outputs, constants)


def _is_free(lowered: Lowering, node: fx.Node, by_torch: dict[fx.Node, str]) -> bool:
    """Whether nothing is to be computed for a call of the engine's: it gives what it takes, or several slices of it."""
    return node not in by_torch and not lowered.nodes.get(node, True)


def _name(lowered: Lowering, node: fx.Node, by_torch: dict[fx.Node, str]) -> str:
    """Under which name a part finds what a call, or an input, gives."""
    return node.name if node in by_torch else lowered.names.get(node, node.name)


def _add_takers(lowered: Lowering, by_torch: dict[fx.Node, str]) -> None:
    """Adds to torch's calls those that can not be apart from one: what only hands on what torch gives, as torch may
    look at how it lies in memory, and all that take one of several tensors, where one of them does."""
    for node in lowered.captured.nodes:
        if node in lowered.elements:
            if any(user in by_torch for user in node.users):
                reason = next(by_torch[user] for user in node.users if user in by_torch)
                by_torch |= dict.fromkeys([node, *(user for user in node.users if user not in by_torch)], reason)
        elif _is_free(lowered, node, by_torch) and (source := next(iter(node.all_input_nodes))) in by_torch:
            by_torch[node] = by_torch[source]


def _levels(lowered: Lowering, by_torch: dict[fx.Node, str]) -> dict[fx.Node, int]:
    """Of the calls that are computed: even for the engine's, odd for torch's."""
    levels: dict[fx.Node, int] = {}
    for node in lowered.captured.nodes:
        level = max((levels.get(source, 0) for source in node.all_input_nodes), default=0)
        if not _is_free(lowered, node, by_torch) and level % 2 != (node in by_torch):
            level += 1
        levels[node] = level
    return {node: level for node, level in levels.items() if not _is_free(lowered, node, by_torch)}


def _small(lowered: Lowering, by_torch: dict[fx.Node, str], levels: dict[fx.Node, int]) -> list[fx.Node]:
    """The calls of the engine's parts that are not worth it."""
    engine = {node: level for node, level in levels.items() if node not in by_torch}
    worth = {level for node, level in engine.items() if any(each.op in WORK for each in lowered.nodes[node])}
    return [node for node, level in engine.items() if level not in worth]


def _engine_part(lowered: Lowering, members: list[fx.Node], wanted: set[str]) -> EnginePart:
    made = [each for node in members for each in lowered.nodes[node]]
    needed = {node.output for node in made} & wanted
    outputs = tuple(node.output for node in made if node.output in needed)
    nodes: list[Node] = []
    for node in reversed(made):
        if node.output in needed:
            needed.update(node.inputs)
            nodes.append(node)
    nodes.reverse()
    written = {node.output for node in nodes}
    inputs = tuple(dict.fromkeys(name for node in nodes for name in node.inputs if name not in written))
    values = {name: lowered.values[name] for name in (*inputs, *(node.output for node in nodes))}
    return EnginePart(Graph(inputs, outputs, values, tuple(nodes)))


def _torch_part(lowered: Lowering, members: list[fx.Node], wanted: set[str], by_torch: dict[fx.Node, str]) -> TorchPart:
    captured, graph = lowered.captured, fx.Graph()
    root: dict[str, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, fx.Node] = {}

    def placeholder(name: str) -> fx.Node:
        if name not in inputs:
            inputs[name] = graph.placeholder(name.replace(".", "_"))
        return inputs[name]

    def copied(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node in captured.constants:
            constant = captured.constants[node]
            root[f"constant_{len(root)}"] = constant.clone() if isinstance(constant, Tensor) else constant
            copies[node] = graph.get_attr(f"constant_{len(root) - 1}")
        elif node in captured.sizes and captured.is_batch(node.meta["val"]):
            copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (placeholder(captured.inputs[0].name), 0))
        elif node in captured.sizes:
            copies[node] = graph.node_copy(node, copied)
            copies[node].meta.clear()
        else:
            return placeholder(_name(lowered, node, by_torch))
        return copies[node]

    for node in members:
        copies[node] = graph.node_copy(node, copied)
        _complete_shape(copies[node], node.meta.get("val"))
        copies[node].meta.clear()  # tensors without data, and all that export knew of sizes
    outputs = tuple(node.name for node in members if node.name in wanted)
    graph.output(tuple(copies[node] for node in members if node.name in wanted))
    calls = tuple(TorchCall(node.name, _shown(node), by_torch[node]) for node in members)
    module = fx.GraphModule(root, graph, "TorchPart")
    return TorchPart(tuple(inputs), outputs, module, calls)


def _shown(node: fx.Node) -> str:
    return str(node.target) if name_of(node) else getattr(node.target, "__name__", str(node.target))


def _complete_shape(call: fx.Node, value: Any) -> None:
    """Puts the size that -1 stands for into the shape of a view: of a batch without images torch can not tell it."""
    if len(call.args) < 2 or not isinstance(call.args[1], (list, tuple)) or str(call.target) not in _VIEWS:
        return
    sizes = [real if size == -1 and type(real) is int else size for size, real in zip(call.args[1], value.shape)]
    call.args = (call.args[0], sizes)
