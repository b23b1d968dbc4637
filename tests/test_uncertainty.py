"""measure: every number of it against what the pieces give, and what it is of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.bayes.predict import predict
from bqnn.core.ensemble import Ensemble
from bqnn.data.corruptions import CORRUPTIONS, corrupt
from bqnn.data.splits import Split, Splits, load_dataset, normalise
from bqnn.lab import uncertainty
from bqnn.lab.evaluate import statistics_batches
from bqnn.lab.metrics import best_temperature, nll_of, scaled, separation
from bqnn.lab.uncertainty import ask, drawn_networks, measure
from bqnn.lab.uncertainty_file import SCORES


@pytest.fixture(scope="module")
def data() -> Splits:
    """The digits, some of them."""
    digits = load_dataset("digits")
    validation, test = (Split(each.images[:60], each.labels[:60]) for each in (digits.validation, digits.test))
    return replace(digits, validation=validation, test=test)


class Small(nn.Module):
    """A network with a BatchNorm, whose logits follow the digits' templates and are not certain."""

    def __init__(self, data: Splits) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 10)
        x = normalise(data.train.images, data.mean, data.std).flatten(1)
        means = torch.stack([x[data.train.labels == label].mean(0) for label in range(10)])
        with torch.no_grad():
            self.fc.weight.copy_(means / 8)
            self.fc.bias.copy_(-(means**2).sum(1) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.flatten(1)))


@pytest.fixture(scope="module")
def net(data: Splits) -> nn.Module:
    return Small(data).eval()


@pytest.fixture(scope="module")
def bayes(net: nn.Module) -> nn.Module:
    """A posterior so wide that its networks differ."""
    converted = bqnn.convert(net, 5, estimator="sample")
    with torch.no_grad():
        converted.fc.log_sigma2.fill_(2 * math.log(0.05))
    return converted.eval()


