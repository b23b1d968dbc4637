"""Which layers of a network share a weight, and what else holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bqnn.core.product import PRODUCT_LAYERS
from bqnn.core.references import references

_PLAIN = (Tensor, nn.Parameter)


@dataclass
class Ties:
    """The layers and modules that share the weights of the layers to be converted."""

    names: Mapping[Any, str]
    groups: list[list[Any]] = field(default_factory=list)
    """Two or more layers that share a weight, each."""
    readers: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    """Other modules with the weight, the name it has there, and its layer."""

    def first(self, layer: nn.Module) -> nn.Module:
        """The first of the layers that share the weight of ``layer``."""
        return next((group[0] for group in self.groups if layer in group), layer)

    def check_options(self, settings: Mapping[nn.Module, Mapping[str, Any]]) -> None:
        """Raises ValueError where layers that share a weight do not have the same options."""
        for group in self.groups:
            for layer in group[1:]:
                if settings[layer] != settings[group[0]]:
                    raise ValueError(
                        f"layer {self.names[layer]!r} shares its weight with {self.names[group[0]]!r} and must have "
                        f"the same options, got {dict(settings[layer])} and {dict(settings[group[0]])}"
                    )


def find_ties(net: nn.Module, names: Mapping[Any, str]) -> Ties:
    """The ties of the layers in ``names``.

    Raises:
        ValueError: a layer that is not converted has the weight too, or a tensor with its memory is somewhere else than
            among the parameters of a module: whoever reads it there would read the means. Names layer and reader.
    """
    ties, sharing = Ties(names), dict[int, list[Any]]()
    places = dict[int, list[Any]]()
    for layer in names:
        places.setdefault(_place(layer.weight), []).append(layer)
        sharing.setdefault(id(layer.weight), []).append(layer)
    ties.groups = [layers for layers in sharing.values() if len(layers) > 1]
    for path, module in net.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            is_weight = module in names and name == "weight"
            if not is_weight and (layers := sharing.get(id(parameter))):
                if isinstance(module, PRODUCT_LAYERS):
                    raise ValueError(
                        f"layer {names[layers[0]]!r} shares its weight with {path!r}, a {type(module).__name__} that "
                        "is not converted; skip both or neither"
                    )
                ties.readers.append((module, name, layers[0]))
            elif layer := _overlapping(parameter, places, is_weight):
                raise ValueError(_held(names[layer], f"the parameter {name!r} of {path!r}"))
    for reference in references(net):
        if isinstance(reference.value, Tensor) and (layer := _overlapping(reference.value, places)):
            raise ValueError(_held(names[layer], reference.path))
    return ties


class _GivenUp(NamedTuple):
    """A parameter that parts of a composed layer have in another form."""

    weight: nn.Parameter


def check_given_up(net: nn.Module, given_up: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Raises ValueError where something in ``net`` still holds the memory of a parameter, by the name of its layer,
    that the parts of this composed layer have copies of; names both."""
    weights = {_GivenUp(parameter): name for name, own in given_up.items() for parameter in own}
    places = dict[int, list[Any]]()
    for weight in weights:
        places.setdefault(_place(weight.weight), []).append(weight)
    held = [
        (f"the parameter {name!r} of {path!r}", parameter)
        for path, module in net.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    held += [(each.path, each.value) for each in references(net) if isinstance(each.value, Tensor)]
    for place, tensor in held:
        if (layer := _overlapping(tensor, places)) is not None:
            raise ValueError(_held(weights[layer], place))


def _held(name: str, place: str) -> str:
    return (
        f"layer {name!r}: {place} has the memory of its weight, and who reads it there would not get the quantized "
        "weight; let it read layer.weight, or skip the layer"
    )


def _overlapping(tensor: Tensor, places: Mapping[int, list[Any]], is_weight: bool = False) -> Any:
    """The layer whose weight has memory in common with ``tensor``, if there is one; of a weight another layer."""
    for layer in places.get(_place(tensor), ()):
        if tensor is layer.weight:
            if not is_weight:
                return layer
        elif _place(tensor) and _overlap(tensor, layer.weight):
            return layer
    return None


def _place(tensor: Tensor) -> int:
    """The address of its storage; 0 where it has none."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or type(tensor) not in _PLAIN:
        return 0
    return tensor.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first_a, last_a), (first_b, last_b) = _extent(a), _extent(b)
    return first_a < last_b and first_b < last_a


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that it has, and the one after its last."""
    if tensor.numel() == 0:
        return 0, 0
    first = tensor.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first * tensor.element_size()), int((last + 1) * tensor.element_size())
