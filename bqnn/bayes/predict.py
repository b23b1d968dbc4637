"""predict: class probabilities with uncertainty, by sampling the posterior or by an ensemble."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bqnn.bayes.sample import check_posterior, sampled_networks
from bqnn.core.check import check_integer, check_module
from bqnn.core.ensemble import Ensemble, Stacked
from bqnn.core.modes import in_evaluation
from bqnn.core.precision import wide


class Prediction(NamedTuple):
    """What the posterior, or an ensemble, says of a batch: float32, or float64 where the logits are."""

    probs: Tensor  # [B, classes], the mean over the samples, or networks
    entropy: Tensor  # [B], nats: the total uncertainty of probs
    mutual_information: Tensor  # [B], nats: the part of it that is uncertainty about the weights


def _entropy(probs: Tensor) -> Tensor:
    """float64: a mutual information is a small difference of two of them."""
    return torch.special.entr(probs.double()).sum(-1)


@torch.no_grad()
def predict(
    net: nn.Module,
    x: Tensor,
    samples: int | None = None,
    *,
    seed: int | None = None,
    batches: Iterable[Tensor] | None = None,
) -> Prediction:
    """The predictive distribution of a classifier in evaluation mode.

    Nothing of ``net`` is changed, so that threads may call this at once, and others use the network meanwhile, in
    training mode too: where it is not in evaluation mode, or samples are drawn, a replica with the same tensors is
    asked. What a module of the replica sets on itself is then not to be seen on the network, and a compiled network
    runs uncompiled.

    A packed network has as much of a posterior as its tables of chances say. Where the same samples are asked many
    times, they are drawn once and run as one, from their codes and on the CPU:
    ``bqnn.compile([bqnn.sample(net, seed) for seed in range(16)], example)``.

    Args:
        net: a network that returns logits [B, classes]; or an ensemble, a :class:`bqnn.Ensemble` or what
            :func:`bqnn.compile` makes of several, whose networks stand for samples.
        x: inputs, as the network takes them; half precision ones are float32 to a compiled ensemble.
        samples: networks to draw from the posterior and to average over. Each has a code for each weight, drawn once,
            as :func:`bqnn.sample` draws it, whatever the estimator: noise that is drawn anew at every place of an
            image, as training does, is averaged away by pooling. 1, or None, is the quantized network itself, without
            sampling and with a mutual information of 0. Of an ensemble None, or the number of its networks, are these
            themselves; n times as many are n draws from the posterior of each.
        seed: of the samples, 0 to 2^63 - 1: number k is that of ``bqnn.sample(net, seed + k)``, in an ensemble of
            network k // n. By default each has a new one from torch's default CPU generator.
        batches: inputs on which the BatchNorm statistics of each sampled network are estimated again; 20 batches at
            most, which are kept meanwhile. Without them all have those of ``net``, whose activations are not quite
            theirs. A file holds no inputs: who deploys a packed network with BatchNorm brings some along.

    Raises:
        TypeError: ``net`` is no module, or ``samples`` or ``seed`` no integer.
        ValueError: samples < 1, more than 1 of a network that has no posterior (a full-precision one, or a packed one
            without chances), or of an ensemble no multiple of the number of its networks, of a compiled one any other
            number; ``seed`` out of its range.
    """
    check_module("net", net)
    if samples is not None:
        check_integer("samples", samples)
    if isinstance(net, Stacked):
        if samples in (None, net.num_networks):
            logits = in_evaluation(net)(x) if isinstance(net, Ensemble) else net(wide(x))
            return of_draws(wide(logits).softmax(-1))
        if not isinstance(net, Ensemble):
            raise ValueError(f"samples must be None, or the {net.num_networks} networks of the ensemble, got {samples}")
    samples = 1 if samples is None else samples
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if samples == 1 and not isinstance(net, Ensemble):
        probs = wide(in_evaluation(net)(x)).softmax(-1)
        return Prediction(probs, _entropy(probs).to(probs), torch.zeros_like(probs[..., 0]))
    check_posterior(net, samples)
    networks = sampled_networks(net, samples, seed, batches)
    return of_draws(torch.stack([wide(network(x)).softmax(-1) for network in networks]))


def of_draws(draws: Tensor) -> Prediction:
    """The prediction of networks whose probabilities are ``draws`` [networks, B, classes], float32 or float64."""
    mean = draws.mean(0, dtype=torch.float64)
    entropy = _entropy(mean)
    information = (entropy - _entropy(draws).mean(0)).clamp(min=0.0)
    return Prediction(*(each.to(draws.dtype) for each in (mean, entropy, information)))
