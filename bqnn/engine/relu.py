"""Which ReLU may be left to the layer before it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from torch import nn


def relu_after(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[int, nn.ReLU]:
    """By the id of the layer before it, each nn.ReLU that directly follows one of ``kinds`` in an nn.Sequential.

    Both have to be referred to once in all of ``net``, lists and dicts that are no modules included, and the ReLU must
    have no hook, which would see other inputs than before.
    """
    references = _references(net)
    relus: dict[int, nn.ReLU] = {}
    for container in net.modules():
        if not isinstance(container, nn.Sequential) or _forward_of(container) is not nn.Sequential.forward:
            continue
        for layer, relu in pairwise(container):
            if isinstance(layer, kinds) and type(relu) is nn.ReLU:
                once = references[id(layer)] == references[id(relu)] == 1
                if once and not relu._forward_hooks and not relu._forward_pre_hooks:
                    relus[id(layer)] = relu
    return relus


def _forward_of(module: nn.Module) -> Any:
    return module.__dict__.get("forward", type(module).forward)


def _references(net: nn.Module) -> Counter[int]:
    """By its id, how many attributes and elements refer to each module of ``net``."""
    count: Counter[int] = Counter()
    seen: set[int] = set()
    waiting: list[Any] = [net]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            count[id(value)] += 1
            value = value.__dict__
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
    return count
