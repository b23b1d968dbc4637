"""Metrics against independent formulas, scikit-learn, and sums done by hand; calibration is in test_calibration.py."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from bqnn.lab.metrics import (
    best_temperature,
    brier_of,
    calibration_bins,
    error_interval,
    error_of,
    nll_of,
    risk_coverage,
    scaled,
    separation,
)


def drawn(images: int = 400, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels that are drawn from them: a calibrated classifier."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(images, classes, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def test_likelihood_and_brier_are_scikit_learn_s() -> None:
    probs, labels = drawn()
    assert nll_of(probs, labels) == pytest.approx(log_loss(labels, probs), rel=1e-12)
    expected = brier_score_loss(labels, probs, labels=range(7), scale_by_half=False)
    assert brier_of(probs, labels) == pytest.approx(expected, rel=1e-12)
    assert error_of(probs, labels) == pytest.approx(100 * float((probs.argmax(1) != labels).double().mean()))


@pytest.mark.parametrize("images", [1, 9, 360, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_interval_is_where_the_normal_test_of_a_share_does_not_refuse(share: float, images: int) -> None:
    wrong = round(share * images)
    for bound in error_interval(100 * wrong / images, images):
        p = bound / 100
        assert 0 <= p <= 1
        deviations = (
            abs(wrong / images - p) / math.sqrt(p * (1 - p) / images) if 1e-9 < p < 1 - 1e-9 else 1.959963984540054
        )
        assert deviations == pytest.approx(1.959963984540054, rel=1e-9)
    low, high = error_interval(100 * wrong / images, images)
    assert low < high and low - 1e-9 <= 100 * wrong / images <= high + 1e-9


def test_four_images_of_360_are_no_difference() -> None:
    assert error_interval(100 * 3 / 360, 360)[1] > error_interval(100 * 7 / 360, 360)[0]


@pytest.mark.parametrize(("error", "images"), [(-1.0, 5), (101.0, 5), (float("nan"), 5), (5.0, 0)])
def test_no_interval_of_what_is_no_share(error: float, images: int) -> None:
    with pytest.raises(ValueError, match="error must be 0 to 100 percent, of at least 1 image"):
        error_interval(error, images)


def test_by_hand() -> None:
    probs, labels = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([1, 0])
    assert nll_of(probs, labels) == pytest.approx(math.log(4) / 2)
    assert brier_of(probs, labels) == pytest.approx((0.25 + 0.5625 + 0.0625) / 2)
    assert error_of(probs, labels) == 50


def test_a_probability_of_zero_is_no_infinite_loss() -> None:
    assert nll_of(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(30 * math.log(10))


def test_scaled_probabilities_are_those_of_scaled_logits() -> None:
    logits = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.5):
        expected = (logits / temperature).softmax(1)
        assert torch.allclose(scaled(logits.softmax(1), temperature), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_best_temperature_undoes_one(temperature: float) -> None:
    probs, labels = drawn(20_000)
    found = best_temperature(scaled(probs, temperature), labels)
    assert found * temperature == pytest.approx(1.0, abs=0.03), (
        "the labels are drawn, so that this is within their noise"
    )


def test_best_temperature_has_the_least_loss() -> None:
    probs, labels = drawn(300)
    probs = scaled(probs, 0.7)
    best = best_temperature(probs, labels)
    losses = [nll_of(scaled(probs, best * (1 + change)), labels) for change in (-1e-4, 0.0, 1e-4)]
    assert losses[1] < min(losses[0], losses[2])


def test_best_temperature_stays_in_its_range() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    assert best_temperature(probs, torch.tensor([0, 0])) == pytest.approx(0.1)
    assert best_temperature(probs, torch.tensor([1, 1])) == pytest.approx(10.0)


def test_calibration_bins() -> None:
    probs = torch.tensor([[0.55, 0.45], [0.9, 0.1], [0.05, 0.95]], dtype=torch.float64)
    confidence, accuracy, images = calibration_bins(probs, torch.tensor([0, 1, 1]), bins=4)
    assert images.tolist() == [0, 0, 1, 2]
    assert confidence.tolist() == pytest.approx([0, 0, 0.55, 0.925])
    assert accuracy.tolist() == [0, 0, 1, 0.5]


def test_risk_coverage_by_hand() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    labels = torch.tensor([1, 0, 1, 0])  # by confidence: right, right, wrong, wrong
    assert risk_coverage(probs, labels).tolist() == pytest.approx([0, 0, 100 / 3, 50])


def test_risk_coverage_against_a_loop() -> None:
    probs, labels = drawn(200)
    order = sorted(range(200), key=lambda i: -float(probs[i].max()))
    wrong = [int(probs[i].argmax()) != int(labels[i]) for i in order]
    expected = [100 * sum(wrong[:k]) / k for k in range(1, 201)]
    assert risk_coverage(probs, labels).tolist() == pytest.approx(expected, rel=1e-12)


def test_risk_coverage_of_one_confidence_does_not_depend_on_the_order() -> None:
    probs = torch.tensor([[0.75, 0.25]]).expand(4, 2)
    for labels in ([0, 0, 0, 1], [1, 0, 0, 0]):
        assert risk_coverage(probs, torch.tensor(labels)).tolist() == [25, 25, 25, 25]


def test_separation_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(101, generator=generator).mul(4).round()
    outside = torch.randn(67, generator=generator).add(1).mul(4).round()
    pairs = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside)
    found = separation(inside, outside)
    assert found.auroc == pytest.approx(float(pairs.mean()), rel=1e-12)
    threshold = min(each for each in inside.tolist() if float((inside <= each).double().mean()) >= 0.95)
    assert found.fpr95 == pytest.approx(float((outside <= threshold).double().mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("inside", "outside", "auroc", "fpr95"),
    [
        pytest.param([0.0, 1.0], [2.0, 3.0], 1.0, 0.0, id="perfect"),
        pytest.param([2.0, 3.0], [0.0, 1.0], 0.0, 1.0, id="the-wrong-way-round"),
        pytest.param([1.0, 1.0], [1.0], 0.5, 1.0, id="constant"),
        # Of the 20 inside 19, 18, 1 and 20 lie below the four, and 19 are accepted up to 18.
        pytest.param([*range(20)], [18.5, 17.5, 0.5, 20.0], 58 / 80, 0.5, id="accepted"),
    ],
)
def test_separation_by_hand(inside: list[float], outside: list[float], auroc: float, fpr95: float) -> None:
    found = separation(torch.tensor(inside, dtype=torch.float64), torch.tensor(outside, dtype=torch.float64))
    assert found == pytest.approx((auroc, fpr95), abs=1e-12)


PROBS, LABELS = torch.full((2, 2), 0.5), torch.zeros(2).long()


@pytest.mark.parametrize("metric", [error_of, nll_of, brier_of, best_temperature, risk_coverage])
def test_shapes_that_do_not_fit_are_named(metric: object) -> None:
    assert callable(metric)
    for probs, labels in ((PROBS, LABELS[:1]), (PROBS[:0], LABELS[:0]), (PROBS[0], LABELS)):
        with pytest.raises(ValueError, match="probs must be"):
            metric(probs, labels)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([math.nan]), torch.zeros(1, 1)], ids=str)
def test_an_uncertainty_that_is_none_is_named(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="inside must be"):
        separation(bad, torch.ones(1))
    with pytest.raises(ValueError, match="outside must be"):
        separation(torch.ones(1), bad)
