"""Conv1d: a convolution of height 1 underneath, by the same ops, Bayesian and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn import BayesConv1d, BayesConv2d, PackedConv1d
from bqnn.core.codes import pack_codes
from bqnn.files.layer_spec import check_spec

CASES = [
    pytest.param((3, 5, 3), {}, id="plain"),
    pytest.param((4, 6, 4), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}, id="steps"),
    pytest.param((3, 2, 4), {"padding": "same", "dilation": 3}, id="same"),
    pytest.param((3, 2, 2), {"padding": "valid", "bias": False}, id="valid"),
    pytest.param((2, 4, 3), {"padding": 2, "padding_mode": "reflect"}, id="reflect"),
    pytest.param((2, 4, 4), {"padding": "same", "padding_mode": "circular"}, id="circular"),
    pytest.param((5, 5, 3), {"groups": 5, "padding": 1, "padding_mode": "replicate"}, id="depthwise"),
]


def layer_of(sizes: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Conv1d:
    torch.manual_seed(1)
    return nn.Conv1d(*sizes, **options, dtype=dtype)


def with_weight(layer: nn.Conv1d, weight: Tensor) -> nn.Conv1d:
    """``layer`` with another weight, torch's own: what a quantized layer has to equal."""
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_in_evaluation_it_is_conv1d_with_the_quantized_weight(sizes: Any, options: Any, granularity: str) -> None:
    layer, x = layer_of(sizes, options), torch.randn(3, sizes[0], 19)
    bayes = bqnn.convert(layer, 3, granularity=granularity).eval()
    assert type(bayes) is BayesConv1d and bayes.mean.shape == layer.weight.shape
    expected = with_weight(layer, bayes.quantized_weight())(x)
    torch.testing.assert_close(bayes(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bayes(x[0]), expected[0], rtol=1e-5, atol=1e-6)
    packed = bqnn.pack(bayes)
    assert type(packed) is PackedConv1d and torch.equal(packed.decode(), bayes.quantized_weight())
    for execution in ("packed", "dense"):
        packed.execution = execution
        for _ in range(2):  # the second call runs the plan of the first
            torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(packed(x[0]), expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(bqnn.dequantize(packed).weight, layer.weight)


@pytest.mark.parametrize("estimator", ["moment", "sample", "local", "deterministic"])
def test_in_training_it_draws_what_the_convolution_of_height_1_draws(estimator: str) -> None:
    layer, x = layer_of((4, 6, 3), {"padding": 1, "groups": 2}), torch.randn(3, 4, 11)
    one = bqnn.convert(layer, 4, estimator=estimator)
    two = BayesConv2d(4, 6, (1, 3), padding=(0, 1), groups=2, num_levels=4, estimator=estimator)
    state = {k: v.unsqueeze(2) if v.dim() == 3 else v for k, v in one.state_dict().items()}
    two.load_state_dict(state)
    outputs, gradients = [], []
    for net, given in ((one, x), (two, x.unsqueeze(2))):
        torch.manual_seed(5)
        y = net(given)
        (y.square().sum() + net.kl_divergence()).backward()
        outputs.append(y.view(3, 6, 11))
        gradients.append([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert torch.equal(*outputs)
    assert len(gradients[0]) == len(gradients[1]) >= 3
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_for_the_input_in_float64() -> None:
    bayes = bqnn.convert(layer_of((2, 3, 3), {"padding": 1}, torch.float64), 3, estimator="deterministic")
    x = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    for net in (bayes, bayes.eval(), bqnn.pack(bayes)):
        assert torch.autograd.gradcheck(net, x)


def test_from_convert_to_a_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 2, 3, padding="same"))
    net, x = bqnn.convert(plain, 3), torch.randn(4, 3, 12)
    terms = bqnn.elbo(net(x).mean(2), torch.tensor([0, 1, 0, 1]), net, 100)
    terms.loss.backward()
    assert all(layer.log_sigma2.grad.abs().sum() > 0 for layer in (net[0], net[2]))
    packed = bqnn.pack(net)
    assert packed[0].relu and type(packed[1]) is nn.Identity
    bqnn.save(packed, tmp_path / "net")
    loaded = bqnn.load(tmp_path / "net", model=plain)
    assert torch.equal(loaded(x), packed(x))
    described = bqnn.info(tmp_path / "net")["layers"]
    assert (
        described["0"]["kind"] == "conv1d" and described["0"]["stride"] == [2] and described["0"]["shape"] == [4, 3, 3]
    )
    assert [layer.kind for layer in bqnn.report(loaded).layers] == ["PackedConv1d", "PackedConv1d"]
    assert [layer.rows for layer in bqnn.explain_speed(packed, x)] == [24, 24]
    assert [layer.rows for layer in bqnn.explain_speed(packed, x[0])] == [6, 6]
    torch.testing.assert_close(bqnn.dequantize(packed)(x), packed(x))
    assert bqnn.predict(packed, x, samples=2).probs.shape == (4, 2, 6)
    torch.testing.assert_close(bqnn.compile(packed, x)(x), packed(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(
            torch.zeros(2, 4, 1, 9), r"x must have the shape \[batch, 4, length\], got \[2, 4, 1, 9\]", id="image"
        ),
        pytest.param(
            torch.zeros(2, 3, 9), r"x must have the shape \[batch, 4, length\], got \[2, 3, 9\]", id="channels"
        ),
    ],
)
def test_a_wrong_input_is_named(x: Tensor, message: str) -> None:
    net = bqnn.convert(layer_of((4, 4, 3), {}), 3)
    for each in (net, bqnn.pack(net)):
        with pytest.raises(ValueError, match=message):
            each(x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param({"kernel_size": (3, 3)}, "kernel_size must be one integer, 1 or more", id="kernel"),
        pytest.param({"stride": 0}, "stride must be one integer, 1 or more", id="stride"),
        pytest.param({"padding": "same", "stride": 2}, "stride must be 1 with padding='same'", id="same"),
        pytest.param({"groups": 3}, "groups must divide", id="groups"),
    ],
)
def test_a_wrong_size_is_named(wrong: dict[str, Any], message: str) -> None:
    codes = pack_codes(torch.zeros(4, 12, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=message):
        PackedConv1d(
            **{"in_channels": 4, "kernel_size": 3, "codes": codes, "levels": torch.tensor([[0.0, 1.0]]), **wrong}
        )


def test_an_empty_batch() -> None:
    packed = bqnn.pack(bqnn.convert(layer_of((4, 4, 3), {}), 3))
    assert packed(torch.zeros(0, 4, 9)).shape == F.conv1d(torch.zeros(0, 4, 9), torch.zeros(4, 4, 3)).shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [2, 2]}, "layer 'c': stride can not be"),
        ({"stride": [1]}, "layer 'c': stride can not be"),
        ({"dilation": [0]}, "layer 'c': dilation can not be"),
        ({"padding": [-1]}, "layer 'c': padding can not be"),
        ({"padding_idx": 1}, "layer 'c': padding_idx can not be"),
        ({"shape": [4, 3]}, "layer 'c': shape can not be"),
        ({"groups": 3}, "c.groups must divide the 4 channels"),
        ({"padding": "same"}, "c.stride must be 1 with padding='same'"),
    ],
    ids=str,
)
def test_hostile_descriptions_are_refused(change: dict[str, Any], message: str) -> None:
    spec = {"kind": "conv1d", "shape": [4, 3, 3], "num_levels": 3, "stride": [2]}
    check_spec("c", spec)
    with pytest.raises(bqnn.FormatError, match=message):
        check_spec("c", {**spec, **change})
