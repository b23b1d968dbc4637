"""Which ReLU may be left to the layer before it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from torch import nn

from bqnn.core.ensemble import Ensemble
from bqnn.core.references import references
from bqnn.engine.taps import Names, is_sequential


def relu_after(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[int, nn.ReLU]:
    """By the id of the layer before it, each nn.ReLU that directly follows one of ``kinds`` in an nn.Sequential.

    Nothing in the network may see what is between them. Both, and every module around them, are referred to once in all
    of ``net``, lists, closures and bound methods included, and have no hook. And the network's code only calls the
    Sequential and what is around it, up to the network itself or to modules that say what they call by name: it does
    not iterate, index or hand on any of them. A network that is read from outside is not seen. An ensemble is as many
    networks, which have no layer in common that is among the result.
    """
    if isinstance(net, Ensemble):
        found = [relu_after(network, kinds) for network in dict.fromkeys(net)]
        uses = Counter(id(module) for network in dict.fromkeys(net) for module in network.modules())
        return {layer: relu for each in found for layer, relu in each.items() if uses[layer] == 1}
    count = Counter(id(each.value) for each in references(net) if isinstance(each.value, nn.Module))
    relus: dict[int, nn.ReLU] = {}
    names: Names | None = None
    for path, container in net.named_modules():
        if not is_sequential(container):
            continue
        around = _modules_on(net, path)
        for layer, relu in pairwise(container):
            if not (isinstance(layer, kinds) and type(relu) is nn.ReLU):
                continue
            if any(count[id(module)] != 1 or _is_hooked(module) for module in (*around, layer, relu)):
                continue
            names = names or Names(net.modules())
            if _is_only_called(around, path, names):
                relus[id(layer)] = relu
    return relus


def _modules_on(net: nn.Module, path: str) -> list[nn.Module]:
    """The network, and every module on the way to the one at ``path``, that one included."""
    modules = [net]
    for name in filter(None, path.split(".")):
        modules.append(modules[-1]._modules[name])  # type: ignore[arg-type]
    return modules


def _is_only_called(around: list[nn.Module], path: str, names: Names) -> bool:
    """Whether each module of ``around`` is called by the one before it, and nothing else is done with it."""
    parents = zip(around, filter(None, path.split(".")))
    outside = [name for parent, name in parents if not is_sequential(parent)]
    return not outside or (not names.dynamic and all(name in names.called_only for name in outside))


def _is_hooked(module: Any) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
