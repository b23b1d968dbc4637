"""Compiled networks in files: the graph as data, names and numbers, never code.

The metadata has ``version``, may have ``data`` (bqnn.files.metadata), and has ``compiled``, an object of

    precision    "fp32", "bf16" or "int8"
    inputs       of each input of the network: its name, its shape without the batch
    parts        of each part: inputs, outputs, values (name, shape, dtype, scale, zero) and nodes
    outputs      names of the network's outputs
    structure    how they are nested, outermost first, and after each what it holds: ["output", number], ["none"],
                 ["tuple", count], ["list", count] or ["dict", names]; of an ensemble, ["stack", count] and an output
                 of each network

A node has ``op``, ``inputs``, ``output``, and where it has any, ``attributes``, ``activation`` (name, low, high) and
``tensors``, by their names in the node those in the file. Infinite numbers are the texts "inf" and "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from bqnn.core.check import PRECISIONS
from bqnn.core.files import FormatError
from bqnn.core.text import shown
from bqnn.engine.capture import Structure
from bqnn.engine.compiled import CompiledNetwork, Input
from bqnn.engine.ensemble import CompiledEnsemble
from bqnn.engine.graph import NO_ACTIVATION, Activation, Graph, Node, Value
from bqnn.engine.operators import columns_of
from bqnn.engine.partition import WORK, EnginePart, TorchPart
from bqnn.files.container import Contents, is_count
from bqnn.files.metadata import FIELD as DATA

KEY = "compiled"
MAX_PARTS = 1000
MAX_NESTING = 50  # of outputs
_INFINITE = {"inf": math.inf, "-inf": -math.inf}
_FIELDS = ("precision", "inputs", "parts", "outputs", "structure")
_PART_FIELDS = ("inputs", "outputs", "values", "nodes")
_OPTIONAL = ("attributes", "tensors", "activation")


def describe(net: CompiledNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a compiled network, and its metadata.

    Raises:
        ValueError: torch runs a part of it, or an output is none of the engine's; names what.
    """
    graphs = [part.graph for part in net.parts if isinstance(part, EnginePart)]
    calls = [call for part in net.parts if isinstance(part, TorchPart) for call in part.calls]
    if calls:
        listed = ", ".join(f"{call.name} ({call.op}: {call.reason})" for call in calls)
        raise ValueError(f"net must run in the engine alone to be saved, but torch runs {shown(listed)}")
    if net.constants:
        raise ValueError(f"net must compute its outputs to be saved, but {shown(min(net.constants))!r} is a constant")
    if others := [each.name for each in net.inputs if each.dtype != "float32"]:
        raise ValueError(f"net must have float32 inputs to be saved, but {shown(others[0])!r} is another")
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    parts = []
    for index, graph in enumerate(graphs):
        nodes = []
        for node in graph.nodes:
            for kind, tensor in node.tensors.items():
                name = names.setdefault(id(tensor), f"{index}.{node.output}.{kind}")
                tensors[name] = tensor
            nodes.append(_describe_node(node, {kind: names[id(tensor)] for kind, tensor in node.tensors.items()}))
        values = [[v.name, list(v.shape), v.dtype, v.scale, v.zero] for v in graph.values.values()]
        parts.append({"inputs": graph.inputs, "outputs": graph.outputs, "values": values, "nodes": nodes})
    metadata = {
        "precision": net.precision,
        "inputs": [[each.name, list(each.shape)] for each in net.inputs],
        "parts": parts,
        "outputs": net.outputs,
        "structure": list(_flat(net.structure)),
    }
    return tensors, {KEY: metadata}


