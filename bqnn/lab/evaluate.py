"""evaluate: how a classifier does on a split of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.bayes.predict import of_draws
from bqnn.bayes.sample import check_posterior, sampled_networks
from bqnn.core.ensemble import Stacked
from bqnn.core.inputs import device_of
from bqnn.data.splits import Split, Splits, batches, leaves_one, normalise
from bqnn.lab.metrics import error_of, expected_calibration_error, nll_of

EVAL_BATCH = 1000
STATISTICS_BATCH, STATISTICS_BATCHES = 500, 20


@dataclass(frozen=True)
class Score:
    """How a network does on a split."""

    error: float  # percent of the images
    nll: float  # nats an image
    predictions: Tensor  # int64 [N]
    logits: Tensor  # float32 [N, classes]


def evaluate(net: Callable[[Tensor], Tensor], split: Split, data: Splits, batch_size: int = EVAL_BATCH) -> Score:
    """Error and negative log likelihood of a classifier on a split; a module is put into evaluation mode."""
    return _score(logits_on(net, split, data, batch_size), split)


def _score(logits: Tensor, split: Split) -> Score:
    predictions = logits.argmax(1)
    return Score(error_of(logits, split.labels), F.cross_entropy(logits, split.labels).item(), predictions, logits)


@torch.no_grad()
def logits_on(net: Callable[[Tensor], Tensor], split: Split, data: Splits, batch_size: int = EVAL_BATCH) -> Tensor:
    """Logits on a split, float32 [N, classes], of an ensemble [networks, N, classes]; a module is put into evaluation
    mode."""
    device = torch.device("cpu")
    if isinstance(net, nn.Module):
        device = device_of(net.eval())
    outputs = [
        net(normalise(images, data.mean, data.std).to(device)).float().cpu() for images, _ in batches(split, batch_size)
    ]
    return torch.cat(outputs, -2)


def find_split(data: Splits, name: str) -> Split:
    """The split "test" or "validation"; raises ValueError where it is empty."""
    split: Split = getattr(data, name)
    if not len(split):
        raise ValueError(f"the {name} split of {data.name} is empty")
    return split


def statistics_batches(data: Splits, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Training images without augmentation, on which BatchNorm's statistics are estimated; the same for each seed."""
    generator, drop = torch.Generator().manual_seed(seed), leaves_one(len(data.train), STATISTICS_BATCH)
    drawn = batches(data.train, STATISTICS_BATCH, generator, shuffle=True, drop_last=drop)
    for images, _ in islice(drawn, STATISTICS_BATCHES):
        yield normalise(images, data.mean, data.std).to(device)


def score_network(
    net: nn.Module, split: Split, data: Splits, samples: int = 1, refresh: int | None = None
) -> dict[str, Any]:
    """Error (percent), NLL (nats an image) and expected calibration error (0 to 1) of a network on a split.

    ``samples`` above 1 adds, under "sampled", the same of the mean over that many networks drawn from the posterior,
    with the means of the predictive entropy and of the mutual information, in nats.

    Args:
        net: a classifier; of a sampled one the layers may be packed.
        split, data: the images to score on, and the data set that they are of.
        samples: networks to draw.
        refresh: estimates the BatchNorm statistics of each of them again, on training images drawn with this seed.

    Raises:
        ValueError: samples < 1, more than 1 of a network without a posterior, or no more to refresh.
    """
    drawn = _are_drawn(samples, 1, refresh)
    result = _of_logits(logits_on(net, split, data), split)
    if drawn:
        result["sampled"] = _sampled(net, split, data, samples, refresh)
    return result


def score_ensemble(
    net: Stacked, split: Split, data: Splits, samples: int = 1, refresh: int | None = None
) -> dict[str, Any]:
    """What :func:`score_network` says of each network, under "networks", and under "ensemble" of their mean.

    ``samples``, where it is neither 1 nor the number of networks, adds "sampled": of as many draws from each network
    as make up that number.

    Raises:
        ValueError: as :func:`score_network`; also for samples that are no multiple of the networks.
    """
    drawn = _are_drawn(samples, net.num_networks, refresh)
    logits = logits_on(net, split, data)
    result: dict[str, Any] = {
        "images": len(split),
        "networks": [_of_logits(each, split) for each in logits],
        "ensemble": _of_mean(logits, split),
    }
    if drawn:
        result["sampled"] = _sampled(net, split, data, samples, refresh)
    return result


def _are_drawn(samples: int, networks: int, refresh: int | None) -> bool:
    """Whether ``samples`` are draws from posteriors, and not the networks themselves."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if refresh is not None and samples in (1, networks):
        raise ValueError(f"samples must be more than {networks} to be drawn, and refreshed, got {samples}")
    return samples not in (1, networks)


def _of_logits(logits: Tensor, split: Split) -> dict[str, Any]:
    """The scores of a network with ``logits`` [N, classes]."""
    score = _score(logits, split)
    ece = expected_calibration_error(logits.softmax(1), split.labels)
    return {"images": len(split), "error": score.error, "nll": score.nll, "ece": ece}


def _sampled(net: nn.Module, split: Split, data: Splits, samples: int, refresh: int | None) -> dict[str, Any]:
    check_posterior(net, samples)
    device = device_of(net)
    given = None if refresh is None else statistics_batches(data, refresh, device)
    # Each network sees the whole split, as one that is deployed would.
    logits = [logits_on(network, split, data) for network in sampled_networks(net, samples, batches=given)]
    return {"samples": samples, "refreshed": int(refresh is not None), **_of_mean(torch.stack(logits), split)}


def _of_mean(logits: Tensor, split: Split) -> dict[str, Any]:
    """The scores of the mean over the networks of ``logits``, [networks, N, classes]."""
    probs, entropy, information = of_draws(logits.softmax(-1))
    return {
        "error": error_of(probs, split.labels),
        "nll": nll_of(probs, split.labels),
        "ece": expected_calibration_error(probs, split.labels),
        "entropy": entropy.mean().item(),
        "mutual_information": information.mean().item(),
    }
