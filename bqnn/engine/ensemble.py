"""CompiledEnsemble: several networks that share their input as one compiled network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bqnn.core.ensemble import Stacked
from bqnn.engine.capture import Captured
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.graph import Graph, Node, Value
from bqnn.engine.partition import EnginePart, Part, TorchPart

Rename = Callable[[str], str]


class CompiledEnsemble(CompiledNetwork, Stacked):
    """Networks that :func:`bqnn.compile` made one of.

    ``forward`` takes what each of the networks takes, as a :class:`CompiledNetwork` does, and gives the output of each,
    stacked, in their order: logits [networks, batch, classes]. They are, bit by bit, what the networks give that are
    compiled alone. :func:`bqnn.predict` makes probabilities of them.
    """

    @property
    def num_networks(self) -> int:
        return len(self.structure["stack"])

    def _title(self) -> str:
        return f"{super()._title()} of {self.num_networks} networks"


def check_members(captured: Sequence[Captured]) -> None:
    """Raises ValueError unless each network gives a tensor, and all give one of the same shape and dtype."""
    for index, each in enumerate(captured):
        if each.structure != 0 or not all(map(each.is_batch, _first(each).shape[:1])) or not _first(each).dim():
            raise ValueError(f"network {index}: must return one tensor, [batch, ...], to be one of an ensemble")
        shapes = [_shown(_first(other)) for other in (captured[0], each)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"network {index}: must return {shapes[0]}, as network 0 does, got {shapes[1]}")


def join(members: Sequence[CompiledNetwork]) -> CompiledEnsemble:
    """The ensemble of networks that have been compiled for one example, with one output each.

    Where the engine runs all of each, there is one graph, and what several networks compute of the input alike is in it
    once: a copy of the input in 8 bits, or layers with the same weights. Else the parts of a network run after those of
    the one before it.
    """
    first = members[0]
    parts: list[Part] = []
    outputs: list[str] = []
    for index, member in enumerate(members):
        shared = {own.name: each.name for own, each in zip(member.inputs, first.inputs)}
        rename = _renaming(shared, index)
        parts += [_renamed_part(part, rename) for part in member.parts]
        outputs += map(rename, member.outputs)
    graphs = [part.graph for part in parts if isinstance(part, EnginePart)]
    if graphs and len(graphs) == len(parts):
        graph, twins = _joined(graphs)
        graph.check()
        parts, outputs = [EnginePart(graph)], [twins.get(name, name) for name in outputs]
    structure = {"stack": list(range(len(outputs)))}
    return CompiledEnsemble(first.inputs, tuple(parts), tuple(outputs), structure, {}, first.precision)


def _first(captured: Captured) -> Tensor:
    """The output of a network, without data."""
    output: Tensor = captured.outputs[0].meta["val"]
    return output


def _shown(output: Tensor) -> str:
    sizes = ", ".join(["batch", *map(str, output.shape[1:])])
    return f"[{sizes}] of {str(output.dtype).removeprefix('torch.')}"


def _renaming(shared: Mapping[str, str], index: int) -> Rename:
    """Names that no other network has, but for the inputs, which are ``shared``."""
    return lambda name: shared.get(name, f"{index}.{name}")


def _renamed_part(part: Part, rename: Rename) -> Part:
    if isinstance(part, TorchPart):
        calls = tuple(replace(call, name=rename(call.name)) for call in part.calls)
        inputs, outputs = (tuple(map(rename, names)) for names in (part.inputs, part.outputs))
        return replace(part, inputs=inputs, outputs=outputs, calls=calls)
    graph = part.graph
    values = [replace(value, name=rename(name)) for name, value in graph.values.items()]
    nodes = [replace(node, inputs=tuple(map(rename, node.inputs)), output=rename(node.output)) for node in graph.nodes]
    inputs, outputs = (tuple(map(rename, names)) for names in (graph.inputs, graph.outputs))
    return EnginePart(Graph(inputs, outputs, {value.name: value for value in values}, tuple(nodes)))


def _joined(graphs: Sequence[Graph]) -> tuple[Graph, dict[str, str]]:
    """The nodes of all ``graphs``, one after the other, without those that give what an earlier one gives.

    Also the values that are left out, and by their names those of the values that they equal.
    """
    values: dict[str, Value] = {}
    nodes: list[Node] = []
    twins: dict[str, str] = {}
    known: dict[Any, list[Node]] = {}
    for graph in graphs:
        values |= {name: graph.values[name] for name in graph.inputs}
        for node in graph.nodes:
            node = replace(node, inputs=tuple(twins.get(name, name) for name in node.inputs))
            value = graph.values[node.output]
            alike = known.setdefault(_untensored(node, value), [])
            twin = next((other for other in alike if _same_tensors(node, other)), None)
            if twin is not None:
                twins[node.output] = twin.output
                continue
            alike.append(node)
            nodes.append(node)
            values[node.output] = value
    inputs = tuple(dict.fromkeys(name for graph in graphs for name in graph.inputs))
    outputs = tuple(dict.fromkeys(twins.get(name, name) for graph in graphs for name in graph.outputs))
    return Graph(inputs, outputs, values, tuple(nodes)), twins


def _untensored(node: Node, output: Value) -> Any:
    """All that a node is, but for its tensors and the name of what it gives."""
    return node.op, node.inputs, node.activation, tuple(sorted(node.attributes.items())), replace(output, name="")


def _same_tensors(a: Node, b: Node) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        x.dtype == b.tensors[name].dtype and torch.equal(x, b.tensors[name]) for name, x in a.tensors.items()
    )
