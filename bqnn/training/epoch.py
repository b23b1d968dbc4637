"""One epoch of training: the steps, and the means of what they minimize."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bqnn.bayes.elbo import elbo, kl_warmup
from bqnn.bayes.layers import bayes_layers, bound_means_
from bqnn.core.inputs import ask
from bqnn.core.precision import wide
from bqnn.training.phases import KL_WARMUP


class Objective(NamedTuple):
    """What a step minimizes, and how."""

    nll: Callable[[Any, Any], Tensor]
    """Output and target to the mean negative log likelihood, nats a sample."""
    dataset_size: int
    kl_warmup: float = KL_WARMUP
    """In epochs of the phase."""
    max_grad_norm: float | None = None
    """Of all gradients together; longer ones are shortened."""
    autocast: AbstractContextManager[object] | None = None
    """Around the forward pass alone."""
    kl_weight: float = 1.0
    """Of the divergence, once it is warm; 1 is the evidence lower bound."""


class Means(NamedTuple):
    """Means over the steps of an epoch."""

    loss: float  # nats a sample
    nll: float  # nats a sample
    kl: float  # nats, summed over the weights of the whole network


def train_epoch(
    net: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    objective: Objective,
    done: int,
    steps: int,
) -> Means:
    """Trains ``net``, in training mode, on every batch of (inputs, target), all on the network's device.

    A network with Bayes layers minimizes the negative ELBO, another one the negative log likelihood. Means that have to
    be bounded are, after each step.

    Args:
        done: epochs of the phase that have been.
        steps: an epoch has; the warm-up of the divergence goes by it.
    """
    layers = bayes_layers(net).values()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    net.train()
    for step, (inputs, target) in enumerate(batches):
        with objective.autocast or nullcontext():
            output = ask(net, inputs)
        if layers:
            weight = objective.kl_weight * kl_warmup(done + step / steps, objective.kl_warmup)
            loss, nll, kl = elbo(output, target, net, objective.dataset_size, weight, objective.nll)
        else:
            loss = nll = objective.nll(wide(output), target)
            kl = torch.zeros(())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if objective.max_grad_norm is not None:
            clip_grad_norm_(net.parameters(), objective.max_grad_norm)
        optimizer.step()
        bound_means_(layers)
        scheduler.step()
        sums += torch.stack([loss.detach(), nll.detach(), kl.detach().to(loss)]).double().cpu()
        count += 1
    return Means(*(sums / count).tolist())
