"""Inputs of a network: one tensor, or a tuple or dict of its arguments; and where they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call_network(net: nn.Module, inputs: Any) -> Any:
    """``net`` of its arguments by position, in a tuple or list, or by name, in a mapping; else of the one argument."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, (tuple, list)) else net(inputs)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors, nested in tuples, lists and mappings or not, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(each, device) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_device(each, device) for each in value]
    return value


def device_of(net: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU for one that has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
