"""predict: class probabilities, or numbers, with uncertainty, by sampling the posterior or by an ensemble."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from bqnn.bayes.likelihood import TASKS
from bqnn.bayes.sample import check_posterior, sampled_networks
from bqnn.core.check import check_choice, check_floating, check_integer, check_module, check_number, named
from bqnn.core.ensemble import Ensemble, Stacked
from bqnn.core.inputs import ask, map_tensors
from bqnn.core.modes import in_evaluation
from bqnn.core.precision import wide


class Prediction(NamedTuple):
    """What the posterior, or an ensemble, says of a batch: float32, or float64 where the logits are."""

    probs: Tensor  # [B, classes], the mean over the samples, or networks
    entropy: Tensor  # [B], nats: the total uncertainty of probs
    mutual_information: Tensor  # [B], nats: the part of it that is uncertainty about the weights


class RegressionPrediction(NamedTuple):
    """The same of a regression, each in the shape of the network's output and float32, or float64 where that is."""

    mean: Tensor  # over the samples, or networks
    epistemic: Tensor  # deviation of the samples: the uncertainty about the weights; 0 of one
    deviation: Tensor  # with the noise of the data: the square root of epistemic^2 + noise_variance


def _entropy(probs: Tensor) -> Tensor:
    """float64: a mutual information is a small difference of two of them."""
    return torch.special.entr(probs.double()).sum(-1)


@overload
def predict(
    net: nn.Module,
    x: Any,
    samples: int | None = None,
    *,
    task: Literal["classification"] = "classification",
    noise_variance: None = None,
    seed: int | None = None,
    batches: Iterable[Any] | None = None,
) -> Prediction: ...


@overload
def predict(
    net: nn.Module,
    x: Any,
    samples: int | None = None,
    *,
    task: Literal["regression"],
    noise_variance: Tensor | float | None = None,
    seed: int | None = None,
    batches: Iterable[Any] | None = None,
) -> RegressionPrediction: ...


@torch.no_grad()
def predict(
    net: nn.Module,
    x: Any,
    samples: int | None = None,
    *,
    task: str = "classification",
    noise_variance: Tensor | float | None = None,
    seed: int | None = None,
    batches: Iterable[Any] | None = None,
) -> Prediction | RegressionPrediction:
    """The predictive distribution of a classifier, or of a regression, in evaluation mode.

    Nothing of ``net`` is changed, so that threads may call this at once, and others use the network meanwhile, in
    training mode too: where it is not in evaluation mode, or samples are drawn, a replica with the same tensors is
    asked. What a module of the replica sets on itself is then not to be seen on the network, and a compiled network
    runs uncompiled.

    A packed network has as much of a posterior as its tables of chances say. Where the same samples are asked many
    times, they are drawn once and run as one, from their codes and on the CPU:
    ``bqnn.compile([bqnn.sample(net, seed) for seed in range(16)], example)``.

    Args:
        net: a network that returns logits [B, classes], or numbers of any shape for a regression, or that holds them as
            ``logits`` or ``out`` or first of a tuple, as a ModelOutput of Hugging Face does; or an ensemble, a
            :class:`bqnn.Ensemble` or what :func:`bqnn.compile` makes of several, whose networks stand for samples.
        x: inputs: a tensor, or a tuple, list or dict of the network's arguments; half precision ones are float32 to a
            compiled ensemble.
        samples: networks to draw from the posterior and to average over. Each has a code for each weight, drawn once,
            as :func:`bqnn.sample` draws it, whatever the estimator: noise that is drawn anew at every place of an
            image, as training does, is averaged away by pooling. 1, or None, is the quantized network itself, without
            sampling and with a mutual information of 0. Of an ensemble None, or the number of its networks, are these
            themselves; n times as many are n draws from the posterior of each.
        task: "classification", for a :class:`Prediction`, or "regression", for a :class:`RegressionPrediction`.
        noise_variance: of a regression's data, at least 0: a number, or a tensor that goes with the output, as
            :func:`bqnn.fit` and :class:`bqnn.GaussianLikelihood` estimate it. None: 0.
        seed: of the samples, 0 to 2^63 - 1: number k is that of ``bqnn.sample(net, seed + k)``, in an ensemble of
            network k // n. By default each has a new one from torch's default CPU generator.
        batches: inputs on which the BatchNorm statistics of each sampled network are estimated again; 20 batches at
            most, which are kept meanwhile. Without them all have those of ``net``, whose activations are not quite
            theirs. A file holds no inputs: who deploys a packed network with BatchNorm brings some along.

    Raises:
        TypeError: ``net`` is no module or returns nothing of the kind, or ``samples`` or ``seed`` is no integer.
        ValueError: one logit, which is no classification; samples < 1, more than 1 of a network that has no posterior
            (a full-precision one, or a packed one without chances), or of an ensemble no multiple of the number of its
            networks, of a compiled one any other number; ``seed`` out of its range; a noise variance below 0, that does
            not go with the output, or of a classification.
    """
    check_module("net", net)
    check_choice("task", task, TASKS)
    if samples is not None:
        check_integer("samples", samples)
    if task == "regression":
        _check_noise_variance(noise_variance)
        return _of_values(_outputs(net, x, samples, seed, batches), noise_variance)
    if noise_variance is not None:
        raise ValueError(f'noise_variance must be None but for task="regression", got {named(noise_variance)}')
    logits = _outputs(net, x, samples, seed, batches)
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ValueError(
            "net must return logits [batch, classes] of two classes or more, "
            f'got the shape {list(logits.shape[1:])}; task="regression" is for other numbers'
        )
    return of_draws(logits.softmax(-1))


