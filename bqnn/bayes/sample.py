"""sample: one quantized network out of the posterior, every code of it drawn once, packed or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.batchnorm import MOST_BATCHES, is_tracked, refresh_batchnorm
from bqnn.core.check import check_int, check_module
from bqnn.core.ensemble import Ensemble
from bqnn.core.modes import replica
from bqnn.core.philox import Noise, fresh_seed
from bqnn.core.posterior import drawable_layers
from bqnn.core.references import copy_network

MOST_SEED = 2**63 - 1


def sample(net: nn.Module, seed: int | None = None, batches: Iterable[Any] | None = None) -> nn.Module:
    """One network out of the posterior: a copy of ``net`` whose layers have a code drawn for each weight.

    Of a Bayes layer the code of a weight is that of mu + sigma * noise, computed in float32 at least; the means of the
    copy lie at the levels of these codes, and its layers are deterministic, so that :func:`bqnn.pack` packs it like any
    other network. Of a packed layer with a posterior it is drawn from the row of ``chances`` that belongs to the code
    of the mean; in the copy the layer is packed, without chances. Means that have gathered at their levels, with
    variances that are alike, give both the same distribution, but the two draw different codes from one seed.

    A code is drawn once: a convolution has the same weight at every place. Layers that share a posterior share their
    codes; a layer without one keeps its own.

    Args:
        net: a network with Bayes layers, or with packed ones that :func:`bqnn.pack` made of them; or both. Of an
            ensemble each network is drawn once.
        seed: of the noise, 0 to 2^63 - 1; by default a new one from torch's default CPU generator. The same seed draws
            the same codes, on every device.
        batches: inputs on which the BatchNorm statistics of the copy are estimated again, as
            :func:`bqnn.refresh_batchnorm` takes them; without them it has those of ``net``.

    Returns:
        the copy, in evaluation mode.

    Raises:
        TypeError: ``net`` is no module, or ``seed`` no integer.
        ValueError: there is no posterior to draw from, or a parameter or table of it is out of its range, or ``seed``
            is; ``net`` can not be copied, as :func:`bqnn.convert` says; the batches do not do for the statistics.
    """
    check_module("net", net)
    _check_layers(net, 1)
    drawn = _draw(net, _seed_of(seed, 0))
    copied = copy_network(net).eval()
    layers = drawable_layers(copied)
    for name, weight in drawn.items():
        layers[name].keep(weight)
    return copied if batches is None else refresh_batchnorm(copied, batches)


def check_posterior(net: nn.Module, samples: int) -> None:
    """Raises TypeError unless ``net`` is a module, ValueError where ``samples`` networks can not be drawn from it."""
    check_module("net", net)
    if isinstance(net, Ensemble):
        each = draws_each(net, samples)
        for index, network in enumerate(net):
            try:
                check_posterior(network, each)
            except ValueError as error:
                raise ValueError(f"network {index}: {error}") from error
    else:
        _check_layers(net, samples)


def _check_layers(net: nn.Module, samples: int) -> None:
    if not any(layer.has_posterior for layer in drawable_layers(net).values()):
        raise ValueError(
            f"net has no Bayes layer with a posterior to draw {samples} samples from, nor a packed one with chances; "
            "use samples=1"
        )


def sampled_networks(
    net: nn.Module, samples: int, seed: int | None = None, batches: Iterable[Any] | None = None
) -> Iterator[nn.Module]:
    """Network after network as :func:`sample` draws them, number k with ``seed`` + k, without a copy.

    All of them are one module, which shares the tensors of ``net`` and is the next network from the next step on: it
    is to be used before that. ``net`` is not changed. Of an ensemble each network has as many draws as the others, one
    network after the other; :func:`check_posterior` says whether there can be so many.
    """
    kept = None if batches is None else list(islice(batches, MOST_BATCHES))
    if not isinstance(net, Ensemble):
        yield from _of_one(net, range(samples), seed, kept)
        return
    each = draws_each(net, samples)
    for index, network in enumerate(net):
        yield from _of_one(network, range(index * each, (index + 1) * each), seed, kept)


def draws_each(net: Ensemble, samples: int) -> int:
    """How many of ``samples`` are drawn from each network; ValueError where they are no multiple of the networks."""
    each, rest = divmod(samples, net.num_networks)
    if rest or each < 1:
        raise ValueError(f"samples must be a multiple of the {net.num_networks} networks of net, got {samples}")
    return each


def _of_one(net: nn.Module, numbers: range, seed: int | None, kept: list[Any] | None) -> Iterator[nn.Module]:
    """The networks with these numbers, all drawn from ``net``."""
    # Two replicas: the second becomes a sample, and both have the same names, other than a network that is compiled.
    source, twin = replica(net), replica(net).eval()
    norms: list[Any] = [module for module in twin.modules() if is_tracked(module)]
    for norm in norms:  # statistics of its own
        norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    layers = drawable_layers(twin)
    for number in numbers:
        for name, weight in _draw(source, _seed_of(seed, number)).items():
            layers[name].show(weight)
        if kept is not None:
            refresh_batchnorm(twin, kept)
        yield twin


def _seed_of(seed: int | None, number: int) -> Tensor:
    if seed is None:
        return fresh_seed()
    check_int("seed", seed, 0, MOST_SEED)
    return torch.tensor((int(seed) + number) % 2**63, dtype=torch.int64)


def _draw(net: nn.Module, seed: Tensor) -> dict[str, Tensor]:
    """Draws of the layers with a posterior, by name; the noise of a layer follows that of the one before it in the
    stream of the seed. Layers that share a posterior share the draw."""
    drawn: dict[str, Tensor] = {}
    of_posterior: dict[int, Tensor] = {}
    offset = 0
    for name, layer in drawable_layers(net).items():
        if not layer.has_posterior:
            continue
        key = id(layer.posterior_tensor())
        if key not in of_posterior:
            of_posterior[key] = layer.draw(Noise(seed, offset))
            offset += (layer.posterior_size() + 3) // 4
        drawn[name] = of_posterior[key]
    return drawn
