"""The options of Bayes layers: what each may be, and what it is where it is not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from bqnn.core.check import check_choice, check_flag, check_num_levels, check_number
from bqnn.ops.mixture_kl import check_mixture

GRANULARITIES = ("tensor", "channel")
PARTITIONS = ("nearest", "learned")
PRIORS = ("spike_slab", "gaussian", "mixture")
SIGMA_PER_GAP = 0.1  # posterior deviation at the start, in level gaps
SPIKE_WIDTH, SLAB_SHARE = 0.25, 0.1  # of the prior "mixture": deviation of a spike in level gaps, share of the slab


class BayesOptions(TypedDict, total=False):
    """What every Bayes layer takes beside the arguments of torch's layer; :class:`BayesLinear` says what each is."""

    num_levels: int
    granularity: str
    partition: str
    estimator: str
    prior: str
    quantize_mean: bool
    coarse_variance: bool
    spike_width: float
    slab_share: float
    start_sigma: float


DEFAULTS: BayesOptions = {
    "num_levels": 3,
    "granularity": "tensor",
    "partition": "nearest",
    "estimator": "moment",
    "prior": "spike_slab",
    "quantize_mean": False,
    "coarse_variance": True,
    "spike_width": SPIKE_WIDTH,
    "slab_share": SLAB_SHARE,
    "start_sigma": SIGMA_PER_GAP,
}


def completed(options: Mapping[str, Any]) -> BayesOptions:
    """``options``, with the defaults of all that are not given; of ``estimator`` a layer checks the value itself.

    Raises:
        TypeError, ValueError: an option that there is not, or a value out of its range.
    """
    if unknown := [name for name in options if name not in DEFAULTS]:
        raise TypeError(f"{unknown[0]} is no option of a Bayes layer; they are {', '.join(DEFAULTS)}")
    values: Any = {**DEFAULTS, **options}
    check_num_levels(values["num_levels"])
    for name, choices in (("granularity", GRANULARITIES), ("partition", PARTITIONS), ("prior", PRIORS)):
        check_choice(name, values[name], choices)
    for name in ("quantize_mean", "coarse_variance"):
        check_flag(name, values[name])
    check_mixture(values["spike_width"], values["slab_share"])
    check_start_sigma(values["start_sigma"])
    return values


def check_start_sigma(start_sigma: float) -> None:
    """Raises unless ``start_sigma`` is a number from 0.001 to 10; TypeError or ValueError."""
    check_number("start_sigma", start_sigma)
    if not 1e-3 <= start_sigma <= 10.0:
        raise ValueError(f"start_sigma must be from 0.001 to 10, got {start_sigma}")
