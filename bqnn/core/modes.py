"""A network in evaluation mode for one caller, while others use the same network in theirs."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, deque
from types import MethodType
from typing import Any

import torch
from torch import nn

_Waiting = deque[tuple[nn.Module, nn.Module]]

_CONTAINERS = (list, tuple, set, dict, OrderedDict)
_OWN = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict))
"""Of a module: parameters, buffers, submodules and hooks."""


def in_evaluation(net: nn.Module) -> nn.Module:
    """``net`` where all of it is in evaluation mode, else a :func:`replica` of it that is; ``net`` is left alone."""
    if not any(module.training for module in net.modules()):
        return net
    return replica(net).eval()


def replica(net: nn.Module) -> nn.Module:
    """Modules of their own, with modes, hooks and attributes of their own, that share every tensor with ``net``.

    What refers to a module of the network, in an attribute, in a container of one or as a bound method, refers to its
    twin in the replica. A compiled module's twin is not compiled: a compiled function is one of the module itself. A
    scripted module, whose modes are out of Python's reach, is copied as a whole.
    """
    twins: dict[int, Any] = {}
    # Modules are filled one after the other, not inside one another: a tuple that two of them hold is made of twins
    # that are there, whichever of the modules comes first.
    waiting: _Waiting = deque()
    twin: nn.Module = _twin(net, twins, waiting)
    while waiting:
        _fill(*waiting.popleft(), twins, waiting)
    return twin


def _twin(value: Any, twins: dict[int, Any], waiting: _Waiting) -> Any:
    """``value`` for the replica; itself where it refers to no module."""
    if id(value) in twins:
        return twins[id(value)]
    kind = type(value)
    if isinstance(value, torch.jit.ScriptModule):
        twins[id(value)] = copy.deepcopy(value)
    elif _is_compiled(value):
        twins[id(value)] = _twin(value._orig_mod, twins, waiting)
    elif isinstance(value, nn.Module):
        twins[id(value)] = type(value).__new__(type(value))
        waiting.append((value, twins[id(value)]))
    elif kind is MethodType:
        owner = _twin(value.__self__, twins, waiting)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    elif kind in _CONTAINERS:
        twins[id(value)] = value  # for a container that holds itself
        twins[id(value)] = _container_twin(value, twins, waiting)
    else:
        return value
    return twins[id(value)]


def _fill(module: nn.Module, twin: nn.Module, twins: dict[int, Any], waiting: _Waiting) -> None:
    attributes = dict(module.__dict__)
    for name in _OWN:
        attributes[name] = copy.copy(attributes[name])
        for key, value in attributes[name].items():
            attributes[name][key] = _twin(value, twins, waiting)
    for name in attributes.keys() - set(_OWN):
        attributes[name] = _twin(attributes[name], twins, waiting)
    attributes["_compiled_call_impl"] = None  # what module.compile() made
    twin.__dict__.update(attributes)


def _container_twin(container: Any, twins: dict[int, Any], waiting: _Waiting) -> Any:
    """A container of twins; the same one, which others may be reading, where there is nothing to replace in it."""
    if isinstance(container, dict):
        pairs = [(key, value, _twin(value, twins, waiting)) for key, value in container.items()]
        changed = any(twin is not value for _, value, twin in pairs)
        return type(container)((key, twin) for key, _, twin in pairs) if changed else container
    elements = list(container)
    replaced = [_twin(each, twins, waiting) for each in elements]
    changed = any(twin is not each for twin, each in zip(replaced, elements, strict=True))
    return type(container)(replaced) if changed else container


def _is_compiled(value: Any) -> bool:
    # Where nobody has compiled anything, the compiler is not imported, and importing it takes long.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(value, compiler.OptimizedModule)