@pytest.fixture(scope="module")
def single(net: nn.Module, data: Splits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(net, data, data_root=tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def sampled(bayes: nn.Module, data: Splits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(bayes, data, samples=3, seed=5, data_root=tmp_path_factory.mktemp("empty"))


def numbers(value: Any) -> list[float]:
    """All numbers in a piece of JSON."""
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers(part)]
    return [] if isinstance(value, str) else [value]


@torch.no_grad()
def test_clean_scores_are_those_of_the_logits(single: dict[str, Any], net: nn.Module, data: Splits) -> None:
    logits = net(normalise(data.test.images, data.mean, data.std)).double()
    held_out = net(normalise(data.validation.images, data.mean, data.std)).double()
    labels, clean = data.test.labels, single["clean"]
    temperature = best_temperature(held_out.softmax(1), data.validation.labels)
    assert single["temperature"] == pytest.approx(temperature, rel=1e-9)
    assert clean["error"] == pytest.approx(100 * float((logits.argmax(1) != labels).double().mean()))
    assert clean["nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-9)
    assert clean["scaled_nll"] == pytest.approx(float(F.cross_entropy(logits / temperature, labels)), rel=1e-9)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    assert clean["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-9)
    assert clean["mutual_information"] == pytest.approx(0, abs=1e-12)
    assert (single["samples"], single["images"], single["dataset"], single["split"]) == (1, 60, "digits", "test")


@torch.no_grad()
def test_corrupted_scores_are_of_corrupted_images_at_the_clean_temperature(
    single: dict[str, Any], net: nn.Module, data: Splits
) -> None:
    assert list(single["corruptions"]) == list(CORRUPTIONS)
    for name, strength in (("fog", 1), ("translation", 5)):
        images = corrupt(data.test.images, name, strength, torch.Generator().manual_seed(uncertainty.IMAGE_SEED))
        probs = net(normalise(images, data.mean, data.std)).double().softmax(1)
        found = single["corruptions"][name][strength - 1]
        assert found["nll"] == pytest.approx(nll_of(probs, data.test.labels), rel=1e-9)
        expected = nll_of(scaled(probs, single["temperature"]), data.test.labels)
        assert found["scaled_nll"] == pytest.approx(expected, rel=1e-9)
    every = [each for strengths in single["corruptions"].values() for each in strengths]
    assert len(every) == 5 * len(CORRUPTIONS)
    for name in SCORES:
        assert single["mean"][name] == pytest.approx(sum(each[name] for each in every) / len(every), rel=1e-9)


@torch.no_grad()
def test_images_from_outside_are_told_by_entropy(single: dict[str, Any], net: nn.Module, data: Splits) -> None:
    def entropy(images: Tensor) -> Tensor:
        return torch.special.entr(net(normalise(images, data.mean, data.std)).double().softmax(1)).sum(1)

    assert list(single["ood"]) == ["inverted", "uniform noise", "shuffled pixels"]
    assert all(list(found) == ["entropy"] for found in single["ood"].values()), "one network has no other uncertainty"
    expected = separation(entropy(data.test.images), entropy(255 - data.test.images))
    assert single["ood"]["inverted"]["entropy"] == pytest.approx(expected._asdict(), rel=1e-9)
    inverted = torch.histogram(
        entropy(255 - data.test.images), torch.tensor(single["entropy"]["edges"], dtype=torch.float64)
    )
    assert single["entropy"]["shares"]["inverted"] == pytest.approx((inverted.hist / 60).tolist())


def test_figures_add_up(single: dict[str, Any], sampled: dict[str, Any]) -> None:
    for found in (single, sampled):
        reliability, coverage = found["reliability"], found["coverage"]
        assert sum(reliability["images"]) == 60
        right = sum(a * n for a, n in zip(reliability["accuracy"], reliability["images"]))
        assert 100 * (1 - right / 60) == pytest.approx(found["clean"]["error"])
        gaps = [abs(a - c) for a, c in zip(reliability["accuracy"], reliability["confidence"])]
        ece = sum(gap * n for gap, n in zip(gaps, reliability["images"])) / 60
        assert ece == pytest.approx(found["clean"]["ece"])
        assert coverage["coverage"][-1] == 1 and coverage["error"][-1] == pytest.approx(found["clean"]["error"])
        assert coverage["coverage"] == sorted(set(coverage["coverage"]))
        assert sum(coverage["error"]) / 60 == pytest.approx(found["clean"]["aurc"]), "60 images are 60 points"
        assert found["entropy"]["edges"][0] == 0 and found["entropy"]["edges"][-1] == pytest.approx(math.log(10))
        for shares in found["entropy"]["shares"].values():
            assert sum(shares) == pytest.approx(1)


def test_every_number_is_finite(single: dict[str, Any], sampled: dict[str, Any]) -> None:
    for found in (single, sampled):
        assert all(math.isfinite(number) for number in numbers(found))
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_samples_are_the_networks_of_predict(sampled: dict[str, Any], bayes: nn.Module, data: Splits) -> None:
    x = normalise(data.test.images, data.mean, data.std)
    given = list(statistics_batches(data, uncertainty.STATISTICS_SEED, torch.device("cpu")))
    expected = predict(bayes, x, 3, seed=5, batches=given)
    assert sampled["clean"]["nll"] == pytest.approx(nll_of(expected.probs, data.test.labels), rel=1e-5)
    assert sampled["clean"]["entropy"] == pytest.approx(float(expected.entropy.mean()), rel=1e-5)
    information = float(expected.mutual_information.mean())
    assert sampled["clean"]["mutual_information"] == pytest.approx(information, rel=1e-4) and information > 1e-3
    assert all(list(found) == ["entropy", "mutual_information"] for found in sampled["ood"].values())
    assert (sampled["samples"], sampled["seed"]) == (3, 5)


class Looking(nn.Module):
    """A network whose Python looks at its input, so that it can not be compiled."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if float(x.sum()) < 1e30 else x / 2)


def outputs_of(networks: list[nn.Module], x: Tensor) -> list[Tensor]:
    """The logits of each network, of a compiled ensemble those of each of its networks."""
    return [each for network in networks for each in network(x).reshape(-1, len(x), 10)]


@torch.no_grad()
@pytest.mark.parametrize("compiles", [True, False], ids=["compiled", "one-by-one"])
def test_drawn_networks_stay_what_they_are(bayes: nn.Module, data: Splits, compiles: bool) -> None:
    x = normalise(data.test.images, data.mean, data.std)
    bayes = bayes if compiles else Looking(bayes)
    before = bayes(x)
    networks = drawn_networks(bayes, data, 3, 0)
    assert len(networks) == (1 if compiles and bqnn.cpu_isa() != "none" else 3)
    outputs = outputs_of(networks, x)
    assert len(outputs) == 3
    assert all(torch.equal(again, output) for again, output in zip(outputs_of(networks, x), outputs))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    again = outputs_of(drawn_networks(bayes, data, 2, 1), x)
    assert torch.equal(again[0], outputs[1]) and torch.equal(again[1], outputs[2])
    assert torch.equal(bayes(x), before)


def test_an_ensemble_is_the_mean_of_its_networks(net: nn.Module, bayes: nn.Module, data: Splits) -> None:
    first, second = (
        ask(drawn_networks(each, data, 1, 0), [data.test.images], data) for each in (net, bqnn.pack(bayes))
    )
    together = ask([Ensemble([net, bqnn.pack(bayes)]).eval()], data.test.images.split(7), data)
    probs = (first.probs + second.probs) / 2
    assert torch.allclose(together.probs, probs, rtol=1e-6)
    entropy = torch.special.entr(probs).sum(1)
    assert torch.allclose(together.entropy, entropy, rtol=1e-6)
    information = entropy - (first.entropy + second.entropy) / 2
    assert torch.allclose(together.mutual_information, information.clamp(min=0), atol=1e-6)


def test_networks_of_an_ensemble_are_drawn_in_equal_numbers(bayes: nn.Module, data: Splits) -> None:
    x, packed = normalise(data.test.images, data.mean, data.std), bqnn.pack(bayes)
    together = drawn_networks(Ensemble([bayes, packed]), data, 4, 7)
    alone = [*drawn_networks(bayes, data, 2, 7), *drawn_networks(packed, data, 2, 9)]
    pairs = zip(outputs_of(together, x), outputs_of(alone, x), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="samples must be a multiple of the 2 networks"):
        drawn_networks(Ensemble([bayes, packed]), data, 3, 7)


def test_an_ensemble_s_networks_are_counted(
    net: nn.Module, bayes: nn.Module, data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncertainty, "CORRUPTIONS", {"fog": CORRUPTIONS["fog"]})
    found = measure(Ensemble([net, bqnn.pack(bayes)]), data, data_root=tmp_path)
    assert found["samples"] == 2 and found["clean"]["mutual_information"] > 0
    assert list(found["ood"]["inverted"]) == ["entropy", "mutual_information"]


def test_other_data_set_is_taken_where_it_is(
    net: nn.Module, data: Splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uncertainty, "CORRUPTIONS", {"fog": CORRUPTIONS["fog"]})
    other = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(uncertainty, "other_images", lambda *_: other)
    found = measure(net, data, data_root=tmp_path)
    assert list(found["ood"]) == ["inverted", "uniform noise", "shuffled pixels", "cifar10"]
    assert list(found["entropy"]["shares"]) == ["clean", *found["ood"]]


@pytest.mark.parametrize(
    ("split", "samples", "error", "message"),
    [
        pytest.param("test", 0, ValueError, "samples must be at least 1", id="no-sample"),
        pytest.param("test", 2.0, TypeError, "samples must be an int", id="no-integer"),
        pytest.param("test", 2, ValueError, "no Bayes layer with a posterior", id="no-posterior"),
        pytest.param("validation", 1, ValueError, "the validation split of digits is empty", id="no-split"),
        pytest.param("test", 1, ValueError, "temperature is found on validation images", id="no-validation"),
    ],
)
def test_bad_input_is_named(
    net: nn.Module, data: Splits, split: str, samples: Any, error: type[Exception], message: str
) -> None:
    empty = Split(data.validation.images[:0], data.validation.labels[:0])
    given = replace(data, validation=empty) if "validation" in message else data
    with pytest.raises(error, match=message):
        measure(net, given, split, samples=samples)


def test_a_network_of_other_classes_is_named(net: nn.Module, data: Splits) -> None:
    message = "logits of the 7 classes of digits for each of 60 images, got \\[60, 10\\]"
    with pytest.raises(ValueError, match=message):
        measure(net, replace(data, num_classes=7))
