"""Recipe: everything that a training run depends on."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bqnn import models
from bqnn.bayes.base import (
    GRANULARITIES,
    PARTITIONS,
    PRIORS,
    SIGMA_PER_GAP,
    SLAB_SHARE,
    SPIKE_WIDTH,
    check_start_sigma,
)
from bqnn.bayes.estimator import ESTIMATORS
from bqnn.core.check import check_num_levels
from bqnn.data.augment import KINDS
from bqnn.ops.mixture_kl import check_mixture

METHODS = ("bayes", "fpnn")
AUTOCASTS = ("none", "bfloat16")
# What each field of a recipe may be; `bqnn train` offers the same.
CHOICES: dict[str, tuple[str, ...]] = {
    "model": models.NAMES,
    "method": METHODS,
    "estimator": ESTIMATORS,
    "prior": PRIORS,
    "partition": PARTITIONS,
    "granularity": GRANULARITIES,
    "augment": KINDS,
    "autocast": AUTOCASTS,
}
# The fields that are options of the layers.
LAYER_OPTIONS = ("estimator", "prior", "partition", "granularity", "spike_width", "slab_share", "start_sigma")
FULL_PRECISION, DETERMINISTIC, BAYES = range(3)  # the phases of a recipe


class Phase(NamedTuple):
    """A stretch of training with an optimizer and a learning-rate cycle of its own."""

    name: str
    epochs: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. The phases together are the training; "fpnn" does all of them without quantizing."""

    model: str = "lenet5"
    dataset: str = "digits"
    method: str = "bayes"
    num_levels: int = 3
    estimator: str = "moment"
    prior: str = "spike_slab"
    spike_width: float = SPIKE_WIDTH
    slab_share: float = SLAB_SHARE
    start_sigma: float = SIGMA_PER_GAP
    partition: str = "nearest"
    granularity: str = "tensor"
    pretrain_epochs: int = 6
    deterministic_epochs: int = 10
    epochs: int = 4
    batch_size: int = 128
    lr: float = 4e-3
    deterministic_lr: float = 3e-3
    bayes_lr: float = 5e-3
    codebook_lr: float = 0.1
    variance_lr: float = 0.3
    weight_decay: float = 0.0
    kl_warmup: float = 1.0
    augment: str = "none"
    label_smoothing: float = 0.0
    autocast: str = "none"
    image_size: int | None = None
    validation: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_num_levels(self.num_levels)
        check_mixture(self.spike_width, self.slab_share)
        check_start_sigma(self.start_sigma)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")
        for name in ("pretrain_epochs", "deterministic_epochs", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("batch_size", "lr", "deterministic_lr", "bayes_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @classmethod
    def of_fields(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe with the fields ``content``, as JSON or TOML have them; one that is missing has its default.

        Raises:
            ValueError: a field is unknown, or of a wrong type or value.
        """
        kinds = typing.get_type_hints(cls)
        for name, value in content.items():
            if name not in kinds:
                raise ValueError(f"recipe has the unknown field {name!r:.80}")
            options = typing.get_args(kinds[name]) or (kinds[name],)
            allowed = (*options, int) if float in options else options
            if type(value) not in allowed:
                wanted = " or ".join(kind.__name__ for kind in options)
                raise ValueError(f"{name} of the recipe must be {wanted}, got {value!r:.80}")
        return cls(**content)

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        return (
            Phase("full precision", self.pretrain_epochs, self.lr),
            Phase("deterministic", self.deterministic_epochs, self.deterministic_lr),
            Phase("bayes", self.epochs, self.bayes_lr),
        )

    @property
    def total_epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def locate(self, epoch: int) -> tuple[int, int]:
        """The phase that an epoch (from 0) belongs to, and the epochs of it that are done; at the end, the last one."""
        for index, phase in enumerate(self.phases):
            if epoch < phase.epochs:
                return index, epoch
            epoch -= phase.epochs
        return index, phase.epochs
