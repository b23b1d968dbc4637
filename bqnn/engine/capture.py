"""capture: a network as a graph of ATen operators, whatever its Python looks like.

torch.export runs the network once on tensors without data, with the size of the batch left open. What comes back here
is that graph in a plainer form: nothing changes a tensor in place, the size of the batch is known where it is met, what
does not depend on an input is computed, and all constants are on the CPU, wherever the network is.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from bqnn.bayes.layers import bayes_layers
from bqnn.core.modes import replica
from bqnn.core.references import copy_network
from bqnn.core.text import shown
from bqnn.core.wrappers import unwrapped
from bqnn.engine.pack import pack
from bqnn.engine.writes import is_constant, without_writes

_USUAL = (torch.float32, torch.uint8, torch.int64, torch.bool)  # dtypes of states that can stay as they are

BATCH = 8
"""Images in the batch that a network is captured with. Export takes sizes of 0 and 1 for ones that stay, and with a few
images those may be what is left of a batch."""

Structure = Any
"""Of what a network returns: the number of an output, None, or {"tuple": [...]}, {"list": [...]}, {"dict": {...}}. Of
what an ensemble returns: {"stack": [...]}, numbers of outputs, one of each network."""


@dataclass(frozen=True)
class Captured:
    """A network as ATen operators: none of them writes to what it reads."""

    nodes: tuple[fx.Node, ...]
    """Calls in the order in which they run, those of constants and of sizes left out."""
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    structure: Structure
    """How the network nests its outputs, by their numbers."""
    constants: dict[fx.Node, Any]
    """What does not depend on an input."""
    sizes: frozenset[fx.Node]
    """Calls that give the size of the batch, or compute a number from it alone."""
    writes: bool
    """Whether the network changes an input; here it does not."""

    def is_batch(self, size: Any) -> bool:
        """Whether ``size``, of a dimension, is the size of the batch."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.inputs[0].meta["val"].shape[0].node.expr


def capture(net: nn.Module, example: tuple[Tensor, ...]) -> Captured:
    """The graph of ``net`` in evaluation mode; ``net`` stays as it is.

    Bayes layers are packed first. Hooks run once, here, on tensors without data, and what they do to outputs is part of
    the graph.

    Args:
        net: on one device.
        example: the inputs, on that device, [batch, ...] each; their values do not matter.

    Raises:
        ValueError: the network can not be captured with a batch of any size, changes a state of its own, or returns
            something else than tensors in tuples, lists and dictionaries; the message says what.
    """
    net = _copied(unwrapped(net))
    captured = capture_as_is(net, example, (False, True))
    _name_inputs(captured.inputs, net)
    return captured


def capture_as_is(net: nn.Module, example: tuple[Tensor, ...], strict: tuple[bool, ...] = (False,)) -> Captured:
    """As :func:`capture`, of a network whose mode, layers and dtype are right, and whose tensors it may hold.

    Args:
        strict: what export's argument of this name is to be, one after the other until it succeeds. The strict way
            takes several times as long, and reads the network's Python: it knows what ``len(x)`` is.
    """
    inputs = tuple(each.new_empty((BATCH, *each.shape[1:])) for each in example)
    return _captured(*without_writes(export(net, inputs, strict)))


def _copied(net: nn.Module) -> nn.Module:
    """A network like ``net``, packed, in evaluation mode and of float32; it shares what tensors it can."""
    if bayes_layers(net):
        net = pack(net)
    elif all(tensor.dtype in _USUAL for tensor in (*net.parameters(), *net.buffers())):
        return replica(net).eval()
    else:
        net = copy_network(net)
    return net.eval().float()


def _name_inputs(inputs: Sequence[fx.Node], net: nn.Module) -> None:
    """Gives inputs the names that the network's forward has for them, as far as it has."""
    taken = {node.name for node in inputs[0].graph.nodes}
    for node, name in zip(inputs, names_of_inputs(net)):
        if name not in taken:
            node.name = name


def names_of_inputs(net: nn.Module) -> list[str]:
    """What the network's forward calls its positional arguments, as far as it names them."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in inspect.signature(net.forward).parameters.values() if each.kind in positional]


def export(net: nn.Module, inputs: tuple[Tensor, ...], strict: tuple[bool, ...]) -> ExportedProgram:
    """What torch.export makes of ``net``, which is called "net" in it, with the size of the batch left open.

    Args:
        inputs: with a batch of :data:`BATCH`.
        strict: as for :func:`capture_as_is`.

    Raises:
        ValueError: it fails; the message says why.
    """
    import torch._dynamo.config  # export imports it too, and it takes seconds

    batch = Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)
    failed: Exception | None = None
    for each in strict:
        # Most calls come with shapes of their own: filling a cache of them takes a fifth of the time.
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            try:
                return torch.export.export(_Called(net), (inputs,), dynamic_shapes=shapes, strict=each)
            except Exception as error:  # of any kind: what the network's own code raises comes through as well
                failed = failed or error
    raise ValueError(
        "net must be such that torch.export captures it with a batch of any size, but that fails: "
        f"{type(failed).__name__}: {shown(str(failed))}"
    ) from failed


class _Called(nn.Module):
    """Calls a network with a tuple of inputs: one signature, whatever that of the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.net(*inputs)


