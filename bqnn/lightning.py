"""The three phases of training as a callback of Lightning: fit for whoever has a LightningModule and a Trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.batchnorm import MOST_BATCHES, is_tracked, refresh_batchnorm
from bqnn.bayes.elbo import CODEBOOK_LR, VARIANCE_LR, kl_divergence
from bqnn.bayes.elbo import kl_warmup as warmed_up
from bqnn.bayes.layers import bayes_layers, bound_means_
from bqnn.core.check import check_int, named
from bqnn.core.extras import needs
from bqnn.training.loader import MOST_SAMPLES, samples_of
from bqnn.training.phased import PhasedNetwork, conversion_of
from bqnn.training.phases import (
    BAYES,
    BAYES_LR,
    DETERMINISTIC_LR,
    KL_WARMUP,
    LR,
    Rates,
    check_finite,
    locate,
    make_optimizer,
)
from bqnn.training.plan import Plan, make_plan


def _name_of_lightning() -> str:
    """The same under two names: the one that has been imported, else the one that is installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    here = [name for name in names if name in sys.modules]
    return (here or [name for name in names if find_spec(name.partition(".")[0])] or names)[0]


with needs("lightning"):
    _lightning: Any = import_module(_name_of_lightning())
    LRSchedulerConfig: Any = import_module(f"{_lightning.__name__}.utilities.types").LRSchedulerConfig


