"""What a call of bqnn.fit asks for, checked: phases, rates and what goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bqnn.core.check import check_int, check_integer, check_number, named
from bqnn.training.phases import BAYES, DETERMINISTIC, EPOCHS, LR_NAMES, Phase, Rates, phases_of

MOST_EPOCHS = 2**31 - 1


class Plan(NamedTuple):
    """Everything about training that depends neither on the network nor on the data."""

    phases: tuple[Phase, Phase, Phase]
    rates: Rates
    kl_warmup: float
    max_grad_norm: float | None
    autocast: torch.dtype | None


def make_plan(
    epochs: int | Sequence[int],
    lrs: Sequence[float],
    rates: Rates,
    kl_warmup: float,
    max_grad_norm: float | None,
    autocast: torch.dtype | None,
    converted: bool,
) -> Plan:
    """The plan; TypeError or ValueError, with the argument's name, where an argument of :func:`bqnn.fit` is wrong."""
    for name, lr in zip(LR_NAMES, lrs, strict=True):
        _check_positive(name, lr)
    for name, rate in (*rates._asdict().items(), ("kl_warmup", kl_warmup)):
        check_number(name, rate)
        if not 0.0 <= rate < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {rate}")
    if max_grad_norm is not None:
        _check_positive("max_grad_norm", max_grad_norm)
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be None or torch.bfloat16, which needs no scaling of the loss, got {autocast}")
    return Plan(phases_of(_epochs(epochs, converted), lrs), rates, kl_warmup, max_grad_norm, autocast)


def share_epochs(total: int, converted: bool) -> tuple[int, int, int]:
    """``total`` epochs in the recipe's proportions, the last phase first: it has one at least. A network that is
    converted has no first phase."""
    parts = (0, *EPOCHS[1:]) if converted else EPOCHS
    bayes = max(1, round(total * parts[BAYES] / sum(parts)))
    deterministic = round((total - bayes) * parts[DETERMINISTIC] / sum(parts[:BAYES]))
    return total - bayes - deterministic, deterministic, bayes


def _epochs(epochs: Any, converted: bool) -> tuple[int, int, int]:
    if not isinstance(epochs, (tuple, list)):
        check_int("epochs", epochs, 1, MOST_EPOCHS)
        return share_epochs(epochs, converted)
    if len(epochs) != len(EPOCHS):
        raise ValueError(f"epochs must be one number, or one for each of three phases, got {named(epochs)}")
    for each in epochs:
        check_integer("each of epochs", each)
    if min(epochs) < 0 or not 1 <= sum(epochs) <= MOST_EPOCHS:
        raise ValueError(f"epochs must be at least 0, and 1 together, got {named(epochs)}")
    if converted and epochs[0]:
        raise ValueError(
            f"epochs must begin with 0 for a net with Bayes layers, which is past full precision, got {named(epochs)}"
        )
    first, second, third = epochs
    return first, second, third


def _check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