def _captured(program: ExportedProgram, writes: bool) -> Captured:
    states: dict[str, Any] = {**program.state_dict, **program.constants}
    place(program.graph_module, torch.device("cpu"))
    signature = program.graph_signature
    if changed := list(signature.buffers_to_mutate.values()):
        raise ValueError(f"net must not change its own state, but it writes to {changed[0]!r}")
    constants: dict[fx.Node, Any] = {}
    inputs = []
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), signature.input_specs):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        else:
            constants[node] = states[spec.target or ""].detach().cpu()
    sizes: set[fx.Node] = set()
    batch = inputs[0].meta["val"].shape[0].node.expr
    nodes = []
    for node in program.graph.nodes:
        if node.op == "get_attr":  # a graph in the graph
            constants[node] = attrgetter(node.target)(program.graph_module)
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and (value.node.expr == batch or _all_in(node.all_input_nodes, sizes)):
            sizes.add(node)
        elif value is None:  # what export has written down of sizes, to be checked
            continue
        elif is_constant(node, constants):
            constants[node] = _computed(node, constants)
        else:
            nodes.append(node)
    outputs, structure = _outputs(program, sizes)
    return Captured(_needed(nodes, outputs), tuple(inputs), outputs, structure, constants, frozenset(sizes), writes)


def place(module: nn.Module, device: torch.device) -> None:
    """Moves the tensors of a graph, and of graphs in it, to ``device``; what calls make of nothing is made there."""
    module.to(device)
    for graph in module.modules():
        if isinstance(graph, fx.GraphModule):
            calls = [node for node in graph.graph.nodes if node.kwargs.get("device", device) not in (device, None)]
            for node in calls:
                node.update_kwarg("device", device)
            if calls:
                graph.recompile()


def _all_in(nodes: Sequence[fx.Node], known: set[fx.Node]) -> bool:
    """Whether there are nodes, and all are known."""
    return bool(nodes) and known.issuperset(nodes)


def _computed(node: fx.Node, constants: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: constants.get(source, _like(source)))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _like(source: fx.Node) -> Tensor | None:
    """What stands for an input where its dtype counts alone."""
    value = source.meta.get("val")
    return torch.empty(0, dtype=value.dtype) if isinstance(value, Tensor) else None


def _needed(nodes: list[fx.Node], outputs: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Those of ``nodes`` that ``outputs`` depend on."""
    needed = set(outputs)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return tuple(node for node in nodes if node in needed)


def _outputs(program: ExportedProgram, sizes: set[fx.Node]) -> tuple[tuple[fx.Node, ...], Structure]:
    returned = program.graph.output_node().args[0]
    specs = program.graph_signature.output_specs
    values = [value for value, spec in zip(returned, specs) if spec.kind is OutputKind.USER_OUTPUT]
    numbers: dict[fx.Node, int] = {}
    leaves: list[int | None] = []
    for value in values:
        if value is None:
            leaves.append(None)
        elif isinstance(value, fx.Node) and value not in sizes:
            leaves.append(numbers.setdefault(value, len(numbers)))
        else:
            raise ValueError(f"net must return tensors, got {type(value).__name__} among its outputs")
    spec = program.call_spec.out_spec
    return tuple(numbers), _structure(pytree.tree_unflatten(leaves, spec))


def _structure(value: Any) -> Structure:
    if value is None or type(value) is int:
        return value
    if type(value) in (tuple, list):
        return {type(value).__name__: [_structure(each) for each in value]}
    if type(value) in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _structure(each) for key, each in value.items()}}
    kind = type(value).__name__
    raise ValueError(f"net must return tensors, or tuples, lists and dictionaries by name of them, got {kind}")


def nested(structure: Structure, outputs: Sequence[Tensor]) -> Any:
    """The outputs as the network returns them."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return outputs[structure]
    ((kind, parts),) = structure.items()
    if kind == "stack":
        return torch.stack([outputs[number] for number in parts])
    if kind == "dict":
        return {name: nested(part, outputs) for name, part in parts.items()}
    return (tuple if kind == "tuple" else list)(nested(part, outputs) for part in parts)
