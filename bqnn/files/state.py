"""The state of a network as the tensors that a file stores."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.base import BayesLayer
from bqnn.core.ensemble import Ensemble


def stored_tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of ``net`` on the CPU, each tensor once, and the other names of those that have several.

    Of an ensemble tensors are one that have the same bits, too.
    """
    tensors: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the state {name!r} of net must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.device.type == "meta":
            raise ValueError(f"tensor {name!r} must be dense and hold data, got {value.layout} on {value.device}")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in first_names:
            alias[name] = first_names[place]
            continue
        value = value.detach().resolve_conj().resolve_neg()  # whose bytes are other numbers than they stand for
        value = value.cpu().clone(memory_format=torch.contiguous_format)
        same = first_names.setdefault(_bits(value), name) if isinstance(net, Ensemble) and value.numel() else name
        first_names[place] = same
        if same == name:
            tensors[name] = value
        else:
            alias[name] = same
    return tensors, alias


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors with the same bits have in common, and others do not."""
    data = tensor.view(-1).view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.sha256(data.data).digest()


def frozen_parameters(net: nn.Module) -> list[str]:
    """The names of the parameters of ``net`` that do not learn, in the order of its state.

    The variances of a Bayes layer whose estimator has no use for them count as what they would be with another one.
    """
    idle = {id(layer.log_sigma2): layer.variance_learns for layer in net.modules() if isinstance(layer, BayesLayer)}
    named = net.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if not idle.get(id(parameter), parameter.requires_grad)]
