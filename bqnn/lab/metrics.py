"""How far a classifier's confidence is from its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error (Guo et al., "On calibration of modern neural networks", 2017, eq. 3), 0 to 1.

    The largest probability of each image is its confidence. Images are sorted into ``bins`` of equal width by it, each
    bin open below and closed above, and the distances between a bin's accuracy and its mean confidence are averaged,
    weighted by the number of images.

    Args:
        probs: [N, classes], each row a distribution.
        labels: int64 [N].
        bins: how many.

    Raises:
        ValueError: there is no image, the shapes do not fit, ``probs`` leaves 0..1, or bins < 1.
    """
    if probs.dim() != 2 or not len(probs) or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"probs must be [N, classes] and labels [N], N >= 1, got {list(probs.shape)}, {list(labels.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, predictions = probs.double().max(1)
    if not ((confidence > 0) & (confidence <= 1 + 1e-5)).all():
        raise ValueError("probs must hold distributions, got values that are NaN or outside 0..1")
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = (predictions == labels).double() - confidence
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, excess).abs().sum().item() / len(probs)
