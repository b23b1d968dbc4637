"""The three phases of training: their lengths and rates, the estimators, the optimizer and the schedule of each.

First the full-precision network, then the M-ary one without Bayes, which settles what code each weight has, then the
network's own estimators with the divergence, which makes the posterior and gathers the means at their levels.
docs/recipe.md has the measurements that speak for this order and for the numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from bqnn.bayes.elbo import CODEBOOK_LR, VARIANCE_LR, parameter_groups
from bqnn.bayes.layers import bayes_layers

FULL_PRECISION, DETERMINISTIC, BAYES = range(3)
NAMES = ("full precision", "deterministic", "bayes")
EPOCHS = (6, 10, 4)
LR, DETERMINISTIC_LR, BAYES_LR = 4e-3, 3e-3, 5e-3
LR_NAMES = ("lr", "deterministic_lr", "bayes_lr")
"""The argument that is the highest learning rate of each phase."""
KL_WARMUP = 1.0
"""Epochs of a phase over which the weight of the divergence rises to 1."""

# Of AdamW. A mean that has left a threshold has the small, steady gradient of the divergence alone: with a long memory
# of the likelihood's large one it would hardly move.
BETAS = ((0.9, 0.999), (0.9, 0.999), (0.9, 0.99))
WARMUP = 0.1  # share of a phase's steps in which the learning rate rises


class Phase(NamedTuple):
    """A stretch of training with an optimizer and a learning-rate cycle of its own."""

    name: str
    epochs: int
    lr: float


class Rates(NamedTuple):
    """What :func:`bqnn.parameter_groups` takes beside the learning rate."""

    codebook_lr: float = CODEBOOK_LR
    variance_lr: float = VARIANCE_LR
    weight_decay: float = 0.0


def phases_of(epochs: Sequence[int], lrs: Sequence[float]) -> tuple[Phase, Phase, Phase]:
    """The phases with these numbers of epochs and these highest learning rates."""
    first, second, third = map(Phase, NAMES, epochs, lrs)
    return first, second, third


def locate(phases: Sequence[Phase], epoch: int) -> tuple[int, int]:
    """The phase that an epoch (from 0) belongs to, and the epochs of it that are done; at the end, the last one."""
    for index, phase in enumerate(phases):
        if epoch < phase.epochs:
            return index, epoch
        epoch -= phase.epochs
    return index, phase.epochs


def enter_phase(net: nn.Module, phase: int, estimators: Mapping[str, str]) -> None:
    """Makes the Bayes layers what they are in ``phase``, DETERMINISTIC or BAYES; variances start again.

    Args:
        estimators: by the name of a layer, its estimator in the phase BAYES.
    """
    use_estimators(net, phase, estimators)
    for layer in bayes_layers(net).values():
        layer.reset_variances_()


def use_estimators(net: nn.Module, phase: int, estimators: Mapping[str, str]) -> None:
    """Gives the Bayes layers the estimators of ``phase``; else as :func:`enter_phase`."""
    for name, layer in bayes_layers(net).items():
        layer.estimator = "deterministic" if phase == DETERMINISTIC else estimators[name]


def make_optimizer(net: nn.Module, phase: int, lr: float, steps: int, rates: Rates) -> tuple[AdamW, OneCycleLR]:
    """Optimizer and schedule of a phase: one cycle of the learning rate up to ``lr``, over as many ``steps``."""
    groups = parameter_groups(net, lr, **rates._asdict())
    optimizer = AdamW(groups, betas=BETAS[phase], fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=steps,
        # The scheduler divides by the steps of the rise less one: a rise of exactly one step is none it can do.
        pct_start=min(0.75, max(WARMUP, 2 / steps)),
        cycle_momentum=False,
    )
    return optimizer, scheduler


# What changes of a schedule from step to step; all else is as it was made.
_COUNTERS = ("last_epoch", "_step_count", "_last_lr")


def restore_cycle(
    optimizer: AdamW, scheduler: OneCycleLR, moments: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """Puts optimizer and schedule, as :func:`make_optimizer` made them, where those were whose states are given.

    Raises:
        ValueError: the states are of another optimizer, or could not be those of one.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    fresh, groups = optimizer.state_dict()["param_groups"], moments["param_groups"]
    if [_constants(group) for group in groups] != [_constants(group) for group in fresh]:
        raise ValueError("the optimizer has other groups of parameters")
    if not all(isinstance(group["lr"], float) for group in groups):
        raise ValueError("the optimizer has a rate that is no number")
    for index, state in moments["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"the optimizer has moments of a parameter {index!r:.80}")
        shapes = {"step": torch.Size(), "exp_avg": parameters[index].shape, "exp_avg_sq": parameters[index].shape}
        found = {name: moment.shape for name, moment in state.items() if moment.is_floating_point()}
        if found != shapes or set(state) != set(shapes):
            raise ValueError(f"the optimizer has other moments than those of {list(parameters[index].shape)}")
    made = scheduler.state_dict()
    if {**progress, **{name: made[name] for name in _COUNTERS}} != made:
        raise ValueError("the schedule is another one")
    steps = [progress[name] for name in _COUNTERS[:2]]
    if any(type(step) is not int or not 0 <= step <= made["total_steps"] + 1 for step in steps):
        raise ValueError(f"the schedule can not be at the steps {steps!r:.80}")
    if [type(rate) for rate in progress["_last_lr"]] != [float] * len(groups):
        raise ValueError("the schedule has rates that are no numbers")
    optimizer.load_state_dict(dict(moments))
    scheduler.load_state_dict(dict(progress))


def _constants(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "lr"}


def check_finite(loss: float, epoch: int, phase: int, lr: float) -> None:
    """Raises FloatingPointError where the mean loss of an epoch, counted from 1, is NaN or infinite."""
    if not math.isfinite(loss):
        name = LR_NAMES[phase]
        raise FloatingPointError(f"the loss of epoch {epoch} is {loss}; a smaller {name} ({lr} now) may help")
