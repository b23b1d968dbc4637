"""fit: a network trained, in the three phases of the recipe, in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.elbo import CODEBOOK_LR, VARIANCE_LR
from bqnn.bayes.layers import bayes_layers
from bqnn.bayes.likelihood import likelihood_of
from bqnn.bayes.sample import MOST_SEED
from bqnn.core.check import check_int, check_module, named
from bqnn.core.references import copy_network
from bqnn.training.loader import check_loader, measure
from bqnn.training.phased import PhasedNetwork, conversion_of
from bqnn.training.phases import BAYES_LR, DETERMINISTIC_LR, EPOCHS, KL_WARMUP, LR, Rates
from bqnn.training.plan import make_plan
from bqnn.training.run import Training


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` has trained, and how it went."""

    net: nn.Module
    """The Bayes network, in evaluation mode."""
    history: list[dict[str, Any]]
    """A record an epoch: ``epoch``, from 1; ``phase``; ``loss`` and ``nll`` in nats a sample and ``kl`` in nats, means
    over the steps, the loss with the divergence spread over the data set; ``error`` (percent) or ``rmse`` of the
    outputs of training; ``validation_nll`` with ``validation_error`` or ``validation_rmse``, of the quantized network
    where it is one, None without validation data; ``seconds``."""
    noise_variance: Tensor | None
    """Of a regression, for :func:`bqnn.predict`: [D] for outputs [batch, D], else a scalar, the mean square of the
    quantized network's residuals on the validation data, without which it is that of the last steps of training."""


def fit(
    net: nn.Module,
    train: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    task: str = "classification",
    epochs: int | Sequence[int] = sum(EPOCHS),
    lr: float = LR,
    deterministic_lr: float = DETERMINISTIC_LR,
    bayes_lr: float = BAYES_LR,
    num_levels: int | None = None,
    dataset_size: int | None = None,
    codebook_lr: float = CODEBOOK_LR,
    variance_lr: float = VARIANCE_LR,
    weight_decay: float = 0.0,
    kl_warmup: float = KL_WARMUP,
    max_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
    log: Callable[[str], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> FitResult:
    """Trains a Bayesian M-ary network: at full precision, then deterministic, then with a posterior (docs/recipe.md).

    Each phase has an AdamW of its own, with one cycle of the learning rate. BatchNorm's statistics are those of the
    quantized network after every quantized epoch, from the inputs of its first 20 batches. Frozen parameters stay as
    they are.

    Args:
        net: any network, which is left as it was. One at full precision is trained in all three phases, or, where it
            has been trained, with 0 epochs of the first. One with Bayes layers begins with the second; with 0 epochs of
            that too its posterior is trained on, with its own estimators.
        train: batches (inputs, target), as often as there are epochs: a DataLoader, a list. Inputs are a tensor, or
            a tuple, list or dict of the network's arguments. Targets: classes, integers [batch, ...], of a network
            with logits [batch, classes, ...], or probabilities of the logits' shape; for a regression numbers of the
            output's shape, best of a size about 1. The network may hold its output as ``logits`` or ``out`` or first
            of a tuple, as a ModelOutput of Hugging Face does. An epoch is as many batches as ``train`` has a length,
            or had when it was counted.
        validation: batches like those of ``train``, for the records alone.
        task: "classification", or "regression" with Gaussian noise, whose variance is estimated
            (:class:`bqnn.GaussianLikelihood`).
        epochs: of all phases, which are given the recipe's shares; or three numbers, of the full-precision, the
            deterministic and the Bayes phase.
        lr, deterministic_lr, bayes_lr: the highest learning rate of each phase.
        num_levels: M, 2 to 16; 3 by default. Only for a network without Bayes layers.
        dataset_size: samples in the training set, over which the divergence is spread. By default
            ``len(train.dataset)``, or the length of its SubsetRandomSampler, else counted by going through ``train``
            once more, before training.
        codebook_lr, variance_lr, weight_decay: as :func:`bqnn.parameter_groups` takes them.
        kl_warmup: epochs of the last phase over which the weight of the divergence rises to 1.
        max_grad_norm: longer gradients, of all parameters together, are shortened to it. None: not at all.
        autocast: torch.bfloat16 for the products of training in it.
        device: where to train; by default where ``net`` is.
        seed: of torch's generators while this trains, 0 to 2^63 - 1: the same seed gives the same bits, as far as the
            order of the batches hangs on torch's generator and the device's products allow it. The state of the
            generators is then as before. Without, they are drawn from as they are.
        log: takes a line for each epoch, as ``print`` does.
        checkpoint: a file that is written after each epoch, whole or not at all. Where it is there already the training
            goes on from it, to the same bits as without a stop, as far as ``seed`` says; the call has to be the same.
            It stays when all is done.
        options: of :func:`bqnn.convert`: ``estimator``, ``prior``, ``skip``, ``overrides`` and so on. Only for a
            network without Bayes layers.

    Raises:
        TypeError, ValueError: an argument is wrong, a batch is none, or ``net`` can not be converted.
        ValueError: the checkpoint is damaged, or of another call or network; the message names what differs.
        OSError: the checkpoint can not be read or written.
        FloatingPointError: the loss is NaN or infinite; the message names the epoch and the learning rate.
    """
    check_module("net", net)
    check_loader("train", train)
    if validation is not None:
        check_loader("validation", validation)
    if log is not None and not callable(log):
        raise TypeError(f"log must be a function that takes a line, as print does, got {named(log)}")
    if seed is not None:
        check_int("seed", seed, 0, MOST_SEED)
    if checkpoint is not None:
        _check_path(checkpoint)
    likelihood = likelihood_of(task)
    rates, lrs = Rates(codebook_lr, variance_lr, weight_decay), (lr, deterministic_lr, bayes_lr)
    plan = make_plan(epochs, lrs, rates, kl_warmup, max_grad_norm, autocast, bool(bayes_layers(net)))
    conversion = conversion_of(net, num_levels, options, plan)
    size = measure("train", train, dataset_size)
    arguments = {"seed": seed, **_plain(conversion), **{name: repr(each) for name, each in bayes_layers(net).items()}}
    net = copy_network(net)
    net = net if device is None else net.to(device)
    phased = PhasedNetwork(net, plan, conversion)
    training = Training(phased, train, validation, likelihood, plan, size, log, checkpoint, arguments)
    with _seeded(seed, training.device):
        return FitResult(*training.run())


def _plain(value: Any) -> Any:
    """``value`` as a checkpoint keeps it, to compare it with that of another call; of an object its type."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, type(None))) else named(value)


def _check_path(checkpoint: str | os.PathLike[str]) -> None:
    """Raises unless a file can be there: before the first epoch, not after it."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a path, got {named(checkpoint)}")
    if not Path(checkpoint).parent.is_dir() or Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint must be a file in a folder that is there, got {os.fsdecode(checkpoint)}")


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
