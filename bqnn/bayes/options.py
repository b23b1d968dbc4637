"""The options of Bayes layers: what each may be, and what it is where it is not given."""

from __future__ import annotations

from typing import TypedDict

from bqnn.core.check import check_number

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


def check_start_sigma(start_sigma: float) -> None:
    """Raises unless ``start_sigma`` is a number from 0.001 to 10; TypeError or ValueError."""
    check_number("start_sigma", start_sigma)
    if not 1e-3 <= start_sigma <= 10.0:
        raise ValueError(f"start_sigma must be from 0.001 to 10, got {start_sigma}")
