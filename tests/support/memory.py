"""What a step of training keeps in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.bayes.layers import bayes_layers


def saved_bytes(net: nn.Module, x: Tensor, target: Tensor) -> int:
    """The bytes of all storages that backward will read, each once, but for those of parameters and buffers."""
    existing = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # they are held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in existing:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(x)
        loss = bqnn.elbo(output, target, net, 60_000).loss if bayes_layers(net) else F.cross_entropy(output, target)
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values())
