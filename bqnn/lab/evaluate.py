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


def device_of(net: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU for one that has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


@torch.no_grad()
def evaluate(net: Callable[[Tensor], Tensor], split: Split, data: Splits, batch_size: int = EVAL_BATCH) -> Score:
    """Error and negative log likelihood of a classifier on a split; a module is put into evaluation mode."""
    device = torch.device("cpu")
    if isinstance(net, nn.Module):
        device = device_of(net.eval())
    outputs = [
        net(normalise(images, data.mean, data.std).to(device)).float().cpu() for images, _ in batches(split, batch_size)
    ]
    logits = torch.cat(outputs)
    predictions = logits.argmax(1)
    error = (predictions != split.labels).double().mean().item() * 100.0
    return Score(error, F.cross_entropy(logits, split.labels).item(), predictions, logits)


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


def score_network(net: nn.Module, split: Split, data: Splits, samples: int = 1) -> dict[str, Any]:
    """Error (percent), NLL (nats an image) and expected calibration error (0 to 1) of a network on a split.

    ``samples`` above 1 adds, under "sampled", the same of the mean over that many networks drawn from the posterior,
    with the means of the predictive entropy and of the mutual information, in nats.

    Raises:
        ValueError: samples < 1, or more than 1 of a network without a posterior.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    score = evaluate(net, split, data)
    result: dict[str, Any] = {
        "images": len(split),
        "error": score.error,
        "nll": score.nll,
        "ece": expected_calibration_error(score.logits.softmax(1), split.labels),
    }
    if samples > 1:
        result["sampled"] = _sampled(net, split, data, samples)
    return result


def _sampled(net: nn.Module, split: Split, data: Splits, samples: int) -> dict[str, Any]:
    check_posterior(net, samples)
    # Each network sees the whole split, as one that is deployed would.
    logits = [evaluate(network, split, data).logits for network in sampled_networks(net, samples)]
    probs, entropy, information = of_draws(torch.stack(logits).softmax(-1))
    return {
        "samples": samples,
        "error": error_of(probs, split.labels),
        "nll": nll_of(probs, split.labels),
        "ece": expected_calibration_error(probs, split.labels),
        "entropy": entropy.mean().item(),
        "mutual_information": information.mean().item(),
    }
