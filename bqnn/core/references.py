"""What refers to what in a network: attributes, containers, closures; and a copy of it all.

Replacing a layer means that everything that refers to it gets the new one. Attributes of modules are the smaller part
of that: networks keep layers in lists, dicts, bound methods, partials, closures and weak references too.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Nothing in them is read by a forward pass, or a walk through them would not end.
_LEAVES = (type, types.ModuleType, str, bytes, bytearray, int, float, complex, torch.optim.Optimizer, torch.Generator)
_CONTAINERS = (list, tuple, set, frozenset, deque)


class Reference(NamedTuple):
    """One place that refers to a value."""

    path: str
    """The place, as an expression: ``net.heads['a']``."""
    holder: Any
    """The dict, list or other object."""
    key: Any
    """Of a dict or list the place in it."""
    value: Any
    opaque: bool
    """Whether copy.deepcopy leaves it as it is: closures, default arguments, weak references, attributes of classes."""


def references(net: nn.Module, copied: bool = False) -> Iterator[Reference]:
    """Every reference to a module, tensor or bound method that is reachable from ``net``, ``net`` itself first.

    Of modules the parameters are left out, which :meth:`nn.Module.named_modules` shows; a module that is no part of the
    network, and only kept by it, is shown with them. What C extensions hold is not seen, nor are containers that global
    variables refer to, and optimizers are not entered.

    Args:
        net: any network.
        copied: leave out what copy.deepcopy does not carry over, as the object that has it makes it anew: the compiled
            functions of torch.compile.
    """
    own = set(net.modules())
    seen: set[int] = set()
    waiting: deque[Reference] = deque([Reference("net", None, None, net, False)])
    opaque: deque[Reference] = deque()
    while waiting or opaque:
        # All that deepcopy follows comes first, so that "opaque" is said of nothing that it reaches in another way.
        reference = waiting.popleft() if waiting else opaque.popleft()
        value = reference.value
        if isinstance(value, (nn.Module, Tensor, types.MethodType)):
            yield reference
        if id(value) in seen:
            continue
        seen.add(id(value))
        for child in _children(reference, own, copied):
            (opaque if child.opaque else waiting).append(child)


def _children(parent: Reference, own: set[nn.Module], copied: bool) -> Iterator[Reference]:
    value, path, opaque = parent.value, parent.path, parent.opaque

    def child(name: str, key: Any, element: Any, hidden: bool = False, holder: Any = value) -> Reference:
        return Reference(path + name, holder, key, element, opaque or hidden)

    if value is None or isinstance(value, (*_LEAVES, Tensor)):
        return
    if isinstance(value, weakref.ReferenceType):
        yield child("()", None, value(), True)
    elif isinstance(value, types.MethodType):
        yield child(".__self__", None, value.__self__)
        yield child("", None, value.__func__)
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        for name, cell in cells:
            with contextlib.suppress(ValueError):  # not assigned yet
                yield child(f" (its variable {name})", None, cell.cell_contents, True)
        for name in _globals_of(value):
            yield child(f" (its global variable {name})", None, value.__globals__[name], True)
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield child(" (a default argument)", None, default, True)
    elif isinstance(value, functools.partial):
        for element in (value.func, *value.args, *value.keywords.values()):
            yield child(" (a partial)", None, element)
    elif isinstance(value, dict):
        for key, element in list(value.items()):
            yield child(f"[{key!r}]" if isinstance(key, (str, int)) else "[...]", key, element)
            if not isinstance(key, (str, int)):
                yield child(" (a key)", None, key)
    elif isinstance(value, _CONTAINERS):
        for index, element in enumerate(list(value)):
            yield child(f"[{index}]", index, element)
    if isinstance(value, nn.Module):
        yield from _of_module(child, value, value in own, _left_out(value) if copied else set())
    elif not isinstance(value, types.FunctionType):
        yield from _of_object(child, value, _left_out(value) if copied else set())
    yield from _of_class(child, type(value))


def _globals_of(function: types.FunctionType) -> set[str]:
    """The global variables that a function reads and that are modules."""
    code, variables = function.__code__, function.__globals__
    candidates = {name for name in code.co_names if isinstance(variables.get(name), nn.Module)}
    if not candidates:  # attributes are among the names of the code too
        return candidates
    return candidates & {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}


def _of_module(child: Any, module: nn.Module, is_own: bool, left_out: set[str]) -> Iterator[Reference]:
    registered = ("_modules", "_buffers") if is_own else ("_modules", "_buffers", "_parameters")
    for name in registered:
        for key, element in module.__dict__[name].items():
            yield child(f".{key}", key, element, holder=module.__dict__[name])
    for key, element in list(module.__dict__.items()):
        if key not in ("_modules", "_buffers", "_parameters") and key not in left_out:
            yield child(f".{key}", key, element, holder=module.__dict__)


def _of_object(child: Any, value: Any, left_out: set[str]) -> Iterator[Reference]:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for key, element in list(attributes.items()):
            if key not in left_out:
                yield child(f".{key}", key, element, holder=attributes)
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            if isinstance(kind.__dict__.get(key), types.MemberDescriptorType) and hasattr(value, key):
                yield child(f".{key}", key, getattr(value, key))


def _left_out(value: Any) -> set[str]:
    """The attributes that are not in what copy.deepcopy makes a copy of ``value`` from."""
    kind = type(value)
    own_ways = ("__reduce__", "__reduce_ex__", "__getstate__")
    if hasattr(kind, "__deepcopy__") or not hasattr(value, "__dict__"):
        return set()
    if all(getattr(kind, way, None) is getattr(object, way, None) for way in own_ways):
        return set()
    reduced: Any = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return set()
    arguments, state = reduced[1], reduced[2] if len(reduced) > 2 else None
    states = state if isinstance(state, tuple) else (state,)
    kept = {id(each) for part in states if isinstance(part, dict) for each in part.values()} | set(map(id, arguments))
    return {name for name, element in vars(value).items() if id(element) not in kept}


def _of_class(child: Any, kind: type) -> Iterator[Reference]:
    """Attributes of the classes that a network brings with it, and closures of their methods."""
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] in ("torch", "builtins", "collections", "functools", "abc", "typing"):
            continue
        for key, element in list(vars(each).items()):
            if isinstance(element, (nn.Module, Tensor, dict, *_CONTAINERS, types.FunctionType, functools.partial)):
                yield child(f".{key} (of its class)", None, element, True)


def copy_network(net: nn.Module, replacements: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``net``: every module of it once, and everything that deepcopy follows.

    Tensors of a graph, such as activations that a network keeps, are copied without it.

    Args:
        net: any network.
        replacements: by the id of a module or tensor of ``net``, what the copy has in its place.

    Raises:
        ValueError: a closure, a default argument, a weak reference or a class refers to a module of the network, and
            would still do so in the copy; names both.
    """
    names = {module: name for name, module in net.named_modules()}
    memo: dict[int, Any] = dict(replacements or {})  # deepcopy takes what its memo holds for the copy
    for reference in references(net, copied=True):
        value = reference.value
        if isinstance(value, nn.Module) and reference.opaque and value in names:
            raise ValueError(
                f"net can not be copied: {reference.path} refers to its module {names[value]!r}, and would still do so "
                "in a copy; change the network in place (convert_, pack_)"
            )
        if type(value) is Tensor and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(net, memo)
