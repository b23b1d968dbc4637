"""Recipe: everything that a training run depends on."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bqnn import models
from bqnn.bayes.elbo import CODEBOOK_LR, VARIANCE_LR
from bqnn.bayes.estimator import ESTIMATORS
from bqnn.bayes.options import (
    GRANULARITIES,
    PARTITIONS,
    PRIORS,
    SIGMA_PER_GAP,
    SLAB_SHARE,
    SPIKE_WIDTH,
    check_start_sigma,
)
from bqnn.bayes.sample import MOST_SEED
from bqnn.core.check import MAX_LEVELS, MIN_LEVELS, check_int, check_num_levels
from bqnn.data.augment import KINDS
from bqnn.ops.mixture_kl import check_mixture
from bqnn.training.phases import (
    BAYES_LR,
    DETERMINISTIC_LR,
    EPOCHS,
    KL_WARMUP,
    LR,
    LR_NAMES,
    Phase,
    Rates,
    locate,
    phases_of,
)

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


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. The phases together are the training; "fpnn" does all of them without quantizing."""

    model: str = "lenet5"
    dataset: str = "digits"
    method: str = "bayes"
    num_levels: int = 3
    layer_levels: str = ""
    estimator: str = "moment"
    prior: str = "spike_slab"
    spike_width: float = SPIKE_WIDTH
    slab_share: float = SLAB_SHARE
    start_sigma: float = SIGMA_PER_GAP
    partition: str = "nearest"
    granularity: str = "tensor"
    pretrain_epochs: int = EPOCHS[0]
    deterministic_epochs: int = EPOCHS[1]
    epochs: int = EPOCHS[2]
    batch_size: int = 128
    lr: float = LR
    deterministic_lr: float = DETERMINISTIC_LR
    bayes_lr: float = BAYES_LR
    codebook_lr: float = CODEBOOK_LR
    variance_lr: float = VARIANCE_LR
    weight_decay: float = 0.0
    kl_weight: float = 1.0
    kl_warmup: float = KL_WARMUP
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
        levels_of_layers(self.layer_levels)
        check_mixture(self.spike_width, self.slab_share)
        check_start_sigma(self.start_sigma)
        check_int("seed", self.seed, 0, MOST_SEED)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")
        for name in ("pretrain_epochs", "deterministic_epochs", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("batch_size", *LR_NAMES):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (*Rates._fields, "kl_weight", "kl_warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

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
        epochs = self.pretrain_epochs, self.deterministic_epochs, self.epochs
        return phases_of(epochs, [getattr(self, name) for name in LR_NAMES])

    @property
    def layer_options(self) -> dict[str, dict[str, int]]:
        """Options of single layers by their names, as ``overrides`` of :func:`bqnn.convert`."""
        return {name: {"num_levels": number} for name, number in levels_of_layers(self.layer_levels).items()}

    @property
    def rates(self) -> Rates:
        return Rates(self.codebook_lr, self.variance_lr, self.weight_decay)

    @property
    def total_epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def locate(self, epoch: int) -> tuple[int, int]:
        """The phase that an epoch (from 0) belongs to, and the epochs of it that are done; at the end, the last one."""
        return locate(self.phases, epoch)


def levels_of_layers(text: str) -> dict[str, int]:
    """M of single layers, by their names, of a recipe's ``layer_levels``: "conv1=4 fc=16", in any order.

    Raises:
        ValueError: it is something else, names a layer twice, or has an M that is none.
    """
    found: dict[str, int] = {}
    for word in text.split():
        name, _, number = word.partition("=")
        if not name or not (number.isascii() and number.isdecimal()) or name in found:
            raise ValueError(f"layer_levels must be like 'conv1=4 fc=16', each layer once, got {text!r:.80}")
        check_int(f"layer_levels of {name}", int(number), MIN_LEVELS, MAX_LEVELS)
        found[name] = int(number)
    return found
