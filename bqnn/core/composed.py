"""Composed layers: layers of torch with several weights, or with one in an order of their own, made of linear layers
and convolutions with one weight each.

Everything that is done with a quantized layer, from its codebook to its bytes in a file, is done with the parts, and
what stands here is the layer around them, which computes what torch's does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bqnn.core.leaf import node_of
from bqnn.core.replace import become


class Composed(nn.Module):
    """A layer of torch's with the weights of its parts, layers of one weight each, in place of its own.

    It is an instance of torch's class, takes what that takes, and shows the weights of its parts under the names that
    torch's layer has for them; they can not be assigned. It loads the state of torch's layer too.
    """

    SETTINGS: tuple[str, ...] = ()
    """The attributes that it has of torch's layer."""
    PARTS: tuple[str, ...] = ()
    """The names of parts that tell a composed layer's names in a file from those of torch's layer."""

    @classmethod
    def of(cls, layer: nn.Module, split: dict[tuple[int, str], nn.Parameter] | None = None) -> Composed:
        """The composed form of ``layer``, torch's.

        Args:
            split: by the id of a parameter and the name of a part's, what has been made of it: layers of torch's that
                share a parameter have parts that share theirs.
        """
        split = {} if split is None else split
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name in cls.SETTINGS:
            setattr(made, name, getattr(layer, name))
        made._make_parts(layer)
        for name in cls.fresh(layer)._parameters:
            if (parameter := layer._parameters[name]) is None:
                continue
            for part, tensor in made.split(name, parameter).items():
                if tensor is not parameter:
                    values = tensor.detach().clone(memory_format=torch.contiguous_format)
                    tensor = split.setdefault((id(parameter), part), nn.Parameter(values, parameter.requires_grad))
                owner, _, own = part.rpartition(".")
                made.get_submodule(owner)._parameters[own] = tensor
        return made.train(layer.training)

    @classmethod
    def fresh(cls, layer: nn.Module) -> nn.Module:
        """Torch's layer with the arguments of ``layer``, torch's or composed, and without data."""
        raise NotImplementedError

    def _make_parts(self, layer: nn.Module) -> None:
        """Makes the parts that torch's ``layer`` has weights for, without data."""
        raise NotImplementedError

    def split(self, name: str, tensor: Any) -> dict[str, Any]:
        """What the parameter ``name`` of torch's layer is here: by name, such as "out_proj.weight", each tensor."""
        raise NotImplementedError

    def joined(self) -> dict[str, nn.Parameter]:
        """The parameters of torch's layer, by name, made of those of the parts."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """Torch's layer with the weights of the parts, which are layers of torch's by now."""
        plain = self.fresh(self)
        for name, tensor in self.joined().items():
            setattr(plain, name, tensor)
        return plain.train(self.training)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; for torch.fx one node, as torch's layer is."""
        proxy = next((each for each in (*args, *kwargs.values()) if isinstance(each, Proxy)), None)
        return super().__call__(*args, **kwargs) if proxy is None else node_of(self, proxy, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            raise TypeError(f"{name} of a {type(self).__name__} is that of its parts and can not be assigned")
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Also takes the state of torch's layer, which ``state_dict``, a copy of the caller's, is changed into."""
        own = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        for key in own:
            if isinstance(state_dict[key], Tensor):
                parts = self.split(key[len(prefix) :], state_dict.pop(key))
                state_dict.update({prefix + part: tensor for part, tensor in parts.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@contextmanager
def composing(layers: Mapping[nn.Module, type[Composed]]) -> Iterator[dict[nn.Module, list[nn.Parameter]]]:
    """Turns each of ``layers`` into its composed form, in place; as they were, where what is done inside fails.

    Gives the parameters of each that its parts have in another form, and not as they are.
    """
    before = [(each, type(each), dict(each.__dict__)) for layer in layers for each in layer.modules()]
    split: dict[tuple[int, str], nn.Parameter] = {}
    given_up: dict[nn.Module, list[nn.Parameter]] = {}
    try:
        for layer, kind in layers.items():
            own = [parameter for parameter in layer._parameters.values() if parameter is not None]
            become(layer, kind.of(layer, split), kind.fresh(layer))
            kept = {id(parameter) for parameter in layer.parameters()}
            given_up[layer] = [parameter for parameter in own if id(parameter) not in kept]
        yield given_up
    except BaseException:
        for module, kept_kind, attributes in before:
            module.__class__ = kept_kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


def make_plain(layers: Iterable[Composed]) -> None:
    """Turns composed layers, whose parts are torch's, into torch's, in place."""
    for layer in layers:
        become(layer, layer.plain(), type(layer).of(type(layer).fresh(layer)))
