"""How good a classifier's probabilities are: likelihood, calibration, and what they are worth for deciding.

All of it is computed in float64. ``probs`` are [N, classes], each row a distribution, ``labels`` int64 [N] and
``uncertainty`` any number an image that is the larger the less sure the network is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
FLOOR = 1e-30  # of a probability that float32 made 0: no infinite loss
TEMPERATURES = (0.1, 10.0)
BISECTIONS = 45  # as many halve the logarithms of the temperatures to the precision of float64
NORMAL_95 = 1.959963984540054  # standard deviations on either side of the mean that hold 95 % of a normal variable
ACCEPTED = 0.95  # of the images in the distribution, where the false ones among the others are counted


def _check(probs: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless there are images and the shapes fit."""
    if probs.dim() != 2 or not len(probs) or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"probs must be [N, classes] and labels [N], N >= 1, got {list(probs.shape)}, {list(labels.shape)}"
        )


def _check_uncertainty(name: str, uncertainty: Tensor) -> None:
    """Raises ValueError unless ``uncertainty`` is a row of finite numbers."""
    if uncertainty.dim() != 1 or not len(uncertainty) or not uncertainty.isfinite().all():
        raise ValueError(f"{name} must be [N] finite numbers, N >= 1, got shape {list(uncertainty.shape)}")


class CalibrationBins(NamedTuple):
    """Images sorted by their confidence, the largest probability: [bins] each, in the order of confidence.

    A bin without images has a confidence and an accuracy of 0.
    """

    confidence: Tensor  # float64, the mean, 0 to 1
    accuracy: Tensor  # float64, 0 to 1
    images: Tensor  # int64, how many


def calibration_bins(probs: Tensor, labels: Tensor, bins: int = BINS) -> CalibrationBins:
    """Images in ``bins`` of equal width by confidence, each bin open below and closed above.

    Raises:
        ValueError: there is no image, the shapes do not fit, ``probs`` leaves 0..1, or bins < 1.
    """
    _check(probs, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, predictions = probs.double().max(1)
    if not ((confidence > 0) & (confidence <= 1 + 1e-5)).all():
        raise ValueError("probs must hold distributions, got values that are NaN or outside 0..1")
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    values = torch.stack([confidence, (predictions == labels).double(), torch.ones_like(confidence)])
    confidences, hits, images = values.new_zeros(3, bins).index_add_(1, bin_of, values).unbind()
    count = images.clamp(min=1)
    return CalibrationBins(confidences / count, hits / count, images.long())


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error (Guo et al., "On calibration of modern neural networks", 2017, eq. 3), 0 to 1.

    The distances between accuracy and mean confidence of :func:`calibration_bins` are averaged, weighted by the number
    of images; raises as that does.
    """
    found = calibration_bins(probs, labels, bins)
    return float((found.images * (found.accuracy - found.confidence).abs()).sum() / len(probs))


def scaled(probs: Tensor, temperature: float) -> Tensor:
    """The distributions to the power of 1 / temperature: of a softmax, that of the logits over the temperature.

    Of a mean over networks, the temperature is that of the mean. float64 [N, classes].
    """
    return (probs.double().clamp(min=FLOOR).log() / temperature).softmax(1)


def error_of(probs: Tensor, labels: Tensor) -> float:
    """The share of images whose most probable class is another one, in percent."""
    _check(probs, labels)
    return 100.0 * (probs.argmax(1) != labels).double().mean().item()


def error_interval(error: float, images: int) -> tuple[float, float]:
    """The interval, in percent, that holds the error of a network with 95 % confidence, of one measured on images.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927: it stays within 0 and 100, and
    has a width where no image, or every one, is wrong.

    Args:
        error: percent, 0 to 100.
        images: how many it was measured on, at least 1.

    Raises:
        ValueError: one of them is out of its range.
    """
    if not 0.0 <= error <= 100.0 or not images >= 1:
        raise ValueError(f"error must be 0 to 100 percent, of at least 1 image, got {error} of {images}")
    share, spread = error / 100.0, NORMAL_95**2 / images
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return 100.0 * max(0.0, low), 100.0 * min(1.0, high)


def nll_of(probs: Tensor, labels: Tensor) -> float:
    """The negative log likelihood, in nats an image."""
    _check(probs, labels)
    return F.nll_loss(probs.double().clamp(min=FLOOR).log(), labels).item()


def brier_of(probs: Tensor, labels: Tensor) -> float:
    """The squared distance between the distribution and the label's, summed over classes, mean over images, 0 to 2.

    Brier, "Verification of forecasts expressed in terms of probability", 1950, eq. 2.
    """
    _check(probs, labels)
    wanted = F.one_hot(labels, probs.shape[1]).double()
    return (probs.double() - wanted).square().sum(1).mean().item()


def best_temperature(probs: Tensor, labels: Tensor) -> float:
    """The temperature of the least likelihood loss (Guo et al. 2017, section 4.2), 0.1 to 10; 1 is calibrated.

    The loss is convex in 1 / temperature: its slope there is the mean over images of the expected log probability under
    the scaled distribution, less that of the label, and is halved down to its one zero. Where every label is the most
    probable class the loss falls down to temperature 0, and the lower end is the answer.
    """
    _check(probs, labels)
    logits = probs.double().clamp(min=FLOOR).log()
    of_label = logits.gather(1, labels[:, None]).mean()

    def slope(log_inverse: float) -> float:
        weights = (math.exp(log_inverse) * logits).softmax(1)
        return float((weights * logits).sum(1).mean() - of_label)

    low, high = (-math.log(each) for each in reversed(TEMPERATURES))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def risk_coverage(probs: Tensor, labels: Tensor) -> Tensor:
    """Error, in percent, among the k most confident images for k = 1..N: float64 [N].

    Geifman and El-Yaniv, "Selective classification for deep neural networks", 2017, section 2; the mean of it is the
    area under the risk-coverage curve. Images of one confidence are taken in a random order, on average: their errors
    are spread evenly over them.
    """
    _check(probs, labels)
    confidence, predictions = probs.double().max(1)
    # Sorted by confidence, the highest first.
    _, place, counts = (-confidence).unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, (predictions != labels).double())
    share = (wrong / counts).repeat_interleave(counts)
    return 100.0 * share.cumsum(0) / torch.arange(1, len(share) + 1)


class Separation(NamedTuple):
    """How far an uncertainty tells images of the distribution from others, each 0 to 1."""

    auroc: float
    """The chance that an image from outside is the more uncertain of a pair, where equal ones count a half; 1 is
    perfect, 0.5 is chance."""
    fpr95: float
    """The share of outside images that are accepted where the threshold accepts 95 % of those inside."""


def separation(inside: Tensor, outside: Tensor) -> Separation:
    """AUROC and FPR95 of an uncertainty as a detector of images from outside the distribution.

    Hendrycks and Gimpel, "A baseline for detecting misclassified and out-of-distribution examples", 2017; Liang et al.,
    "Enhancing the reliability of out-of-distribution image detection", 2018, section 4.3.

    Args:
        inside, outside: the uncertainty, [N] and [K].

    Raises:
        ValueError: one of them is empty or not finite.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    for name, each in (("inside", inside), ("outside", outside)):
        _check_uncertainty(name, each)
    is_inside = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).numpy()
    certainty = -torch.cat([inside, outside]).double().numpy()
    false, true, _ = roc_curve(is_inside, certainty, drop_intermediate=False)
    return Separation(float(roc_auc_score(is_inside, certainty)), float(false[(true >= ACCEPTED).argmax()]))
