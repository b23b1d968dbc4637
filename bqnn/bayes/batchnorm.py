"""refresh_batchnorm: BatchNorm statistics of the network that will run, not of the one that was trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bqnn.core.modes import evaluating


@torch.no_grad()
def refresh_batchnorm(net: nn.Module, batches: Iterable[Tensor], limit: int = 20) -> nn.Module:
    """Re-estimates the running statistics of every BatchNorm with the rest of the network in evaluation mode.

    The weights of training are noisy and those of the test are not, so the activations' statistics differ. The new
    ones are plain averages over the batches.

    Args:
        net: any network, changed in place; its modes are as before afterwards.
        batches: inputs, as the network takes them.
        limit: the number of batches at most; 20 are enough.

    Returns:
        ``net``.

    Raises:
        ValueError: the network has a BatchNorm and there is no batch. Statistics are then as before, as they are where
            the network itself fails.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return net
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        with evaluating(net):
            seen = _average(net, norms, itertools.islice(batches, limit))
        if seen == 0:
            raise ValueError("batches must hold at least one batch of inputs, got none")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return net


def _average(net: nn.Module, norms: list[_BatchNorm], batches: Iterable[Tensor]) -> int:
    """Lets ``norms`` alone train, on cumulative averages; returns the number of batches."""
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    seen = 0
    for x in batches:
        net(x)
        seen += 1
    return seen
