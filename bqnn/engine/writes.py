"""without_writes: an exported program in which no call writes to what it reads."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

# Of ops that give their input itself, or a part of it, and whose schemas do not say so.
_PASSES_ON = ("dropout", "dropout_", "feature_dropout", "alpha_dropout")
# Of ops whose first argument counts for its dtype alone.
_NEW = ("aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default")

Plain = dict[fx.Node, tuple[Any, fx.Node]]
"""Of calls that write to x, as ``x.add_(y)``, the plain operator, as of ``x.add(y)``, and what made x."""


def without_writes(program: ExportedProgram) -> tuple[ExportedProgram, bool]:
    """The program without calls that write to what depends on an input, and whether one wrote to an input itself.

    Calls that write to constants, which a call has made, are left: who computes them in their order gets what is right.

    Raises:
        ValueError: a parameter or buffer of the network is written to.
    """
    plain = _plain_calls(program)
    if plain is None:
        program = program.run_decompositions({})
        return program, bool(program.graph_signature.user_inputs_to_mutate)
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    for node, (target, _) in plain.items():
        node.target = target
    return program, any(source.name in inputs for _, source in plain.values())


def is_constant(node: fx.Node, constants: Container[fx.Node]) -> bool:
    """Whether a call gives the same whatever the inputs are, given what else is constant."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    sources = node.all_input_nodes
    return all(source in constants for source in sources) or (str(node.target) in _NEW and len(sources) == 1)


def _plain_calls(program: ExportedProgram) -> Plain | None:
    """None where the plain operators are not the same: where somebody looks at what was written, and not through the
    result."""
    owner: dict[fx.Node, fx.Node] = {}
    """Of calls that give a tensor, or a view of one, that was there before: what made it."""
    written: set[fx.Node] = set()
    constants: set[fx.Node] = set()
    taken: set[fx.Node] = set()
    """Constants that a call with inputs has looked at."""
    plain: Plain = {}
    specs = dict(zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs))
    for node in program.graph.nodes:
        read = {owner.get(source, source) for source in node.all_input_nodes}
        if read & written:
            return None
        if node.op != "call_function":
            if node in specs and specs[node].kind is not InputKind.USER_INPUT:
                constants.add(node)
            continue
        if is_constant(node, constants):
            constants.add(node)
        else:
            taken |= read
        schema = getattr(node.target, "_schema", None)
        if not node.all_input_nodes:
            continue
        first = node.all_input_nodes[0]
        source = owner.get(first, first)
        if schema is None:  # getitem
            owner[node] = source
        elif schema.is_mutable:
            if node in constants and source.op == "call_function" and source not in taken:
                owner[node] = source
                continue
            spec = specs.get(source)
            if spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                raise ValueError(f"net must not change its own state, but it writes to {spec.target!r}")
            target = _plain(node.target)
            if target is None:
                return None
            plain[node] = target, source
            written.add(source)
        elif any(each.alias_info for each in schema.returns) or node.target.__name__.split(".")[0] in _PASSES_ON:
            owner[node] = source
    return plain


def _plain(target: Any) -> Any:
    """The operator that gives what ``target`` writes to its first argument; None where there is none."""
    name = target._schema.name.split("::")[-1]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    plain = getattr(packet, target._overloadname, None) if name.endswith("_") else None
    # The first argument, which is written to, may have another name.
    arguments = [[each.name for each in one._schema.arguments[1:]] for one in (plain, target) if one is not None]
    return plain if len(arguments) == 2 and arguments[0] == arguments[1] else None