def build(contents: Contents) -> CompiledNetwork:
    """The compiled network in a file whose header has been checked.

    Everything in it is checked before anything runs: what :meth:`bqnn.engine.graph.Graph.check` asks of each part, and
    that parts, inputs and outputs fit each other.

    Raises:
        FormatError: something is unsound, or a tensor is damaged.
    """
    if unknown := set(contents.metadata) - {"version", KEY, DATA}:
        raise FormatError(f"the metadata has the unknown field {min(unknown)!r}")
    data = _object("compiled", contents.metadata[KEY], _FIELDS)
    if data["precision"] not in PRECISIONS:
        raise FormatError(f"precision must be one of {', '.join(PRECISIONS)}, got {data['precision']!r:.80}")
    inputs = tuple(_input(each) for each in _list("inputs", data["inputs"]))
    shapes = {each.name: each.shape for each in inputs}
    if not inputs or len(shapes) != len(inputs):
        raise FormatError("inputs must be one or more, with names of their own")
    tensors: dict[str, Tensor] = {}

    def tensor(name: Any) -> Tensor:
        if not isinstance(name, str) or name not in contents.entries:
            raise FormatError(f"tensor {name!r:.80} is missing")
        if name not in tensors:
            tensors[name] = contents.tensor(name)
        return tensors[name]

    parts = []
    for index, each in enumerate(_list("parts", data["parts"])[: MAX_PARTS + 1]):
        if index == MAX_PARTS:
            raise FormatError(f"parts must be at most {MAX_PARTS}")
        parts.append(_part(f"part {index}", each, shapes, tensor))
    if unexpected := sorted(set(contents.entries) - set(tensors)):
        raise FormatError(f"tensor {unexpected[0]!r} is unexpected ({len(unexpected)} that no node has)")
    outputs = _names("outputs", data["outputs"])
    if missing := [name for name in outputs if name not in shapes]:
        raise FormatError(f"output {missing[0]!r} is no input and given by no part")
    tokens = iter(_list("structure", data["structure"]))
    structure = _nested(tokens, len(outputs), 0)
    if next(tokens, None) is not None:
        raise FormatError("structure goes on behind its end")
    kind = CompiledNetwork
    if isinstance(structure, dict) and "stack" in structure:
        kind = CompiledEnsemble
        if len({shapes[outputs[number]] for number in structure["stack"]}) != 1:
            raise FormatError("the outputs of an ensemble must have one shape")
    return kind(inputs, tuple(parts), outputs, structure, {}, data["precision"])


def sizes_of(net: CompiledNetwork) -> dict[str, int]:
    """``in_channels`` and ``image_size`` of a network that takes square images alone, and ``num_classes`` of one that
    gives logits, each by its name; without those that it has not."""
    shapes = {each.name: each.shape for each in net.inputs}
    for part in net.parts:
        if isinstance(part, EnginePart):
            shapes |= {name: part.graph.values[name].shape for name in part.outputs}
    found: dict[str, int] = {}
    match [each.shape for each in net.inputs]:
        case [(channels, height, width)] if height == width:
            found |= {"in_channels": channels, "image_size": width}
    match list({shapes.get(name) for name in net.outputs}):
        case [(classes,)]:
            found["num_classes"] = classes
    return found


