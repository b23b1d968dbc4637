"""bqnn.report on layers made by hand, and against the packed file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bqnn import models
from bqnn.bayes.convert import convert
from bqnn.bayes.convolutions import BayesConv2d
from bqnn.bayes.layers import BayesLinear
from bqnn.engine.pack import pack
from bqnn.files import network
from bqnn.reports.report import Report, report


def linear(weight: list[list[float]], levels: list[list[float]], bias: bool = False, **options: object) -> BayesLinear:
    """A layer with those means and levels."""
    rows = torch.tensor(weight)
    layer = BayesLinear(rows.shape[1], rows.shape[0], bias, num_levels=len(levels[0]), **options)
    with torch.no_grad():
        layer.weight.copy_(rows)
    layer.set_levels_(torch.tensor(levels))
    return layer


def test_by_hand() -> None:
    # Gaps are 1, so "near" is within 0.1 of the level: 0.92, 0.05 and -1.09 are, -0.8 and 0.4 are not.
    layer = linear([[-1.09, -0.8, 0.05], [0.4, 0.92, 0.05]], [[-1.0, 0.0, 1.0]], bias=True)
    (row,) = report(nn.Sequential(layer)).layers
    assert (row.name, row.kind, row.shape, row.num_levels, row.weights) == ("0", "BayesLinear", (2, 3), 3, 6)
    assert row.levels[0] == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
    assert row.occupancy == [2, 3, 1]
    assert row.dead_levels == 0
    assert row.bits == 8.0 * 2 / 6  # each channel of three weights takes a byte
    assert row.nbytes == 2 + 3 * 4 + 2 * 4
    assert row.near_share == pytest.approx(4 / 6)
    error = 0.09**2 + 0.2**2 + 0.05**2 + 0.4**2 + 0.08**2 + 0.05**2
    norm = 1.09**2 + 0.8**2 + 0.05**2 + 0.4**2 + 0.92**2 + 0.05**2
    assert row.squared_error == pytest.approx(error, rel=1e-5)
    assert row.squared_norm == pytest.approx(norm, rel=1e-5)
    assert row.quantization_loss == pytest.approx(error / norm, rel=1e-5)


def test_means_on_their_levels_have_no_loss() -> None:
    layer = linear([[-1.0, 0.0], [1.0, 1.0]], [[-1.0, 0.0, 1.0]])
    (row,) = report(layer).layers
    assert row.near_share == 1.0
    assert row.quantization_loss == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("weight", "dead"),
    [
        pytest.param([[-1.0, 1.0], [-1.0, 1.0]], 1, id="one-dead"),
        pytest.param([[0.1, 0.1], [0.0, -0.1]], 2, id="two-dead"),
        pytest.param([[-1.0, 0.0], [0.0, 1.0]], 0, id="none-dead"),
    ],
)
def test_dead_levels_of_one_codebook(weight: list[list[float]], dead: int) -> None:
    assert report(linear(weight, [[-1.0, 0.0, 1.0]])).layers[0].dead_levels == dead


def test_dead_levels_are_counted_in_each_codebook() -> None:
    layer = linear([[-1.0, 0.0, 1.0], [5.0, 5.0, 7.0]], [[-1.0, 0.0, 1.0], [5.0, 6.0, 7.0]], granularity="channel")
    (row,) = report(layer).layers
    assert row.dead_levels == 1, "the level 6 of the second channel; its code is used in the first"
    assert row.occupancy == [3, 1, 2]
    assert row.nbytes == 2 + 2 * 3 * 4


def test_nearness_is_measured_in_the_gap_of_the_level() -> None:
    # 0.5 is near 0 where levels are 10 apart, and half a gap away where they are 1 apart.
    layer = linear([[0.5, 0.5], [0.45, 0.45]], [[-10.0, 0.0, 10.0], [-1.0, 0.0, 1.0]], granularity="channel")
    assert report(layer).layers[0].near_share == 0.5


def test_totals_weigh_layers_by_their_weights() -> None:
    net = nn.Sequential(
        linear([[-1.0, 0.0, 1.0]] * 3, [[-1.0, 0.0, 1.0]]),  # all nine weights are near
        linear([[0.4], [0.4], [-0.4]], [[-1.0, 0.0, 1.0]]),  # none of three is near
    )
    total = report(net)
    assert total.weights == 12
    assert total.near_share == pytest.approx(9 / 12)
    assert total.quantization_loss == pytest.approx(3 * 0.16 / (6 + 3 * 0.16), rel=1e-5)
    assert total.bits == pytest.approx((9 * 8 / 3 + 3 * 8) / 12)  # a channel of three weights, or of one, takes a byte
    assert total.nbytes == sum(layer.nbytes for layer in total.layers) == (3 + 12) + (3 + 12)


def lenet(num_levels: int, granularity: str) -> nn.Module:
    torch.manual_seed(0)
    return convert(models.lenet5(image_size=8), num_levels, granularity=granularity)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [2, 3, 5, 16])
def test_bits_and_bytes_are_those_of_the_file(tmp_path: Path, num_levels: int, granularity: str) -> None:
    net = lenet(num_levels, granularity)
    packed = pack(net)
    path = tmp_path / "net.safetensors"
    network.save(packed, path)
    stored = network.info(path)["layers"]
    for rows in (report(net), report(packed), report(network.load(path))):
        assert {row.name: (row.nbytes, row.bits) for row in rows.layers} == {
            name: (layer["bytes"], layer["bits_per_weight"]) for name, layer in stored.items()
        }
        assert rows.nbytes < path.stat().st_size


def test_packed_and_unpacked_agree_on_codes_and_levels() -> None:
    net = lenet(4, "channel")
    for row, packed in zip(report(net).layers, report(pack(net)).layers, strict=True):
        for name in ("name", "shape", "num_levels", "levels", "occupancy", "dead_levels", "bits", "nbytes", "weights"):
            assert getattr(row, name) == getattr(packed, name), name
        assert (packed.near_share, packed.quantization_loss) == (None, None)


def test_a_packed_network_has_no_means_to_report_on() -> None:
    total = report(pack(lenet(3, "tensor")))
    assert (total.near_share, total.quantization_loss) == (None, None)


def test_occupancy_counts_every_weight_once() -> None:
    layer = BayesConv2d(4, 6, 3, groups=2, num_levels=5)
    (row,) = report(layer).layers
    assert row.shape == (6, 2, 3, 3)
    assert sum(row.occupancy) == row.weights == 108
    assert row.occupancy == [int((layer.codes() == m).sum()) for m in range(5)]


def test_prints_a_row_a_layer() -> None:
    text = str(report(lenet(3, "tensor")))
    assert [line.split()[0] for line in text.partition("\n\n")[0].splitlines()] == [
        "layer",
        "conv1",
        "conv2",
        "fc1",
        "fc2",
        "fc3",
    ]
    assert "6 codebooks" in str(report(lenet(3, "channel"))).splitlines()[1]
    assert " - " in str(report(pack(lenet(3, "tensor")))).splitlines()[1]


def test_a_network_without_quantized_layers_raises() -> None:
    with pytest.raises(ValueError, match="no Bayes layer"):
        report(nn.Linear(2, 2))


def test_nan_raises() -> None:
    layer = BayesLinear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        report(layer)


def test_report_of_no_layer_has_no_share() -> None:
    assert Report([]).near_share is None
    assert Report([]).quantization_loss is None
