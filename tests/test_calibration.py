"""expected_calibration_error against sums done by hand and bin by bin."""

from __future__ import annotations

import pytest
import torch

from bqnn.lab.metrics import expected_calibration_error


def two_classes(*confidences: float) -> torch.Tensor:
    """Rows whose larger probability, that of class 0, is the confidence."""
    first = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([first, 1 - first], 1)


def test_by_hand() -> None:
    # Two bins of ten: three images at 0.8, one of them right, and one at 0.6, right.
    probs = two_classes(0.78, 0.78, 0.78, 0.58)
    labels = torch.tensor([0, 1, 1, 0])
    expected = (abs(1 - 3 * 0.78) + abs(1 - 0.58)) / 4
    assert expected_calibration_error(probs, labels, bins=10) == pytest.approx(expected, abs=1e-12)


def test_a_calibrated_classifier_has_none() -> None:
    probs, labels = two_classes(*[0.75] * 4), torch.tensor([0, 0, 0, 1])
    assert expected_calibration_error(probs, labels) == pytest.approx(0.0, abs=1e-12)


def test_errors_of_different_bins_do_not_cancel() -> None:
    probs, labels = two_classes(0.9, 0.6), torch.tensor([1, 0])
    assert expected_calibration_error(probs, labels) == pytest.approx((0.9 + 0.4) / 2, abs=1e-12)
    assert expected_calibration_error(probs, labels, bins=1) == pytest.approx((0.9 - 0.4) / 2, abs=1e-12)


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
def test_against_a_loop_over_bins(bins: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    probs = torch.randn(500, 7, generator=generator).mul(2).softmax(1)
    labels = torch.randint(7, (500,), generator=generator)
    confidence, predictions = probs.double().max(1)
    expected = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            accuracy = (predictions == labels)[inside].double().mean()
            expected += float(inside.double().mean() * (accuracy - confidence[inside].mean()).abs())
    assert expected_calibration_error(probs, labels, bins) == pytest.approx(expected, abs=1e-9)


def test_certain_predictions_are_in_the_last_bin() -> None:
    assert expected_calibration_error(two_classes(1.0, 1.0), torch.tensor([0, 1])) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("probs", "labels", "bins", "message"),
    [
        pytest.param(torch.zeros(0, 3), torch.zeros(0).long(), 15, "probs", id="no-image"),
        pytest.param(torch.ones(3), torch.zeros(3).long(), 15, "probs", id="one-dimension"),
        pytest.param(torch.ones(3, 1), torch.zeros(2).long(), 15, "labels", id="labels-missing"),
        pytest.param(torch.ones(3, 1), torch.zeros(3).long(), 0, "bins", id="no-bin"),
        pytest.param(torch.full((3, 2), float("nan")), torch.zeros(3).long(), 15, "probs", id="nan"),
        pytest.param(torch.full((3, 2), 3.0), torch.zeros(3).long(), 15, "probs", id="logits"),
    ],
)
def test_bad_input_is_named(probs: torch.Tensor, labels: torch.Tensor, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probs, labels, bins)
