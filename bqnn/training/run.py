"""A training that is under way: its phases, epoch by epoch, its records, and the checkpoint that it resumes from."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.batchnorm import MOST_BATCHES, is_tracked, refresh_batchnorm
from bqnn.bayes.likelihood import GaussianLikelihood, Likelihood
from bqnn.core.checkpoint import read_checkpoint, write_checkpoint
from bqnn.core.inputs import ask, device_of
from bqnn.core.text import shown
from bqnn.training.epoch import Objective, train_epoch
from bqnn.training.loader import Size, batches_of
from bqnn.training.phased import PhasedNetwork
from bqnn.training.phases import BAYES, NAMES, check_finite, locate, make_optimizer, restore_cycle
from bqnn.training.plan import Plan

FIELDS: dict[str, type] = {
    "call": dict,
    "history": list,
    "net": dict,
    "optimizer": dict,
    "scheduler": dict,
    "likelihood": dict,
    "generators": list,
}


class Score:
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


class Training:
    """A training that is under way."""

    def __init__(
        self,
        net: PhasedNetwork,
        train: Iterable[Any],
        validation: Iterable[Any] | None,
        likelihood: Likelihood,
        plan: Plan,
        size: Size,
        log: Callable[[str], object] | None,
        checkpoint: str | os.PathLike[str] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        """``arguments``, plain values, are what the call was given beside the plan."""
        self.arguments = dict(arguments)
        self.phased, self.train, self.validation = net, train, validation
        self.likelihood, self.plan, self.size, self.log = likelihood, plan, size, log
        self.checkpoint, self.device = checkpoint, device_of(net.net)
        self.history: list[dict[str, Any]] = []
        self.kept: list[Any] = []  # inputs on which BatchNorm's statistics are estimated
        self.refreshed = False  # BatchNorm's statistics, since the phase began
        self.validated: Score | None = None

    @property
    def net(self) -> nn.Module:
        return self.phased.net

    def run(self) -> tuple[nn.Module, list[dict[str, Any]], Tensor | None]:
        """Trains to the end, from the checkpoint where there is one; the network, the history, the noise variance."""
        state = self._read_checkpoint()
        begin, been = locate(self.plan.phases, len(self.history) - 1) if state else (0, -1)
        for phase, (_, epochs, lr) in list(enumerate(self.plan.phases))[begin:]:
            if self.phased.enter(phase):
                self.refreshed = False
            if not epochs:
                continue
            cycle = make_optimizer(self.net, phase, lr, epochs * self.size.batches, self.plan.rates)
            resumes = state is not None and phase == begin
            if resumes:
                self._restore(state, *cycle)
            for done in range(been + 1 if resumes else 0, epochs):
                self._epoch(phase, done, *cycle)
                self._write_checkpoint(*cycle)
                if self.log is not None:
                    self.log(describe(self.history[-1], self.likelihood.measure))
        if not self.refreshed:
            self.kept = []  # a training that resumes here has none: both draw batches from the same generator
            self._refresh()
            self.validated = None
        if self.validated is None:
            self._validate()
        self.net.zero_grad(set_to_none=True)  # as much memory as the parameters take
        return self.net.eval(), self.history, self._noise_variance()

    def _epoch(self, phase: int, done: int, optimizer: Any, scheduler: Any) -> None:
        started, score, plan = time.perf_counter(), Score(self.likelihood), self.plan

        def nll(output: Tensor, target: Tensor) -> Tensor:
            found = self.likelihood(output, target)
            score.add(output, target, found)
            return found

        autocast = None if plan.autocast is None else torch.autocast(self.device.type, plan.autocast)
        objective = Objective(nll, self.size.samples, plan.kl_warmup, plan.max_grad_norm, autocast)
        means = train_epoch(self.net, self._batches(), optimizer, scheduler, objective, done, self.size.batches)
        epoch = len(self.history) + 1
        check_finite(means.loss, epoch, phase, plan.phases[phase].lr)
        self._refresh()
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

    def _refresh(self) -> None:
        """Gives BatchNorms the statistics of the quantized network, on inputs of the last epoch if they are kept."""
        if self.phased.estimators:
            refresh_batchnorm(self.net, self.kept or (inputs for inputs, _ in self._batches()))
            self.refreshed = True

    @torch.no_grad()
    def _validate(self) -> Score | None:
        """How the network does on the validation data."""
        if self.validation is None:
            return None
        self.net.eval()
        self.validated = Score(self.likelihood)
        for inputs, target in batches_of("validation", self.validation, self.device):
            output = ask(self.net, inputs)
            self.validated.add(output, target, self.likelihood.nll(output, target))
        if not self.validated.samples:
            raise ValueError("validation must yield at least one sample, got none")
        return self.validated

    def _call(self) -> dict[str, Any]:
        """What has to be the same when a training resumes, as plain values."""
        plan, size = self.plan, self.size
        names = ("pretrain", "deterministic", "bayes")
        values: dict[str, Any]
        values = {f"{name} epochs and rate": list(phase[1:]) for name, phase in zip(names, plan.phases, strict=True)}
        values |= {**plan.rates._asdict(), "kl_warmup": plan.kl_warmup, "max_grad_norm": plan.max_grad_norm}
        values |= {"autocast": str(plan.autocast), "samples": size.samples, "batches": size.batches}
        return {**values, "task": type(self.likelihood).__name__, **self.arguments}

    def _write_checkpoint(self, optimizer: Any, scheduler: Any) -> None:
        if self.checkpoint is None:
            return
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        state = {
            "call": self._call(),
            "history": self.history,
            "net": self.net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "likelihood": self.likelihood.state_dict(),
            "generators": generators,
        }
        write_checkpoint(self.checkpoint, state)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if self.checkpoint is None or not os.path.exists(self.checkpoint):
            return None
        state, call = read_checkpoint(self.checkpoint, FIELDS, "bqnn.fit", self.device), self._call()
        path, before = os.fsdecode(self.checkpoint), state["call"]
        if before != call:
            names = [name for name, value in call.items() if before.get(name) != value]
            differ = "; ".join(f"{name} was {before.get(name)}, now {call[name]}" for name in names)
            raise ValueError(f"{path} is of another call: {shown(differ)}")
        epochs, total = len(state["history"]), sum(phase.epochs for phase in self.plan.phases)
        if not 1 <= epochs <= total:
            raise ValueError(f"{path} must have from 1 to {total} epochs, got {epochs}")
        self.history = state["history"]
        return state

    def _restore(self, state: Any, optimizer: Any, scheduler: Any) -> None:
        try:
            self.net.load_state_dict(state["net"])
            restore_cycle(optimizer, scheduler, state["optimizer"], state["scheduler"])
            self.likelihood.load_state_dict(state["likelihood"])
            torch.set_rng_state(state["generators"][0].cpu())
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["generators"][1].cpu(), self.device)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            path = os.fsdecode(self.checkpoint or "")
            raise ValueError(f"{path} is of another network: {shown(str(error))}") from error
        self.refreshed = bool(self.phased.estimators)

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
