"""What a classifier, or its posterior, says of images that it was trained for, of corrupted ones and of others.

:func:`measure` gives what `bqnn eval --uncertainty` prints and writes as JSON:

    network, dataset, split   what was measured on what: strings
    images, samples, seed     images of the split; networks that were drawn from the posterior, or are in the ensemble,
                              1 for a single one; the seed of the first
    temperature               of the least NLL on the clean validation images; 1 is calibrated, more is overconfident
    clean                     scores of the split as it is
    corruptions               by name, the scores at each of five strengths: lists of five objects
    mean                      scores, the mean over all corruptions and strengths
    ood                       by the name of a set of images from outside, by "entropy" and, of several networks,
                              "mutual_information": {"auroc", "fpr95"}, 0 to 1
    reliability               of up to 15 bins by confidence that have images: {"confidence", "accuracy", "images"}
    coverage                  {"coverage", "error"}: the error in percent of that share of the images of which the
                              network is most confident
    entropy                   histograms {"edges", "shares"}: shares, by the name of a set, of its images in each bin
                              between edges, in nats

Scores: "error" and "aurc", the area under error against coverage, in percent; "nll", "scaled_nll", "entropy" and
"mutual_information" in nats an image; "brier" 0 to 2; "ece" and "scaled_ece" 0 to 1. What is scaled is at the
temperature. Every number is finite.

Corruptions and images from outside are the same for every network and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.layers import bayes_layers
from bqnn.bayes.predict import Prediction, of_draws
from bqnn.bayes.sample import check_posterior, sample, sampled_networks
from bqnn.core.check import check_integer
from bqnn.core.ensemble import Ensemble, Stacked
from bqnn.core.inputs import device_of
from bqnn.core.native import cpu_isa
from bqnn.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from bqnn.data.out_of_distribution import other_images, other_name, outside_images
from bqnn.data.splits import Split, Splits, normalise
from bqnn.engine.compile import compile
from bqnn.engine.pack import pack
from bqnn.engine.partition import EnginePart
from bqnn.lab.evaluate import EVAL_BATCH, find_split, statistics_batches
from bqnn.lab.metrics import (
    best_temperature,
    brier_of,
    calibration_bins,
    error_of,
    expected_calibration_error,
    nll_of,
    risk_coverage,
    scaled,
    separation,
)
from bqnn.lab.progress import progress_bar

IMAGE_SEED = 0  # of corruptions and images from outside
STATISTICS_SEED = 0  # of the training images that the norms of drawn networks are measured on
ENTROPY_BINS = 40
POINTS = 100  # of the curve of error against coverage


def measure(
    net: nn.Module,
    data: Splits,
    split: str = "test",
    *,
    samples: int = 1,
    seed: int = 0,
    data_root: str | Path = "data",
    progress: bool = False,
) -> dict[str, Any]:
    """Everything that the docstring of this module describes, but for "network".

    Args:
        net: a network that returns logits [B, classes], or an ensemble, whose networks are averaged over.
        data: the data set that it was trained on.
        split: "test" or "validation".
        samples: above 1, that many networks are drawn from the posterior, as :func:`bqnn.sample` does with ``seed``,
            ``seed`` + 1 and so on, each with BatchNorm statistics of its own, and averaged over.
        data_root: where another data set may be.
        progress: show a bar.

    Raises:
        TypeError: samples or seed is no integer.
        ValueError: samples < 1, or more than 1 of a network without a posterior; the split or the validation split is
            empty.
    """
    find_split(data, split), _validation(data)  # before networks are drawn, which takes longer
    networks = drawn_networks(net, data, samples, seed)
    number = net.num_networks if isinstance(net, Stacked) and samples == 1 else samples
    return measure_drawn(networks, number, seed, data, split, data_root=data_root, progress=progress)


def measure_drawn(
    networks: Sequence[nn.Module],
    number: int,
    seed: int,
    data: Splits,
    split: str = "test",
    *,
    data_root: str | Path = "data",
    progress: bool = False,
) -> dict[str, Any]:
    """What :func:`measure` gives, of networks that :func:`drawn_networks` has given for ``seed``.

    Args:
        number: how many they are; several may be compiled to one.
    """
    images, held_out = find_split(data, split), _validation(data)
    validation = ask(networks, held_out.images.split(EVAL_BATCH), data)
    temperature = best_temperature(validation.probs, held_out.labels)
    clean = ask(networks, images.images.split(EVAL_BATCH), data)
    outside = {
        name: ask(networks, each.split(EVAL_BATCH), data) for name, each in outside_sets(data, split, data_root).items()
    }
    cases = [(name, strength) for name in CORRUPTIONS for strength in STRENGTHS]
    corruptions: dict[str, list[dict[str, float]]] = {name: [] for name in CORRUPTIONS}
    for name, strength in progress_bar(cases, "corruptions", len(cases)) if progress else cases:
        prediction = ask(networks, corrupted(images, name, strength), data)
        corruptions[name].append(scores(prediction, images.labels, temperature))
    return {
        "dataset": data.name,
        "split": split,
        "images": len(images),
        "samples": number,
        "seed": seed,
        "temperature": temperature,
        "clean": scores(clean, images.labels, temperature),
        "corruptions": corruptions,
        "mean": mean_scores([each for strengths in corruptions.values() for each in strengths]),
        "ood": {name: _separations(clean, each, number) for name, each in outside.items()},
        "reliability": _reliability(clean, images.labels),
        "coverage": _coverage(clean, images.labels),
        "entropy": _entropies({"clean": clean, **outside}, data.num_classes),
    }


def _validation(data: Splits) -> Split:
    if not len(data.validation):
        raise ValueError(f"the temperature is found on validation images: the validation split of {data.name} is empty")
    return data.validation


def corrupted(split: Split, name: str, strength: int) -> Iterator[Tensor]:
    """The images of a split with a corruption, batch by batch, uint8; the same ones at every call."""
    generator = torch.Generator().manual_seed(IMAGE_SEED)
    return (corrupt(images, name, strength, generator) for images in split.images.split(EVAL_BATCH))


def outside_sets(data: Splits, split: str, data_root: str | Path) -> dict[str, Tensor]:
    """Images from outside of ``data`` by the name of their set, uint8, the same ones at every call: what is made of
    its split, and those of another data set where it is in ``data_root``."""
    generator = torch.Generator().manual_seed(IMAGE_SEED)
    found = outside_images(find_split(data, split).images, generator)
    other = other_images(data, split, data_root, generator)
    return found if other is None else {**found, other_name(data): other}


def drawn_networks(net: nn.Module, data: Splits, samples: int, seed: int) -> list[nn.Module]:
    """The networks that are averaged over: ``net`` itself, or with more than one sample that many of its posterior, of
    an ensemble as many from each network.

    The codes of each are drawn once, and its BatchNorm statistics measured on training images of ``data``. On the CPU
    they are compiled to one network, wherever the engine runs all of it; else they share all other tensors with
    ``net``, and each keeps its quantized weights, 4 bytes a weight.

    Raises:
        TypeError: samples or seed is no integer.
        ValueError: samples < 1, or more than 1 of a network without a posterior; seed is out of its range.
    """
    check_integer("samples", samples)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if samples == 1:
        return [net.eval()]
    check_posterior(net, samples)
    given = list(statistics_batches(data, STATISTICS_SEED, device_of(net)))
    members = list(net) if isinstance(net, Ensemble) else [net]
    each = samples // len(members)
    numbered = [(members[number // each], seed + number) for number in range(samples)]
    fast = _compiled(numbered, given) if device_of(net).type == "cpu" and cpu_isa() != "none" else None
    return [fast] if fast else [next(sampled_networks(member, 1, own, given)) for member, own in numbered]


def _compiled(numbered: Sequence[tuple[nn.Module, int]], given: Sequence[Tensor]) -> nn.Module | None:
    """The networks drawn from each with its seed, as one compiled network; None unless the engine runs all of it."""

    def drawn(member: nn.Module, seed: int) -> nn.Module:
        copied = sample(member, seed, given)
        return pack(copied) if bayes_layers(copied) else copied

    try:
        compiled = compile([drawn(*each) for each in numbered], given[0][:1])
    except (TypeError, ValueError):  # not every network can be copied, or captured with batches of any size
        return None
    return compiled if all(isinstance(part, EnginePart) for part in compiled.parts) else None


@torch.no_grad()
def ask(networks: Sequence[nn.Module], images: Iterable[Tensor], data: Splits) -> Prediction:
    """The mean prediction of networks for a set of images, float64, on the CPU.

    Args:
        networks: in evaluation mode, each of which returns logits [B, classes], or [networks, B, classes].
        images: batch by batch, uint8 [B, C, H, W], or inputs that are normalised already, floating point.
        data: whose mean and deviation images are normalised by, and whose classes there are.

    Raises:
        ValueError: a network returns something else.
    """
    draws = []
    for batch in images:
        x = normalise(batch, data.mean, data.std) if batch.dtype == torch.uint8 else batch
        logits = [network(x.to(device_of(network))).double().cpu() for network in networks]
        for each in logits:
            if each.dim() not in (2, 3) or each.shape[-2:] != (len(x), data.num_classes):
                wanted = f"logits of the {data.num_classes} classes of {data.name} for each of {len(x)} images"
                raise ValueError(f"a network must return {wanted}, got {list(each.shape)}")
        draws.append(torch.cat([each.reshape(-1, *each.shape[-2:]) for each in logits]).softmax(-1))
    return of_draws(torch.cat(draws, 1))


def scores(prediction: Prediction, labels: Tensor, temperature: float) -> dict[str, float]:
    """The scores of a prediction, with the names and units that the docstring of this module says."""
    probs, cooled = prediction.probs, scaled(prediction.probs, temperature)
    return {
        "error": error_of(probs, labels),
        "nll": nll_of(probs, labels),
        "brier": brier_of(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "scaled_nll": nll_of(cooled, labels),
        "scaled_ece": expected_calibration_error(cooled, labels),
        "aurc": risk_coverage(probs, labels).mean().item(),
        "entropy": prediction.entropy.mean().item(),
        "mutual_information": prediction.mutual_information.mean().item(),
    }


def mean_scores(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score."""
    return {name: fmean(each[name] for each in found) for name in found[0]}


