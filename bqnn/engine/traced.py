"""Compiled networks inside torch.compile, torch.export and torch.vmap: a part of the engine's is one op there.

The op names its network by a number that no other network has or had, in whatever process: a graph that outlives the
network, or is loaded elsewhere, fails and runs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_networks: WeakValueDictionary[int, Any] = WeakValueDictionary()


def new_number(net: Any) -> int:
    """A number for ``net``, a CompiledNetwork."""
    number = uuid4().int >> 65  # the 63 bits of a positive int64
    _networks[number] = net
    return number


@torch.library.custom_op(
    "bqnn::run_compiled", mutates_args=(), schema="(int network, int part, Tensor[] inputs) -> Tensor[]"
)
def run_compiled(network: int, part: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of one of a compiled network's parts.

    Raises:
        RuntimeError: there is no such network any more.
    """
    return list(_network(network).run_part(part, inputs))


@run_compiled.register_fake
def _fake(network: int, part: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    graph = _network(network).parts[part].graph
    x = inputs[0]
    return [x.new_empty((x.shape[0], *graph.values[name].shape), dtype=torch.float32) for name in graph.outputs]


@run_compiled.register_vmap
def _vmap(
    info: Any, dims: tuple[None, None, list[int | None]], network: int, part: int, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[int]]:
    """What is mapped over is more images."""
    size = info.batch_size
    mapped = [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(inputs, dims[2])]
    outputs = run_compiled(network, part, [x.flatten(0, 1) for x in mapped])
    return [y.unflatten(0, (size, mapped[0].shape[1])) for y in outputs], [0] * len(outputs)


def _network(number: int) -> Any:
    net = _networks.get(number)
    if net is None:
        raise RuntimeError("the compiled network that this graph was made with is gone: make the graph again")
    return net