def layers(net: CompiledNetwork) -> dict[str, dict[str, Any]]:
    """What each node that multiplies has for a weight, by the node's name, as descriptions of packed layers say it.

    The bytes of a tensor that several nodes have are the first one's.
    """
    found = {}
    counted: set[int] = set()
    graphs = [part.graph for part in net.parts if isinstance(part, EnginePart)]
    for node, values in [(node, graph.values) for graph in graphs for node in graph.nodes if node.op in WORK]:
        tensors, kernel = node.tensors, node.attributes.get("kernel", ())
        book = tensors.get("levels", tensors.get("integers"))
        weight = tensors["codes"] if "codes" in tensors else tensors["weight"]
        columns = columns_of(node, values[node.inputs[0]].shape)
        own = {id(tensor): tensor for tensor in tensors.values() if id(tensor) not in counted}
        counted |= own.keys()
        found[node.output] = {
            "kind": node.op,
            "shape": [len(weight), columns // math.prod(kernel), *kernel],
            "num_levels": 0 if book is None else book.shape[1],
            "granularity": "channel" if book is not None and len(book) > 1 else "tensor",
            "bytes": sum(tensor.nbytes for tensor in own.values()),
            "bits_per_weight": 8 * weight.nbytes / (len(weight) * columns),
            "posterior_bytes": 0,
        }
    return found


def _describe_node(node: Node, tensors: dict[str, str]) -> dict[str, Any]:
    activation = node.activation
    described: dict[str, Any] = {"op": node.op, "inputs": node.inputs, "output": node.output}
    if node.attributes:
        described["attributes"] = {name: _written(value) for name, value in node.attributes.items()}
    if tensors:
        described["tensors"] = tensors
    if activation != NO_ACTIVATION:
        described["activation"] = [activation.name, _written(activation.low), _written(activation.high)]
    return described


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _flat(structure: Structure) -> Iterator[list[Any]]:
    if structure is None:
        yield ["none"]
    elif isinstance(structure, int):
        yield ["output", structure]
    else:
        ((kind, parts),) = structure.items()
        yield [kind, list(parts) if kind == "dict" else len(parts)]
        for part in parts.values() if kind == "dict" else parts:
            yield from _flat(part)


def _nested(tokens: Iterator[Any], outputs: int, depth: int) -> Structure:
    """The inverse of :func:`_flat`."""
    token = next(tokens, None)
    if depth > MAX_NESTING or not isinstance(token, list):
        raise FormatError(f"structure must be whole and at most {MAX_NESTING} deep")
    match token:
        case ["none"]:
            return None
        case ["output", int(number)] if is_count(number) and number < outputs:
            return number
        case ["tuple" | "list" as kind, int(count)] if is_count(count):
            # Tokens end before a count that is too large does.
            parts: list[Structure] = []
            while len(parts) < count:
                parts.append(_nested(tokens, outputs, depth + 1))
            return {kind: parts}
        case ["stack", int(count)] if is_count(count, 1) and count <= outputs and not depth:
            parts = [_nested(tokens, outputs, depth + 1) for _ in range(count)]
            if not all(isinstance(part, int) for part in parts):
                raise FormatError("an ensemble must have an output of each network")
            return {"stack": parts}
        case ["dict", list(names)] if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return {"dict": {name: _nested(tokens, outputs, depth + 1) for name in names}}
    raise FormatError(f"structure can not have {token!r:.80}")


def _input(value: Any) -> Input:
    name, shape = _row("an input", value, 2)
    if not isinstance(name, str) or not isinstance(shape, list) or not all(is_count(size, 1) for size in shape):
        raise FormatError(f"an input must have a name and a shape, got {value!r:.80}")
    return Input(name, tuple(shape))


def _part(label: str, value: Any, shapes: dict[str, tuple[int, ...]], tensor: Callable[[Any], Tensor]) -> EnginePart:
    """A part; enters what it gives into ``shapes``, which has those of all that is there before it."""
    data = _object(label, value, _PART_FIELDS)
    values = {}
    for row in _list(f"the values of {label}", data["values"]):
        name, shape, dtype, scale, zero = _row(f"a value of {label}", row, 5)
        if not isinstance(name, str) or name in values or not isinstance(shape, list):
            raise FormatError(f"a value of {label} must have a name of its own and a shape, got {row!r:.80}")
        values[name] = Value(name, tuple(shape), dtype, scale, zero)
    nodes = tuple(_node(label, each, tensor) for each in _list(f"the nodes of {label}", data["nodes"]))
    inputs, outputs = (_names(f"{side} of {label}", data[side]) for side in ("inputs", "outputs"))
    graph = Graph(inputs, outputs, values, nodes)
    try:
        graph.check()
    except ValueError as error:
        raise FormatError(f"{label}: {error}") from error
    if any(values[name].dtype != "float32" for name in (*inputs, *outputs)):
        raise FormatError(f"{label} must have float32 inputs and outputs")
    for name in inputs:
        if shapes.get(name) != values[name].shape:
            raise FormatError(f"{label}: its input {name!r} must be there before it, in the same shape")
    for name in outputs:
        if name in shapes:
            raise FormatError(f"{label}: its output {name!r} is there already")
        shapes[name] = values[name].shape
    return EnginePart(graph)


def _node(label: str, value: Any, tensor: Callable[[Any], Tensor]) -> Node:
    optional = [each for each in _OPTIONAL if isinstance(value, dict) and each in value]
    data = _object(f"a node of {label}", value, ("op", "inputs", "output", *optional))
    attributes, tensors = data.get("attributes", {}), data.get("tensors", {})
    if not isinstance(attributes, dict) or not isinstance(tensors, dict):
        raise FormatError(f"attributes and tensors of a node of {label} must be objects")
    activation = NO_ACTIVATION
    if "activation" in data:
        name, low, high = _row(f"an activation of {label}", data["activation"], 3)
        activation = Activation(name, _read(low), _read(high))
    return Node(
        data["op"],
        _names(f"inputs of a node of {label}", data["inputs"]),
        data["output"],
        {name: _read(each) for name, each in attributes.items()},
        {name: tensor(stored) for name, stored in tensors.items()},
        activation,
    )


def _read(value: Any) -> Any:
    """A number, or several, of an attribute."""
    if isinstance(value, list):
        return tuple(value)
    return _INFINITE.get(value, value) if isinstance(value, str) else value


def _object(what: str, value: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(fields):
        got = sorted(value) if isinstance(value, dict) else value
        raise FormatError(f"{what} must have the fields {', '.join(fields)} and no others, got {got!r:.80}")
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what} must be a list, got {value!r:.80}")
    return value


def _row(what: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise FormatError(f"{what} must be a list of {count}, got {value!r:.80}")
    return value


def _names(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise FormatError(f"{what} must be a list of names, got {value!r:.80}")
    return tuple(value)
