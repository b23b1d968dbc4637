"""The objective: evidence lower bound, its two terms, the warm-up of the divergence, and optimizer groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.layers import bayes_layers
from bqnn.bayes.likelihood import Likelihood
from bqnn.core.check import check_number
from bqnn.core.inputs import logits_of
from bqnn.core.precision import wide, wide_dtype

CODEBOOK_LR, VARIANCE_LR = 0.1, 0.3
"""Learning rates of levels and thresholds, and of log_sigma2, as factors: docs/recipe.md."""


class Elbo(NamedTuple):
    """The negative evidence lower bound of a batch, a sample: ``loss = nll + kl_weight * kl / dataset_size``."""

    loss: Tensor  # nats a sample
    nll: Tensor  # nats a sample
    kl: Tensor  # nats, summed over the weights of the whole network


def kl_divergence(net: nn.Module) -> Tensor:
    """KL(q || prior) summed over every weight of every Bayes layer, a scalar in nats, float32 or float64.

    Layers whose weights are tied count once.

    Raises:
        ValueError: the network has no Bayes layer.
    """
    layers = bayes_layers(net)
    if not layers:
        raise ValueError("net has no Bayes layer; convert it first: net = bqnn.convert(net)")
    posteriors: dict[tuple[int, ...], BayesLayer] = {}
    for layer in layers.values():
        key = tuple(map(id, layer.weight_sources()))
        # A tied layer that is deterministic makes no use of the posterior; one that does decides.
        if key not in posteriors or posteriors[key].estimator == "deterministic":
            posteriors[key] = layer
    terms = [layer.kl_divergence() for layer in posteriors.values()]
    widest = wide_dtype(*(term.dtype for term in terms))
    return torch.stack([term.to(terms[0].device, widest) for term in terms]).sum()


def elbo(
    output: Any,
    target: Any,
    net: nn.Module,
    dataset_size: int,
    kl_weight: float = 1.0,
    nll: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> Elbo:
    """The negative ELBO over N = ``dataset_size`` samples (Chien and Chang 2023): the loss to minimize.

    Args:
        output: what the network, in training mode, made of a batch, e.g. logits [B, classes], or what holds them as
            ``logits`` or ``out`` or first of a tuple, as a ModelOutput of Hugging Face does. float16 and bfloat16
            outputs, and targets, reach ``nll`` in float32.
        target: what ``nll`` compares it with, e.g. labels int64 [B].
        net: the network, for the divergence of its Bayes layers.
        dataset_size: number of training samples, over which the divergence is spread.
        kl_weight: 0 to 1 while the divergence is ramped in (:func:`kl_warmup`).
        nll: mean negative log likelihood, in nats a sample; of a regression a :class:`bqnn.GaussianLikelihood`. A
            function of your own gets the output as the network made it.

    Raises:
        TypeError: there are no logits in ``output``, or a number is none.
        ValueError: dataset_size < 1, kl_weight < 0, or a network without Bayes layers.
    """
    check_number("dataset_size", dataset_size)
    check_number("kl_weight", kl_weight)
    if not dataset_size >= 1:
        raise ValueError(f"dataset_size must be at least 1, got {dataset_size}")
    if not kl_weight >= 0.0:
        raise ValueError(f"kl_weight must be at least 0, got {kl_weight}")
    if nll is F.cross_entropy or isinstance(nll, Likelihood):
        output = logits_of(output)
    # What an `nll` of the user's own takes may be no tensor.
    output, target = (wide(each) if isinstance(each, Tensor) else each for each in (output, target))
    likelihood, kl = nll(output, target), kl_divergence(net)
    return Elbo(likelihood + kl_weight * kl / float(dataset_size), likelihood, kl)


def kl_warmup(progress: float, length: float) -> float:
    """The weight of the divergence: 0 to 1, linear, over ``length`` (both in epochs, or both in steps)."""
    check_number("progress", progress)
    check_number("length", length)
    return 1.0 if length <= 0 else min(1.0, max(0.0, progress / length))


def parameter_groups(
    net: nn.Module,
    lr: float,
    *,
    codebook_lr: float = CODEBOOK_LR,
    variance_lr: float = VARIANCE_LR,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups: levels, thresholds and variances learn slower, and only plain weights decay.

    Args:
        net: any network; without Bayes layers the codebook and variance groups are left out.
        lr: learning rate of all weights.
        codebook_lr, variance_lr: the rates of levels and thresholds, and of log_sigma2, as factors of ``lr``.
        weight_decay: of weights that have no prior: those of layers that are not Bayes layers, two or more dimensions.

    Returns:
        groups for any torch optimizer, each with a ``name``, lr and weight_decay.

    Raises:
        TypeError: ``net`` is no module, or a rate no number.
    """
    rates = {"lr": lr, "codebook_lr": codebook_lr, "variance_lr": variance_lr, "weight_decay": weight_decay}
    for name, rate in rates.items():
        check_number(name, rate)
    bayes = list(bayes_layers(net).values())
    # Each once: layers may be tied.
    means = _distinct(layer.mean for layer in bayes)
    codebook = _distinct(p for layer in bayes for p in (layer.raw_levels, layer.raw_thresholds) if p is not None)
    variance = _distinct(layer.log_sigma2 for layer in bayes)
    taken = {id(p) for p in (*codebook, *variance, *means)}
    others = [p for p in net.parameters() if id(p) not in taken]
    groups = [
        {"name": "means", "params": means, "lr": lr, "weight_decay": 0.0},
        {"name": "variances", "params": variance, "lr": lr * variance_lr, "weight_decay": 0.0},
        {"name": "codebooks", "params": codebook, "lr": lr * codebook_lr, "weight_decay": 0.0},
        {"name": "weights", "params": [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"name": "biases", "params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
