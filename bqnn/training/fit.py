"""fit: a network trained, in the three phases of the recipe, in one call."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.batchnorm import MOST_BATCHES, is_tracked, refresh_batchnorm
from bqnn.bayes.convert import convert, convert_
from bqnn.bayes.elbo import CODEBOOK_LR, VARIANCE_LR
from bqnn.bayes.layers import bayes_layers
from bqnn.bayes.likelihood import GaussianLikelihood, Likelihood, likelihood_of
from bqnn.core.check import check_int, check_module, named
from bqnn.core.inputs import call_network
from bqnn.core.references import copy_network
from bqnn.training.epoch import Objective, train_epoch
from bqnn.training.loader import Size, batches_of, check_loader, measure
from bqnn.training.phases import (
    BAYES,
    BAYES_LR,
    DETERMINISTIC,
    DETERMINISTIC_LR,
    EPOCHS,
    FULL_PRECISION,
    KL_WARMUP,
    LR,
    NAMES,
    Rates,
    check_finite,
    enter_phase,
    make_optimizer,
)
from bqnn.training.plan import Plan, make_plan

MOST_SEED = 2**63 - 1


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
            output's shape, best of a size about 1. An epoch is as many batches as ``train`` has a length, or had when
            it was counted.
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
        options: of :func:`bqnn.convert`: ``estimator``, ``prior``, ``skip``, ``overrides`` and so on. Only for a
            network without Bayes layers.

    Raises:
        TypeError, ValueError: an argument is wrong, a batch is none, or ``net`` can not be converted.
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
    likelihood, converted = likelihood_of(task), bool(bayes_layers(net))
    rates, lrs = Rates(codebook_lr, variance_lr, weight_decay), (lr, deterministic_lr, bayes_lr)
    plan = make_plan(epochs, lrs, rates, kl_warmup, max_grad_norm, autocast, converted)
    conversion = _conversion(net, num_levels, options, plan, converted)
    size = measure("train", train, dataset_size)
    net = copy_network(net)
    net = net if device is None else net.to(device)
    with _seeded(seed, _device_of(net)):
        return _Fit(net, train, validation, likelihood, plan, conversion, size, log).run()


def _conversion(
    net: nn.Module, num_levels: int | None, options: dict[str, Any], plan: Plan, converted: bool
) -> dict[str, Any]:
    """The arguments of the conversion; raises where there is none to be, or where it would fail after a phase."""
    if converted:
        given = [name for name, value in (("num_levels", num_levels), *options.items()) if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} can't be given for a net that has Bayes layers already")
        return {}
    conversion = {**options, **({} if num_levels is None else {"num_levels": num_levels})}
    if plan.phases[FULL_PRECISION].epochs:
        convert(net, **conversion)
    return conversion


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _device_of(net: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


class _Score:
    """How a network does on batches: the mean negative log likelihood, and the figure of its likelihood."""

    def __init__(self, likelihood: Likelihood) -> None:
        self._likelihood = likelihood
        self._nll = self._loss = torch.zeros((), dtype=torch.float64)
        self.samples = 0

    @torch.no_grad()
    def add(self, output: Tensor, target: Tensor, nll: Tensor) -> None:
        size = len(target)
        if size:
            loss = self._likelihood.average(self._likelihood.losses(output, target))
            self._nll = self._nll + nll.double().cpu() * size
            self._loss = self._loss + loss.double().cpu() * size
            self.samples += size

    @property
    def nll(self) -> float:
        return (self._nll / self.samples).item()

    @property
    def loss(self) -> Tensor:
        """float64, on the CPU: of a regression the mean square of the residuals, of each output."""
        return self._loss / self.samples

    @property
    def figure(self) -> float:
        return self._likelihood.summarize(self.loss)


class _Fit:
    """A training that is under way."""

    def __init__(
        self,
        net: nn.Module,
        train: Iterable[Any],
        validation: Iterable[Any] | None,
        likelihood: Likelihood,
        plan: Plan,
        conversion: dict[str, Any],
        size: Size,
        log: Callable[[str], object] | None,
    ) -> None:
        self.net, self.train, self.validation = net, train, validation
        self.likelihood, self.plan, self.conversion, self.size, self.log = likelihood, plan, conversion, size, log
        self.device = _device_of(net)
        self.estimators = {name: layer.estimator for name, layer in bayes_layers(net).items()}
        self.history: list[dict[str, Any]] = []
        self.kept: list[Any] = []  # inputs on which BatchNorm's statistics are estimated
        self.validated: _Score | None = None

    def run(self) -> FitResult:
        for phase, (_, epochs, lr) in enumerate(self.plan.phases):
            self._enter(phase)
            if epochs:
                cycle = make_optimizer(self.net, phase, lr, epochs * self.size.batches, self.plan.rates)
                for done in range(epochs):
                    self._epoch(phase, done, *cycle)
        if not self.plan.phases[BAYES].epochs:
            self._validate()
        self.net.zero_grad(set_to_none=True)  # as much memory as the parameters take
        return FitResult(self.net.eval(), self.history, self._noise_variance())

    def _enter(self, phase: int) -> None:
        _, deterministic, _ = (each.epochs for each in self.plan.phases)
        if phase == FULL_PRECISION or (phase == DETERMINISTIC and not deterministic):
            return
        if not self.estimators:
            self.net = convert_(self.net, **self.conversion)
            self.estimators = {name: layer.estimator for name, layer in bayes_layers(self.net).items()}
        elif not deterministic:
            return  # to go on with the posterior that the network came with
        enter_phase(self.net, phase, self.estimators)

    def _epoch(self, phase: int, done: int, optimizer: Any, scheduler: Any) -> None:
        started, score, plan = time.perf_counter(), _Score(self.likelihood), self.plan

        def nll(output: Tensor, target: Tensor) -> Tensor:
            found = self.likelihood(output, target)
            score.add(output, target, found)
            return found

        autocast = None if plan.autocast is None else torch.autocast(self.device.type, plan.autocast)
        objective = Objective(nll, self.size.samples, plan.kl_warmup, plan.max_grad_norm, autocast)
        means = train_epoch(self.net, self._batches(), optimizer, scheduler, objective, done, self.size.batches)
        epoch = len(self.history) + 1
        check_finite(means.loss, epoch, phase, plan.phases[phase].lr)
        validated = self._validate()
        measure = self.likelihood.measure
        record = {
            "epoch": epoch,
            "phase": plan.phases[phase].name,
            **means._asdict(),
            measure: score.figure,
            "validation_nll": validated and validated.nll,
            f"validation_{measure}": validated and validated.figure,
            "seconds": time.perf_counter() - started,
        }
        self.history.append(record)
        if self.log is not None:
            self.log(describe(record, measure))

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        """The batches of an epoch, no more than were counted: the learning rate's cycle has as many steps."""
        self.kept = []
        keep = any(is_tracked(module) for module in self.net.modules())
        number = 0
        for inputs, target in itertools.islice(batches_of("train", self.train, self.device), self.size.batches):
            if keep and number < MOST_BATCHES:
                self.kept.append(inputs)
            number += 1
            yield inputs, target
        if not number:
            raise ValueError(f"train must yield batches in every epoch, got none in epoch {len(self.history) + 1}")

    @torch.no_grad()
    def _validate(self) -> _Score | None:
        """How the network does on the validation data, its BatchNorms with the statistics of the quantized one."""
        if self.estimators:
            refresh_batchnorm(self.net, self.kept)
        if self.validation is None:
            return None
        self.net.eval()
        self.validated = _Score(self.likelihood)
        for inputs, target in batches_of("validation", self.validation, self.device):
            output = call_network(self.net, inputs)
            self.validated.add(output, target, self.likelihood.nll(output, target))
        if not self.validated.samples:
            raise ValueError("validation must yield at least one sample, got none")
        return self.validated

    def _noise_variance(self) -> Tensor | None:
        if not isinstance(self.likelihood, GaussianLikelihood) or self.likelihood.variance is None:
            return None
        variance = self.likelihood.variance
        return variance if self.validated is None else self.validated.loss.to(variance)


def describe(record: dict[str, Any], measure: str) -> str:
    """A record of the history in one line."""
    unit = " %" if measure == "error" else ""
    parts = [f"epoch {record['epoch']:3d}", f"{record['phase']:<14}", f"nll {record['nll']:.4f}"]
    if record["phase"] == NAMES[BAYES]:
        parts.append(f"kl {record['kl']:,.0f} nats")
    parts.append(f"{measure} {record[measure]:.4g}{unit}")
    if record["validation_nll"] is not None:
        parts.append(f"validation nll {record['validation_nll']:.4f}")
        parts.append(f"{measure} {record[f'validation_{measure}']:.4g}{unit}")
    return "  ".join((*parts, f"{record['seconds']:.1f} s"))
