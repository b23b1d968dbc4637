"""What convert is asked for: which modules it takes, which it leaves, and what a subclass counts as."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from bqnn.core.composed import Composed
from bqnn.core.forms import COMPOSED, composed_form, is_conv1d_of_transformers

Skip = Iterable[str | type[nn.Module] | nn.Module]

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
"""Torch's layers of one weight that become Bayes layers; those of bqnn.core.forms.COMPOSED have some as parts."""
TAKEN = ", ".join(f"nn.{kind.__name__}" for kind in (*LAYERS, *COMPOSED))
"""The names of all that is converted."""
_OWN = ("__init__", "__repr__", "reset_parameters", "_reset_parameters", "extra_repr")
"""What a subclass may have of its own: neither what it computes nor how depends on it."""


class Choice(NamedTuple):
    """The modules of a network that are converted, and those that are not to be."""

    kinds: Mapping[type[nn.Module], type[nn.Module]]
    """By each class that is converted, torch's class that it counts as."""
    skipped: set[nn.Module]
    composed: dict[nn.Module, type[Composed]]
    """The layers that become composed ones."""
    later: list[str]
    """Names to skip that no module has yet: parts of composed layers."""


def choose(net: nn.Module, skip: Skip, subclasses: Sequence[type[nn.Module]]) -> Choice:
    """What is to be done with the modules of ``net``.

    Raises:
        TypeError, ValueError: ``skip`` or ``subclasses`` holds what it can not.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, types or modules, got the string {skip!r}")
    kinds, names = _kinds(subclasses), names_of(net)
    known = {name for own in names.values() for name in own}
    entries = list(skip)
    later = [entry for entry in entries if isinstance(entry, str) and entry not in known]
    skipped = skipped_modules(names, [entry for entry in entries if not (isinstance(entry, str) and entry in later)])
    composed = {}
    for module in names:
        form = composed_form(type(module)) if type(module) in kinds else None
        if form is not None and module not in skipped:
            composed[module] = form
    return Choice(kinds, skipped, composed, later)


def _kinds(subclasses: Sequence[type[nn.Module]]) -> dict[type[nn.Module], type[nn.Module]]:
    kinds = {kind: kind for kind in (*LAYERS, *COMPOSED)}
    if not isinstance(subclasses, (list, tuple)) or not all(isinstance(kind, type) for kind in subclasses):
        raise TypeError(f"subclasses must be a list of classes, got {subclasses!r:.80}")
    for kind in subclasses:
        bases = (each for each in kind.__mro__ if each in (*LAYERS, *COMPOSED) or is_conv1d_of_transformers(each))
        base: Any = next(bases, None)
        if base is None:
            raise ValueError(f"subclasses must hold classes of layers that are converted, {TAKEN}, got {kind.__name__}")
        if own := _overridden(kind, base):
            raise ValueError(
                f"subclasses holds {kind.__name__}, which has {', '.join(own)} of its own: what they do would be lost"
            )
        kinds[kind] = base
    return kinds


def _overridden(kind: type, base: type) -> list[str]:
    """The methods and properties of ``base`` that ``kind`` has another version of."""
    above = kind.__mro__[: kind.__mro__.index(base)]
    callables = (types.FunctionType, property, classmethod, staticmethod)
    own = {name for each in above for name, value in vars(each).items() if isinstance(value, callables)}
    return sorted(name for name in own if hasattr(base, name) and name not in _OWN)


def names_of(net: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of a network and all its names: a shared one has several, the network itself ""."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def skipped_modules(names: Mapping[nn.Module, list[str]], entries: Sequence[Any]) -> set[nn.Module]:
    """The modules that ``entries`` stand for, with all that is inside them.

    Raises:
        ValueError: an entry stands for nothing in the network.
    """
    by_name = {name: module for module, all_names in names.items() for name in all_names}
    if unknown := sorted(entry for entry in entries if isinstance(entry, str) and entry not in by_name):
        raise ValueError(f"skip names modules that the network does not have: {', '.join(unknown)}")
    found: set[nn.Module] = set()
    for entry in entries:
        if isinstance(entry, type):
            roots = [module for module in names if isinstance(module, entry)]
        elif isinstance(entry, str):
            roots = [by_name[entry]]
        elif entry in names:
            roots = [entry]
        else:
            raise ValueError(f"skip holds a module that is not in the network: {type(entry).__name__}")
        found.update(module for root in roots for module in root.modules())
    return found


def by_name(net: nn.Module, skip: Skip) -> Skip:
    """``skip`` with names for modules, which a copy of the network has too."""
    if isinstance(skip, str):
        return skip
    names = names_of(net)
    return [names[entry][0] if isinstance(entry, nn.Module) and entry in names else entry for entry in skip]
