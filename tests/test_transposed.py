"""Transposed convolutions: the convolution of the input with zeros between its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bqnn
from bqnn.core.transposed import ComposedConvTranspose2d
from tests.support.composed import check_equal, check_life

CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"stride": 2, "padding": 1, "output_padding": 1, "bias": False}, id="double"),
    pytest.param({"stride": 3, "padding": 2, "dilation": 2, "groups": 2}, id="steps"),
    pytest.param({"padding": 4, "stride": 2}, id="cropped"),
    pytest.param({"dilation": 3, "output_padding": 2}, id="output-padding-beyond-stride"),
    pytest.param({"groups": 4, "stride": 2}, id="groups"),
]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_it_is_torchs_layer_with_the_quantized_weight(kind: Any, options: dict[str, Any], granularity: str) -> None:
    torch.manual_seed(0)
    net, x = kind(4, 8, 3, **options), torch.randn(2, 4, *(7, 6)[: 1 if kind is nn.ConvTranspose1d else 2])
    check_equal(net, lambda each: [each(given) for given in (x, x[0], x[:0])], granularity=granularity)


def test_pairs_and_the_size_of_the_output() -> None:
    net, x = nn.ConvTranspose2d(3, 5, (2, 3), (3, 1), (0, 1), dilation=(1, 2)), torch.randn(2, 3, 5, 4)
    sizes = [(x, [15, 6]), (x, [2, 5, 16, 6]), (x[0], [16, 6])]
    check_equal(net, lambda each: [each(given, output_size=size) for given, size in sizes])
    for each in (bqnn.convert(net), bqnn.pack(bqnn.convert(net))):
        with pytest.raises(ValueError, match="requested an output size of"):
            each(x, output_size=[99, 6])
        with pytest.raises(ValueError, match="x must have 4 dimensions, or one less without a batch, got 2"):
            each(x[0, 0])


def test_from_convert_to_a_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    up = [nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), nn.ConvTranspose2d(3, 2, 2, 2, groups=1)]
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *up), torch.randn(3, 2, 6, 6)
    packed: Any = check_life(net, x, tmp_path / "net", 3)
    assert type(packed[2]) is ComposedConvTranspose2d and isinstance(packed[2], nn.ConvTranspose2d)
    assert [layer.name for layer in bqnn.explain_speed(packed, x)] == ["0", "2.conv", "3.conv"]
    torch.testing.assert_close(bqnn.compile(packed, x)(x), packed(x))


def test_gradients_in_float64() -> None:
    layer = nn.ConvTranspose2d(2, 3, 2, 2, 1, dtype=torch.float64)
    net = bqnn.convert(layer, 3, estimator="deterministic")
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for each in (net, bqnn.pack(net)):
        assert torch.autograd.gradcheck(each, x)


def test_a_channel_has_its_own_codebook_and_the_weight_torchs_shape() -> None:
    net: Any = bqnn.convert(nn.ConvTranspose2d(4, 6, 3, groups=2), 3, granularity="channel").eval()
    assert net.conv.levels.shape == (6, 3) and net.weight.shape == (4, 3, 3, 3)
    with pytest.raises(TypeError, match="weight of a ComposedConvTranspose2d is that of its parts"):
        net.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
