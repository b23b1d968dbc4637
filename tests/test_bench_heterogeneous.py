"""The bench of few, mislabelled, unbalanced and corrupted data: what is drawn, and how the table is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import heterogeneous_lenet5 as bench
from bench.uncertainty_lenet5 import bytes_of
from bqnn.core.ensemble import Ensemble
from bqnn.data.splits import Splits, load_dataset
from bqnn.engine.pack import pack
from bqnn.models import lenet5


@pytest.fixture(scope="module")
def mnist() -> Splits:
    return load_dataset("mnist", Path("data"), validation=0)


def test_images_are_drawn_without_the_test_images_and_by_seed(mnist: Splits) -> None:
    first, again, other = (bench.drawn_data(mnist, bench.Condition(300), seed) for seed in (0, 0, 1))
    assert len(first.train) == 300 and len(first.validation) == 60
    assert first.test is mnist.test and first.mean == mnist.mean
    torch.testing.assert_close(first.train.images, again.train.images, rtol=0, atol=0)
    assert not torch.equal(first.train.labels, other.train.labels)
    both = torch.cat([first.train.images, first.validation.images]).flatten(1)
    assert len(both.unique(dim=0)) == 360  # none is in both


def test_a_share_of_labels_is_wrong_and_every_other_class_as_likely(mnist: Splits) -> None:
    right = bench.drawn_data(mnist, bench.Condition(20_000), 3).train
    wrong = bench.drawn_data(mnist, bench.Condition(20_000, wrong_labels=0.4), 3).train
    torch.testing.assert_close(right.images, wrong.images, rtol=0, atol=0)
    differ = right.labels != wrong.labels
    assert differ.double().mean().item() == pytest.approx(0.4, abs=0.015)  # four deviations
    shift = ((wrong.labels - right.labels) % 10)[differ].bincount(minlength=10)[1:] / differ.sum()
    assert shift.min() > 0.095 and shift.max() < 0.127


@pytest.mark.parametrize("tail", [10.0, 100.0])
def test_a_long_tail_falls_in_geometric_steps(mnist: Splits, tail: float) -> None:
    counts = bench.drawn_data(mnist, bench.Condition(10_000, long_tail=tail), 0).train.labels.bincount(minlength=10)
    expected = torch.tensor([1000 * tail ** (-k / 9) for k in range(10)])
    assert ((counts - expected).abs() <= 0.15 * expected + 1).all()  # there are not 1,000 of each digit
    assert counts[0] / counts[-1] == pytest.approx(tail, rel=0.15)


def test_narrow_networks_have_no_more_bytes_than_quantized_ones() -> None:
    parameters = sum(each.numel() for each in bench.narrow_lenet5().parameters())
    nets = [
        bench.quantize(lenet5(), bench.replace(bench.MNIST, estimator="deterministic")) for _ in range(bench.MEMBERS)
    ]
    for net in nets:
        for norm in (net.bn1, net.bn2, net.bn3, net.bn4):  # a file holds once what members have in common
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 1.5)
    packed = pack(Ensemble(nets))
    share = 4 * parameters * bench.MEMBERS / bytes_of(packed)
    assert 0.9 < share <= 1.0
    assert bench.narrow_lenet5().eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_every_network_has_a_row_and_rows_are_kept(
    mnist: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STEPS", 1)
    monkeypatch.setattr(bench, "MEMBERS", 2)
    monkeypatch.setattr(bench, "KL_WEIGHTS", (0.1,))
    monkeypatch.setattr(bench, "WEIGHT_DECAYS", (0.05,))
    monkeypatch.setattr(bench, "CORRUPTED", "20 images, corrupted at test")
    monkeypatch.setattr(bench, "CORRUPTIONS", ["contrast"])
    monkeypatch.setattr(bench, "CONDITIONS", {"20 images": bench.Condition(20)})
    small = bench.replace(mnist, test=bench.Split(mnist.test.images[:50], mnist.test.labels[:50]))
    rows = bench.rows_of("20 images", 0, tmp_path, small)
    names = ["FPNN", "FPNN, 4 narrow", "deterministic", "mixture, 16", "ensemble, 4"]
    assert [row["network"] for row in rows if row["condition"] == "20 images"] == names
    assert [row["network"] for row in rows if row["condition"] == bench.CORRUPTED] == names
    assert all(0 <= row["error"] <= 100 for row in rows)
    assert bench.rows_of("20 images", 0, tmp_path, small) == rows  # kept


def test_the_least_of_a_line_is_bold_and_starred_where_it_is_so_in_every_seed() -> None:
    def row(network: str, seed: int, error: float, nll: float) -> dict[str, Any]:
        return {"condition": "some", "network": network, "seed": seed, "error": error, "nll": nll}

    rows = [row("a", 0, 1.0, 0.3), row("b", 0, 2.0, 0.1), row("a", 1, 3.0, 0.3), row("b", 1, 2.5, 0.2)]
    _, _, line, last = bench.table(rows)
    assert line == "| some | **2.00**, 0.300 | 2.25, **0.150*** |"
    assert last == "| least, of all cells | 1 | 1 |"
