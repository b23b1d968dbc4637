"""A module becomes another one in place: whatever refers to it, in whichever way, refers to the new one."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable

from torch import nn

from bqnn.core.references import Reference, references

_REGISTRIES = ("_parameters", "_buffers", "_modules")
# What users register on a module: its hooks stay where they are.
_HOOKS = tuple(name for name in nn.Module().__dict__ if name not in (*_REGISTRIES, "training"))


def become(module: nn.Module, replacement: nn.Module, template: nn.Module) -> None:
    """Turns ``module`` into ``replacement``, which nothing else may refer to.

    Hooks, and attributes, buffers, parameters and modules that a user gave it, stay: those that ``template``, a fresh
    module of its class, does not have.
    """
    new = dict(replacement.__dict__)
    new |= {key: value for key, value in module.__dict__.items() if key not in template.__dict__}
    new |= {key: module.__dict__[key] for key in _HOOKS}
    for registry in _REGISTRIES:
        added = {k: v for k, v in module.__dict__[registry].items() if k not in template.__dict__[registry]}
        new[registry] = {**replacement.__dict__[registry], **added}
    module.__class__ = type(replacement)
    module.__dict__.clear()
    module.__dict__.update(new)


def fresh(kind: type[nn.Module]) -> nn.Module:
    """A layer of this class, torch's or a Bayes layer, with sizes of 1 and without data: a template for
    :func:`become`."""
    return kind(*[1] * (3 if issubclass(kind, (nn.Conv1d, nn.Conv2d)) else 2), device="meta")


def check_own_forward(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module whose ``forward`` an instance attribute stands in for."""
    if "forward" in module.__dict__:
        raise ValueError(f"layer {name!r} has a forward of its own, which could not be kept; remove it first")


def bound_methods(net: nn.Module, names: dict[nn.Module, str]) -> list[Reference]:
    """Where ``net`` holds a bound method of a module in ``names`` that is to become another one.

    Raises:
        ValueError: in a place that can not be assigned; names it and the module.
    """
    found = []
    for reference in references(net):
        method = reference.value
        if isinstance(method, types.MethodType) and method.__self__ in names and _is_own(method):
            if not isinstance(reference.holder, (dict, list, functools.partial)):
                raise ValueError(
                    f"layer {names[method.__self__]!r}: {reference.path} holds its bound method "
                    f"{method.__func__.__name__}, where it can not be replaced; let it refer to the layer"
                )
            found.append(reference)
    return found


def rebind(methods: Iterable[Reference]) -> None:
    """Puts the method of the same name in place of each, after its module has become another one."""
    for reference in methods:
        method, holder = reference.value, reference.holder
        name = method.__func__.__name__
        new = getattr(method.__self__, name, method)
        if isinstance(holder, functools.partial):
            arguments = tuple(new if each is method else each for each in (holder.func, *holder.args))
            keywords = {key: new if each is method else each for key, each in holder.keywords.items()}
            holder.__setstate__((arguments[0], arguments[1:], keywords, holder.__dict__))  # type: ignore[attr-defined]
        else:
            holder[reference.key] = new


def _is_own(method: types.MethodType) -> bool:
    """Whether it is a method that another class may have another version of: not one of nn.Module."""
    return getattr(nn.Module, method.__func__.__name__, None) is not method.__func__
