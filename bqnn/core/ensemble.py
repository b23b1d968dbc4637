"""Ensembles: several networks that are asked together, and what code that knows no compiled ones asks of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Stacked(nn.Module):
    """Networks as one module, whose forward gives the logits of each, stacked: [networks, B, classes]."""

    @property
    def num_networks(self) -> int:
        raise NotImplementedError


class Ensemble(nn.ModuleList, Stacked):
    """Networks that take the same inputs, as one module: a list of them, whose forward asks all.

    ``forward`` takes what each of the networks takes and gives the output of each, stacked, in their order: logits
    [networks, batch, classes]. :func:`bqnn.predict` averages their probabilities, :func:`bqnn.compile` makes one
    network of them that runs in one go, and :func:`bqnn.save` writes packed ones of one architecture into one file.

    Args:
        networks: one or more modules.

    Raises:
        TypeError: ``networks`` is not a list or another iterable of modules.
        ValueError: there is none; in ``forward``: a network does not return one tensor of the shape that the first has.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList):
            raise TypeError(f"networks must be a list of modules, got one module, {type(networks).__name__}")
        try:
            members = list(networks)
        except TypeError as error:
            raise TypeError(f"networks must be a list of modules, got {type(networks).__name__}") from error
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"networks must be modules, got {type(member).__name__} at {index}")
        if not members:
            raise ValueError("networks must have one network or more, got none")
        super().__init__(members)

    @property
    def num_networks(self) -> int:
        return len(self)

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = [network(*inputs) for network in self]
        shapes = [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in outputs]
        for index, shape in enumerate(shapes):
            if not isinstance(shape, list) or shape != shapes[0]:
                raise ValueError(f"network {index}: must return one tensor, as network 0 does {shapes[0]}, got {shape}")
        return torch.stack(outputs)
