"""Modules that hold a parameter which is the weight of a quantized layer too: an embedding tied to the output layer.

Such a module is made to read the layer's weight, which is the quantized one: its attribute becomes a property, as
torch.nn.utils.parametrize does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from bqnn.core.references import copy_network
from bqnn.core.sharded import is_resharding

_LAYERS = "_read_weights_of"


class _Reader:
    """What the class of a reading module has before its own. By attribute, the layer whose weight it reads is in the
    instance's dict, where copies and pickles of the network find it with the layer."""

    _parameters: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get(_LAYERS, {}):
            if is_resharding(self._parameters.get(name), value):
                self._parameters[name] = value
                return
            raise TypeError(f"{name} is the weight of a quantized layer and can not be assigned; change that layer")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get(_LAYERS, {}):
            raise TypeError(f"{name} is the weight of a quantized layer and can not be deleted; change that layer")
        super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        """A state dict that is assigned, not copied, gives the layer its parameter; the layer passes it on."""
        assign, names = metadata.get("assign_to_params_buffers", False), self.__dict__[_LAYERS]
        shared = {name: self._parameters.pop(name) for name in names if assign and name in self._parameters}
        own = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in shared}
        super()._load_from_state_dict(own, prefix, metadata, *args)  # type: ignore[misc]
        self._parameters.update(shared)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, layer in self.__dict__[_LAYERS].items():
            if name in self._parameters:
                self._parameters[name] = layer._parameters["weight"]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self).__mro__[2]
        return _new, (kind, tuple(self.__dict__[_LAYERS])), self.__dict__


def read_weight_of(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Makes ``module.<name>`` the weight of ``layer``; a parameter of this name stays if it is one of the layer's."""
    layers = {**module.__dict__.get(_LAYERS, {}), name: layer}
    kind = type(module).__mro__[2] if isinstance(module, _Reader) else type(module)
    module.__class__ = _class(kind, tuple(layers))
    module.__dict__[_LAYERS] = layers
    drop_parameter(module, name)


def read_parameter_of(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Undoes :func:`read_weight_of`: ``module.<name>`` is a parameter of the module again, this one."""
    layers = dict(module.__dict__[_LAYERS])
    del layers[name]
    kind = type(module).__mro__[2]
    module.__class__ = _class(kind, tuple(layers)) if layers else kind
    module.__dict__[_LAYERS] = layers
    if not layers:
        del module.__dict__[_LAYERS]
    module._parameters[name] = parameter


def readers(net: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every reading module of ``net``, the attribute, and the layer whose weight it reads."""
    for module in net.modules():
        if isinstance(module, _Reader):
            for name, layer in module.__dict__[_LAYERS].items():
                yield module, name, layer


def with_readers(net: nn.Module, layers: Iterable[str]) -> nn.Module:
    """``net``, or, where another module holds the weight of one of ``layers``, a copy in which it reads that weight.

    The copy has modules of its own and the tensors of ``net``.

    Args:
        net: any network.
        layers: names of its layers with a weight, torch's or Bayes ones; names of no module are left out.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    names = [name for name in layers if name in modules]
    weights = {id(weight): name for name in names if (weight := modules[name]._parameters.get("weight")) is not None}
    own = {id(modules[name]) for name in names}
    found = [
        (path, name, weights[id(parameter)])
        for path, module in net.named_modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in weights and id(module) not in own
    ]
    if found:
        net = copy_network(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})
    for path, name, layer in found:
        module = net.get_submodule(path)
        read_weight_of(module, name, net.get_submodule(layer))
        del module._parameters[name]
    return net


def drop_parameter(module: nn.Module, name: str) -> None:
    """Leaves no parameter in a reader but one that the layer has."""
    own = module._parameters.get(name)
    if own is not None and all(own is not parameter for parameter in module.__dict__[_LAYERS][name].parameters()):
        del module._parameters[name]


def _class(kind: type, names: tuple[str, ...]) -> type:
    attributes: dict[str, Any] = {name: property(_reading(name)) for name in names}
    return type(kind.__name__, (_Reader, kind), {"__module__": kind.__module__, **attributes})


def _reading(name: str) -> Callable[[Any], Any]:
    return lambda module: module.__dict__[_LAYERS][name].weight


def _new(kind: type, names: tuple[str, ...]) -> Any:
    new: Any = _class(kind, names)
    return new.__new__(new)