def first_of_pair(batch: Any) -> Any:
    """The inputs of a batch (inputs, target)."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0]
    parts = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
    raise TypeError(
        f"inputs must be given where a batch is no pair (inputs, target), as a function from the batch to the inputs, "
        f"got {type(batch).__name__}{parts}"
    )


class ThreePhases(_lightning.Callback):
    """Trains a LightningModule as :func:`bqnn.fit` trains a network: at full precision, then deterministic, then with a
    posterior.

    ``Trainer(max_epochs=20, callbacks=[ThreePhases(num_levels=3)])`` is all: the layers of the module become Bayes
    layers when the second phase begins, each phase has its AdamW with one cycle of the learning rate, in place of what
    ``configure_optimizers`` gives, and the divergence from the prior is added to the loss of ``training_step``, which
    has to be the mean negative log likelihood in nats a sample, such as a cross entropy. "train_nll", in nats a sample,
    and "train_kl", in nats, are logged apart. BatchNorm's statistics are those of the quantized network before each
    validation, in each checkpoint of an epoch, and in the end; for them the module's ``forward`` is called.

    A training goes on from a checkpoint of Lightning (``trainer.fit(module, ckpt_path=...)``) in its phase. A module
    for a checkpoint of a later phase is made by ``bqnn.convert_(module, num_levels)`` before its state is loaded.

    Args:
        epochs: three numbers, of the phases, which are the Trainer's ``max_epochs`` together; by default its epochs are
            given the recipe's shares. With ``fast_dev_run`` the few steps are of the last phase.
        lr, deterministic_lr, bayes_lr, num_levels, codebook_lr, variance_lr, weight_decay, kl_warmup, options: as
            :func:`bqnn.fit` takes them. Lightning has arguments of its own for what else that takes.
        dataset_size: samples in the training set; by default what the data loader says.
        inputs: from a batch to what ``forward`` takes, a tensor, or a tuple or dict of arguments; for modules with
            BatchNorm. By default the first of two.

    Raises:
        TypeError, ValueError: by ``Trainer.fit``: an argument is wrong, the module can not be converted, optimizes by
            hand or has BatchNorm and no ``forward``; the Trainer has no number of epochs, or wraps the module, as it
            does for several devices; the loader does not say how many samples or batches it has.
        FloatingPointError: the loss is NaN or infinite; the message names the epoch and the learning rate.
    """

    def __init__(
        self,
        epochs: Sequence[int] | None = None,
        *,
        lr: float = LR,
        deterministic_lr: float = DETERMINISTIC_LR,
        bayes_lr: float = BAYES_LR,
        num_levels: int | None = None,
        dataset_size: int | None = None,
        codebook_lr: float = CODEBOOK_LR,
        variance_lr: float = VARIANCE_LR,
        weight_decay: float = 0.0,
        kl_warmup: float = KL_WARMUP,
        inputs: Callable[[Any], Any] = first_of_pair,
        **options: Any,
    ) -> None:
        if dataset_size is not None:
            check_int("dataset_size", dataset_size, 1, MOST_SAMPLES)
        if not callable(inputs):
            raise TypeError(f"inputs must be a function from a batch to the inputs, got {named(inputs)}")
        self._epochs, self._lrs = epochs, (lr, deterministic_lr, bayes_lr)
        self._rates = Rates(codebook_lr, variance_lr, weight_decay)
        self._num_levels, self._options = num_levels, options
        self._dataset_size, self._kl_warmup, self._inputs = dataset_size, kl_warmup, inputs
        self._phase = -1  # that has been entered
        self._plan: Plan
        self._phased: PhasedNetwork
        self._loading: Any = None
        self._counted: int | None = None  # samples of the training that is under way
        self._kept: list[Any] = []  # inputs on which BatchNorm's statistics are estimated
        self._losses = torch.zeros((), dtype=torch.float64)  # the sum over the epoch's steps
        self._start_epoch()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks everything, before the first epoch."""
        if stage == "fit":
            self._counted = None
            self._plan = self._plan_for(trainer, pl_module)
            self._check_module(pl_module)
            with _apart(pl_module):
                conversion = conversion_of(pl_module, self._num_levels, self._options, self._plan)
            self._phased, self._phase = PhasedNetwork(pl_module, self._plan, conversion), -1
            self._loading = pl_module.register_load_state_dict_pre_hook(self._before_loading)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._kept = []
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self._phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._phase = state_dict["phase"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.strategy.model is not pl_module:
            raise ValueError(
                "trainer must leave the module as it is, which changes between the phases, and so have one device, "
                f"got the strategy {type(trainer.strategy).__name__}"
            )
        if self._phase < 0:
            self._enter(pl_module, locate(self._plan.phases, 0)[0])
        else:
            with _apart(pl_module):
                self._phased.resume(self._phase)
        # Before Lightning gives optimizers the states of a checkpoint.
        self._set_optimizer(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_epoch()
        phase, _ = locate(self._plan.phases, trainer.current_epoch)
        if phase != self._phase:
            self._enter(pl_module, phase)
            self._set_optimizer(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._progress = batch_idx / trainer.num_training_batches
        if len(self._kept) < MOST_BATCHES and _has_norm(pl_module):
            self._kept.append(self._inputs(batch))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Adds the divergence to the loss, in place: it is a quotient that Lightning has made of the module's."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
        nll, kl = loss.detach() / factor, torch.zeros((), device=loss.device)
        if self._phased.estimators:
            _, done = locate(self._plan.phases, trainer.current_epoch)
            weight = warmed_up(done + self._progress, self._plan.kl_warmup)
            kl = kl_divergence(pl_module)
            loss.add_(weight * kl / float(self._samples(trainer)) * factor)
        self._losses = self._losses + loss.detach().double().cpu() / factor
        self._steps += 1
        pl_module.log_dict({"train_nll": nll, "train_kl": kl.detach()}, on_step=False, on_epoch=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        bound_means_(bayes_layers(pl_module).values())
        self._refreshed = False

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._refresh(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._steps:
            loss, lr = (self._losses / self._steps).item(), self._plan.phases[self._phase].lr
            check_finite(loss, trainer.current_epoch + 1, self._phase, lr)
        self._refresh(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Enters what phases there are without an epoch, so that the network is a Bayes network."""
        if trainer.current_epoch >= sum(phase.epochs for phase in self._plan.phases) and self._phase < BAYES:
            self._enter(pl_module, BAYES)
            self._refresh(pl_module)

    def _plan_for(self, trainer: Any, pl_module: nn.Module) -> Plan:
        total = trainer.max_epochs
        if total is None or total < 1:
            raise ValueError(f"trainer must have max_epochs, a number of epochs for all phases, got {total}")
        epochs = total if self._epochs is None else self._epochs
        converted = bool(bayes_layers(pl_module))
        plan = make_plan(epochs, self._lrs, self._rates, self._kl_warmup, None, None, converted)
        if trainer.fast_dev_run:  # a few steps of one epoch, which shows most in the last phase
            return make_plan(total, self._lrs, self._rates, self._kl_warmup, None, None, converted)
        if total != sum(phase.epochs for phase in plan.phases):
            raise ValueError(f"epochs must be the {total} max_epochs of the trainer together, got {named(epochs)}")
        return plan

    def _check_module(self, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("the module must have automatic_optimization, got one that optimizes by hand")
        if _has_norm(pl_module) and type(pl_module).forward is _lightning.LightningModule.forward:
            raise ValueError(
                "the module must have a forward, with which the statistics of its BatchNorms are estimated, got none"
            )

    def _before_loading(self, pl_module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Makes the module a Bayes network where that is what the state of a checkpoint is of."""
        if any(name.startswith(prefix) and name.endswith(".log_sigma2") for name in state):
            with _apart(pl_module):
                self._phased.convert()

    def _enter(self, pl_module: nn.Module, phase: int) -> None:
        with _apart(pl_module):
            for each in range(self._phase + 1, phase + 1):
                if self._phased.enter(each):
                    self._refreshed = False
        self._phase = phase

    def _set_optimizer(self, trainer: Any, pl_module: nn.Module) -> None:
        phase = self._plan.phases[self._phase]
        trainer.estimated_stepping_batches  # noqa: B018  # loads the data, which says how many batches it has
        if math.isinf(trainer.num_training_batches):
            raise ValueError("trainer must have limit_train_batches where the loader has no length, got none")
        if not trainer.num_training_batches:
            raise ValueError("trainer must have at least one training batch an epoch, got 0")
        self._samples(trainer)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        optimizer, schedule = make_optimizer(pl_module, self._phase, phase.lr, phase.epochs * steps, self._rates)
        trainer.strategy.optimizers = [optimizer]
        trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(schedule, interval="step")]

    def _samples(self, trainer: Any) -> int:
        if self._dataset_size is not None:
            return self._dataset_size
        if self._counted is None:
            self._counted = samples_of(trainer.train_dataloader)
        if not self._counted:
            raise ValueError("dataset_size must be given where the loader does not say how many samples it has")
        return self._counted

    def _start_epoch(self) -> None:
        self._kept = []
        self._progress, self._steps = 0.0, 0
        self._losses = torch.zeros((), dtype=torch.float64)
        self._refreshed = False

    def _refresh(self, pl_module: nn.Module) -> None:
        if self._phased.estimators and self._kept and not self._refreshed:
            refresh_batchnorm(pl_module, self._kept)
            self._refreshed = True


def _has_norm(pl_module: nn.Module) -> bool:
    return any(is_tracked(module) for module in pl_module.modules())


@contextmanager
def _apart(pl_module: Any) -> Iterator[None]:
    """Inside, a module does not refer to its Trainer, in which a conversion would look for what else has its weights,
    and find the optimizer."""
    trainer = pl_module.trainer
    pl_module.trainer = None
    try:
        yield
    finally:
        pl_module.trainer = trainer
