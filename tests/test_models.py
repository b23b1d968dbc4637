"""The built-in networks: shapes, published sizes, the factory record, and what they refuse."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from bqnn import models
from bqnn.models.resnet import BasicBlock

# A case is a name, arguments and the number of parameters. Caffe's LeNet has 20*25+20 + 50*500+50 + 500*800+500 +
# 10*500+10 of them. The LeNet-5 adds 2*(6+16+120+84) of BatchNorm, and has a bias in its last layer only.
PUBLISHED = [
    pytest.param("lenet5", {}, 150 + 2400 + 400 * 120 + 120 * 84 + 84 * 10 + 10 + 452, id="lenet5"),
    pytest.param(
        "lenet5", {"in_channels": 3, "image_size": 32}, 450 + 2400 + 48000 + 10080 + 850 + 452, id="lenet5-32"
    ),
    pytest.param("lenet5_caffe", {}, 431_080, id="lenet5_caffe"),
    pytest.param("densenet", {}, 1_019_722, id="densenet-40-12"),
    pytest.param("vgg7", {}, 12_979_082, id="vgg7"),
    pytest.param("airbench", {}, 312 + 13_824 + 36_864 + 147_456 + 3 * 589_824 + 2_560 + 2 * 1_152, id="airbench"),
    pytest.param("resnet20", {}, 269_722, id="resnet20"),
]
SIZES = {
    "lenet5": (8, 9, 10, 11, 12, 13, 16, 19, 20, 28, 31, 32, 33, 45),
    "lenet5_caffe": (16, 17, 28, 32),
    "densenet": (4, 7, 28),
    "vgg7": (8, 15, 28),
    "resnet20": (4, 7, 28),
    "airbench": (9, 16, 28, 33),
}
SMALL_ARGUMENTS = {"densenet": {"depth": 10, "growth_rate": 3}}


@pytest.mark.parametrize(("name", "arguments", "expected"), PUBLISHED)
def test_parameter_count(name: str, arguments: dict[str, int], expected: int) -> None:
    with torch.device("meta"):
        net = models.build(name, **arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


@pytest.mark.parametrize(
    ("depth", "growth_rate", "millions"),
    [(40, 12, 1.0), (100, 12, 7.0), (100, 24, 27.2)],
    ids=["40-12", "100-12", "100-24"],
)
def test_densenet_has_the_size_of_the_paper(depth: int, growth_rate: int, millions: float) -> None:
    """Huang et al. 2017, table 2."""
    with torch.device("meta"):
        net = models.densenet(depth, growth_rate)
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 1) == millions


def test_resnet20_has_the_size_of_the_paper() -> None:
    """He et al. 2016, table 6."""
    assert round(sum(parameter.numel() for parameter in models.resnet20().parameters()) / 1e6, 2) == 0.27


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(name, size, id=f"{name}-{size}") for name in SIZES for size in SIZES[name]]
)
def test_output_shape_at_any_size(name: str, size: int) -> None:
    with torch.device("meta"):
        net = models.build(name, in_channels=2, num_classes=7, image_size=size, **SMALL_ARGUMENTS.get(name, {})).eval()
        assert net(torch.empty(3, 2, size, size)).shape == (3, 7)


@pytest.mark.parametrize(("size", "features"), [(8, 256), (16, 256), (20, 144), (28, 400), (32, 400)])
def test_lenet5_border_rule(size: int, features: int) -> None:
    assert models.lenet5(image_size=size).fc1.in_features == features


def test_lenet5_module_names_are_fixed() -> None:
    names = [name for name, _ in models.lenet5().named_children()]
    assert names == ["conv1", "bn1", "conv2", "bn2", "fc1", "bn3", "fc2", "bn4", "fc3"]


@pytest.mark.parametrize("name", models.NAMES)
def test_a_bias_only_where_no_batchnorm_follows(name: str) -> None:
    net = models.build(name)
    biased = [key for key, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None]
    expected = {
        "lenet5": ["fc3"],
        "lenet5_caffe": ["conv1", "conv2", "fc1", "fc2"],
        "densenet": ["fc"],
        "vgg7": ["fc2"],
        "resnet20": ["fc"],
        "airbench": ["whiten"],
    }
    assert biased == expected[name]


@pytest.mark.parametrize("name", models.NAMES)
def test_forward_and_backward_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    net = models.build(name, image_size=16, **SMALL_ARGUMENTS.get(name, {}))
    channels = net.factory[1]["in_channels"]
    net(torch.randn(4, channels, 16, 16)).square().sum().backward()
    for key, parameter in net.named_parameters():
        if key == "whiten.weight":
            assert parameter.grad is None and not parameter.requires_grad
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0 or key.endswith("bias"), key


@pytest.mark.parametrize("name", models.NAMES)
def test_factory_round_trip(name: str) -> None:
    torch.manual_seed(0)
    arguments = {"in_channels": 2, "num_classes": 5, "image_size": 17, **SMALL_ARGUMENTS.get(name, {})}
    net = copy.deepcopy(models.build(name, arguments)).eval()
    assert net.factory[0] == name and net.factory[1].items() >= arguments.items()
    again = models.build(*json.loads(json.dumps(net.factory))).eval()
    assert again.factory == net.factory
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 2, 17, 17)
    assert torch.equal(again(x), net(x))


def test_factory_records_defaults() -> None:
    assert models.densenet().factory == (
        "densenet",
        {"depth": 40, "growth_rate": 12, "in_channels": 3, "num_classes": 10, "image_size": 32},
    )


def test_initialisation_is_kaiming_and_seeded() -> None:
    torch.manual_seed(3)
    net = models.vgg7(image_size=8)
    assert net.conv6.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert net.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    assert not net.fc2.bias.any()
    torch.manual_seed(3)
    assert torch.equal(models.vgg7(image_size=8).conv6.weight, net.conv6.weight)


def test_resnet_shortcut_is_option_a() -> None:
    block = BasicBlock(16, 32, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 7, 7)
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


@pytest.mark.parametrize("name", ["lenet", "", 3, None])
def test_unknown_name_lists_the_known(name: object) -> None:
    with pytest.raises(ValueError, match="airbench, densenet, lenet5, lenet5_caffe, resnet20, vgg7"):
        models.build(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("in_channels", 0),
        ("in_channels", True),
        ("num_classes", -1),
        ("num_classes", "10"),
        ("image_size", 3),
        ("image_size", 28.0),
        ("image_size", 10**9),
    ],
)
def test_bad_argument_is_named(name: str, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        models.build(name, **{argument: value})


@pytest.mark.parametrize(("name", "smallest"), [("lenet5", 8), ("lenet5_caffe", 16), ("vgg7", 8), ("airbench", 9)])
def test_too_small_an_image(name: str, smallest: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be an integer from {smallest}"):
        models.build(name, image_size=smallest - 1)


@pytest.mark.parametrize(
    ("argument", "value"), [("depth", 4), ("depth", 41), ("depth", 10**9), ("growth_rate", 0), ("growth_rate", 1.5)]
)
def test_bad_densenet_argument_is_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        models.build("densenet", **{argument: value})


def test_unknown_argument_is_named() -> None:
    with pytest.raises(ValueError, match="vgg7 has no argument 'depth'; its arguments are in_channels"):
        models.build("vgg7", {"depth": 3})
