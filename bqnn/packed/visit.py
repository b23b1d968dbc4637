"""Which packed layers of a network run, and on what."""

from __future__ import annotations

from torch import Tensor, nn

from bqnn.packed.base import PackedLayer


def inputs_of_packed_layers(net: nn.Module, x: Tensor) -> dict[PackedLayer, Tensor]:
    """Runs ``net`` on ``x``: the packed layers in the order in which they ran, each with its first input.

    Raises:
        ValueError: ``net`` has no packed layer, or none that ran.
    """
    inputs: dict[PackedLayer, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, PackedLayer):
            inputs.setdefault(module, arguments[0])

    layers = [module for module in net.modules() if isinstance(module, PackedLayer)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        net(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs:
        raise ValueError("net must have a packed layer that runs, as bqnn.pack and bqnn.load make them, got none")
    return inputs
