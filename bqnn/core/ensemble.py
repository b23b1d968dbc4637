"""Ensembles: several networks that are asked together, and what code that knows no compiled ones asks of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.core.inputs import logits_of


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
        TypeError: ``networks`` is not a list or another iterable of modules; in ``forward``: a network returns nothing
            that :func:`bqnn.predict` takes.
        ValueError: there is none; in ``forward``: outputs have different shapes.
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

    def forward(self, *inputs: Any, **by_name: Any) -> Tensor:
        outputs = [logits_of(network(*inputs, **by_name)) for network in self]
        shapes = [list(each.shape) for each in outputs]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(f"network {index}: must return one tensor, as network 0 does {shapes[0]}, got {shape}")
        return torch.stack(outputs)