def _outputs(net: nn.Module, x: Any, samples: int | None, seed: int | None, batches: Iterable[Any] | None) -> Tensor:
    """What each sampled network, or each of an ensemble, returns: float32 or float64 [networks, ...]."""
    if isinstance(net, Stacked):
        if samples in (None, net.num_networks):
            return wide(ask(in_evaluation(net), x if isinstance(net, Ensemble) else map_tensors(wide, x)))
        if not isinstance(net, Ensemble):
            raise ValueError(f"samples must be None, or the {net.num_networks} networks of the ensemble, got {samples}")
    samples = 1 if samples is None else samples
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if samples == 1 and not isinstance(net, Ensemble):
        return wide(ask(in_evaluation(net), x)).unsqueeze(0)
    check_posterior(net, samples)
    networks = sampled_networks(net, samples, seed, batches)
    return torch.stack([wide(ask(network, x)) for network in networks])


def _check_noise_variance(noise_variance: Tensor | float | None) -> None:
    if isinstance(noise_variance, Tensor):
        check_floating("noise_variance", noise_variance)
    elif noise_variance is not None:
        check_number("noise_variance", noise_variance)
    if noise_variance is None:
        return
    least = torch.as_tensor(noise_variance, dtype=torch.float64).amin().item()
    if not least >= 0.0:
        raise ValueError(f"noise_variance must be at least 0, got {least}")


def _of_values(draws: Tensor, noise_variance: Tensor | float | None) -> RegressionPrediction:
    variance, mean = torch.var_mean(draws.double(), 0, correction=0)
    noise = torch.as_tensor(0.0 if noise_variance is None else noise_variance, dtype=torch.float64)
    try:
        total = variance + noise.to(draws.device).expand_as(variance)
    except RuntimeError as error:
        shape = list(mean.shape)
        raise ValueError(f"noise_variance must go with the output {shape}, got {list(noise.shape)}") from error
    return RegressionPrediction(*(each.to(draws.dtype) for each in (mean, variance.sqrt(), total.sqrt())))


def of_draws(draws: Tensor) -> Prediction:
    """The prediction of networks whose probabilities are ``draws`` [networks, B, classes], float32 or float64."""
    mean = draws.mean(0, dtype=torch.float64)
    entropy = _entropy(mean)
    information = (entropy - _entropy(draws).mean(0)).clamp(min=0.0)
    return Prediction(*(each.to(draws.dtype) for each in (mean, entropy, information)))
