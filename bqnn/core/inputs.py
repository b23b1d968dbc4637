"""How a network is called: of one tensor, or a tuple or dict of its arguments; where they have to be; and what of its
output is meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LOGITS = ("logits", "out")
"""What the field with the logits is called: by Hugging Face and torchvision's Inception, by torchvision's
segmentation."""


def call_network(net: nn.Module, inputs: Any) -> Any:
    """``net`` of its arguments by position, in a tuple or list, or by name, in a mapping; else of the one argument."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, (tuple, list)) else net(inputs)


def logits_of(output: Any) -> Tensor:
    """The logits, or the numbers of a regression, in what a network has returned.

    Args:
        output: a tensor, which it is itself; something with a field, or a mapping with a key, of :data:`LOGITS`, as a
            ModelOutput of Hugging Face is; or a tuple or list, of which it is the first tensor with a dimension: a loss
            that stands before it has none.

    Raises:
        TypeError: there is no such tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    for name in LOGITS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)):
        found = next((each for each in output if isinstance(each, Tensor) and each.dim()), None)
        if found is not None:
            return found
    held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"the network's output must be a tensor, a tuple with one, or hold one as {' or '.join(LOGITS)}, "
        f"got {type(output).__name__}{held}"
    )


def ask(net: nn.Module, inputs: Any) -> Tensor:
    """The logits, or numbers, that ``net`` gives for its arguments; as :func:`call_network` and :func:`logits_of`."""
    return logits_of(call_network(net, inputs))


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors, nested in tuples, lists and mappings or not, on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with what ``function`` gives for each of its tensors, nested in tuples, lists and mappings or not."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [map_tensors(function, each) for each in value]
    return value


def device_of(net: nn.Module) -> torch.device:
    """Where a network's tensors are; for one that has none, such as a compiled one, what it says, or else the CPU."""
    for tensor in (*net.parameters(), *net.buffers()):
        return tensor.device
    device = getattr(net, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")
