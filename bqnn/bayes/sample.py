"""sample: one quantized network out of the posterior, every code of it drawn once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bqnn import ops
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.batchnorm import is_tracked, refresh_batchnorm
from bqnn.bayes.layers import bayes_layers
from bqnn.core.check import check_int, check_module
from bqnn.core.modes import replica
from bqnn.core.philox import Noise, fresh_seed
from bqnn.core.precision import wide
from bqnn.core.quantizer import look_up
from bqnn.core.references import copy_network

MOST_SEED = 2**63 - 1


def sample(net: nn.Module, seed: int | None = None, batches: Iterable[Tensor] | None = None) -> nn.Module:
    """One network out of the posterior: a copy of ``net`` whose Bayes layers have a code drawn for each weight.

    The code of a weight is that of mu + sigma * noise, computed in float32 at least, and is drawn once: a convolution
    has the same weight at every place. The means of the copy lie at the levels of these codes, and its layers are
    deterministic, so that :func:`bqnn.pack` packs it like any other network. Layers that share a posterior share their
    codes; a deterministic layer keeps its own.

    Args:
        net: a network with Bayes layers.
        seed: of the noise, 0 to 2^63 - 1; by default a new one from torch's default CPU generator. The same seed draws
            the same codes, on every device.
        batches: inputs on which the BatchNorm statistics of the copy are estimated again, as
            :func:`bqnn.refresh_batchnorm` takes them; without them it has those of ``net``.

    Returns:
        the copy, in evaluation mode.

    Raises:
        TypeError: ``net`` is no module, or ``seed`` no integer.
        ValueError: there is no posterior to draw from; ``seed`` is out of its range; ``net`` can not be copied, as
            :func:`bqnn.convert` says; the batches do not do for the statistics.
    """
    check_posterior(net, 1)
    drawn = _draw(net, _seed_of(seed, 0))
    copied = copy_network(net).eval()
    for name, layer in bayes_layers(copied).items():
        if name in drawn:
            with torch.no_grad():
                layer.mean.copy_(drawn[name])
            layer.estimator = "deterministic"
    return copied if batches is None else refresh_batchnorm(copied, batches)


def check_posterior(net: nn.Module, samples: int) -> None:
    """Raises TypeError unless ``net`` is a module, ValueError where it has no posterior to draw from."""
    check_module("net", net)
    if all(layer.estimator == "deterministic" for layer in bayes_layers(net).values()):
        raise ValueError(f"net has no Bayes layer with a posterior to draw {samples} samples from; use samples=1")


def sampled_networks(
    net: nn.Module, samples: int, seed: int | None = None, batches: Iterable[Tensor] | None = None
) -> Iterator[nn.Module]:
    """Network after network as :func:`sample` draws them, number k with ``seed`` + k, without a copy.

    All of them are one module, which shares the tensors of ``net`` and is the next network from the next step on: it
    is to be used before that. ``net`` is not changed.
    """
    twin: Any = replica(net).eval()
    norms: list[Any] = [module for module in twin.modules() if is_tracked(module)]
    kept = None if batches is None else list(batches)
    for norm in norms:  # statistics of its own
        norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    layers = bayes_layers(twin)
    for number in range(samples):
        for name, weight in _draw(net, _seed_of(seed, number)).items():
            layers[name].drawn = weight
        if kept is not None:
            refresh_batchnorm(twin, kept)
        yield twin


def _seed_of(seed: int | None, number: int) -> Tensor:
    if seed is None:
        return fresh_seed()
    check_int("seed", seed, 0, MOST_SEED)
    return torch.tensor((int(seed) + number) % 2**63, dtype=torch.int64)


@torch.no_grad()
def _draw(net: nn.Module, seed: Tensor) -> dict[str, Tensor]:
    """Quantized weights of the layers with a posterior, by name, float32 at least; the noise of a layer follows that of
    the one before it in the stream of the seed."""
    drawn: dict[str, Tensor] = {}
    of_posterior: dict[int, Tensor] = {}
    offset = 0
    for name, layer in bayes_layers(net).items():
        if layer.estimator == "deterministic":
            continue
        key = id(layer.mean)
        if key not in of_posterior:
            of_posterior[key] = _quantized(layer, Noise(seed, offset))
            offset += (layer.mean.numel() + 3) // 4
        drawn[name] = of_posterior[key]
    return drawn


def _quantized(layer: BayesLayer, noise: Noise) -> Tensor:
    layer.check_parameters()
    mean, (levels, thresholds) = wide(layer.mean), layer.codebook()
    weight = mean + noise.normal(mean) * (0.5 * wide(layer.log_sigma2)).exp()
    return look_up(levels, ops.assign_codes(weight, thresholds))