def _separations(clean: Prediction, outside: Prediction, networks: int) -> dict[str, dict[str, float]]:
    """By each uncertainty; of a single network there is no mutual information."""
    names = ("entropy", "mutual_information")[: 1 + (networks > 1)]
    return {name: separation(getattr(clean, name), getattr(outside, name))._asdict() for name in names}


def _reliability(prediction: Prediction, labels: Tensor) -> dict[str, list[float]]:
    bins = calibration_bins(prediction.probs, labels)
    filled = bins.images > 0
    return {name: each[filled].tolist() for name, each in bins._asdict().items()}


def _coverage(prediction: Prediction, labels: Tensor) -> dict[str, list[float]]:
    errors = risk_coverage(prediction.probs, labels)
    counts = (torch.arange(1, POINTS + 1, dtype=torch.float64) * len(errors) / POINTS).ceil().long().unique()
    return {"coverage": (counts.double() / len(errors)).tolist(), "error": errors[counts - 1].tolist()}


def _entropies(predictions: Mapping[str, Prediction], num_classes: int) -> dict[str, Any]:
    edges = torch.linspace(0, math.log(num_classes), ENTROPY_BINS + 1, dtype=torch.float64)

    def shares(prediction: Prediction) -> list[float]:
        counts, _ = torch.histogram(prediction.entropy.clamp(edges[0], edges[-1]), edges)
        return (counts / counts.sum()).tolist()

    return {"edges": edges.tolist(), "shares": {name: shares(each) for name, each in predictions.items()}}
