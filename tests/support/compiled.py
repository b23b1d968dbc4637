"""What the tests of compiled networks share: small networks, and the error against the network itself in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import bqnn
from bqnn.engine.compiled import CompiledNetwork
from bqnn.engine.partition import EnginePart, TorchPart

TOLERANCE = 1e-5
"""Of the largest output: float32 against float64, over a network of a few layers."""


class Function(nn.Module):
    """A function of tensors as a network."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """``net`` with statistics and factors of BatchNorm that are not those of a new one, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5, generator=generator)
                    module.bias.uniform_(-0.5, 0.5, generator=generator)
    return net.eval()


def packed(net: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return bqnn.pack(bqnn.convert(randomized(net), **options))


def ops(fast: CompiledNetwork) -> list[str]:
    """The operators of the engine's parts, in order."""
    return [node.op for part in fast.parts if isinstance(part, EnginePart) for node in part.graph.nodes]


def reasons(fast: CompiledNetwork) -> dict[str, str]:
    """By operator why a call stayed torch's; the last one where there are several."""
    calls = [call for part in fast.parts if isinstance(part, TorchPart) for call in part.calls]
    return {call.op.removesuffix(".default"): call.reason for call in calls}


def check_outputs(fast: Any, net: nn.Module, *inputs: Tensor, roundings: float = 0.0) -> None:
    """Raises AssertionError unless ``fast`` gives what ``net`` gives in float64, in the same structure.

    It may be so many times as far off as float64 is when every layer's output is rounded as float32 would.
    """
    wide = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        given = [x.double() if x.is_floating_point() else x for x in inputs]
        expected, found = wide(*given), fast(*inputs)
        rounded = _rounded(wide, given) if roundings else None
    want, structure = pytree.tree_flatten(expected)
    have, like = pytree.tree_flatten(found)
    assert structure == like
    for i, (a, b) in enumerate(zip(want, have)):
        if a is None:
            assert b is None
            continue
        assert a.shape == b.shape
        if a.numel():
            allowed = TOLERANCE
            if roundings:
                allowed = max(allowed, roundings * _relative_error(pytree.tree_leaves(rounded)[i], a))
            error = _relative_error(b, a)
            assert error < allowed, f"relative error {error:.1e}"


def _rounded(wide: nn.Module, inputs: list[Tensor]) -> Any:
    """What a float64 network gives where each layer's output is off by a rounding of float32, drawn at random: how much
    it amplifies these is the network's own, whoever computes it."""
    generator = torch.Generator().manual_seed(0)

    def rounding(module: nn.Module, _: Any, output: Any) -> Any:
        def off(y: Tensor) -> Tensor:
            return y * (1 + 2.0**-23 * torch.randn(y.shape, dtype=y.dtype, generator=generator))

        return pytree.tree_map(lambda y: off(y) if isinstance(y, Tensor) and y.is_floating_point() else y, output)

    hooks = [m.register_forward_hook(rounding) for m in wide.modules() if not list(m.children())]
    rounded = wide(*inputs)
    for hook in hooks:
        hook.remove()
    return rounded


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((expected - found.double()).abs().max() / expected.abs().max().clamp_min(1e-3))


def compiled(net: nn.Module, *inputs: Tensor, roundings: float = 0.0, **options: Any) -> CompiledNetwork:
    """The compiled network, held to the network on ``inputs`` and on one image; it takes none, too."""
    fast = bqnn.compile(net, inputs, **options)
    for size in (len(inputs[0]), 1):
        check_outputs(fast, net, *(x[:size] for x in inputs), roundings=roundings)
    one, none = (pytree.tree_leaves(fast(*(x[:size] for x in inputs))) for size in (1, 0))
    assert [(0, *y.shape[1:]) for y in one if y is not None] == [tuple(y.shape) for y in none if y is not None]
    return fast
