"""The parameters of a Bayes layer: arguments, codebook, divergence, checks and state dicts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn import BayesConv2d, BayesLinear
from bqnn.core import codebook
from bqnn.core.codebook import lloyd_max
from bqnn.ops import spike_slab_kl
from tests.support import formulas
from tests.support.shapes import EVERY_M, GRANULARITIES


def make(kind: str, **options: Any) -> BayesLinear | BayesConv2d:
    torch.manual_seed(0)
    if kind == "linear":
        return BayesLinear(13, 7, **options)
    return BayesConv2d(4, 6, (3, 2), groups=2, **options)


KINDS = ["linear", "conv2d"]


@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_codebook_starts_from_the_weights(kind: str, granularity: str, num_levels: int) -> None:
    layer = make(kind, num_levels=num_levels, granularity=granularity)
    groups = layer.mean.shape[0] if granularity == "channel" else 1
    levels = lloyd_max(layer.mean.detach().reshape(groups, -1), num_levels)
    torch.testing.assert_close(layer.levels, levels)
    torch.testing.assert_close(layer.thresholds, 0.5 * (levels[:, 1:] + levels[:, :-1]))
    steps = torch.diff(levels, dim=1)
    sigma = 0.1 * steps.amin(1).view(-1, *[1] * (layer.mean.dim() - 1)).expand_as(layer.mean)
    torch.testing.assert_close((0.5 * layer.log_sigma2).exp(), sigma)
    codes = layer.codes()
    assert codes.dtype == torch.uint8 and codes.shape == layer.mean.shape
    assert torch.equal(codes.long(), formulas.codes_of(layer.mean, layer.thresholds))
    distance = (layer.mean.flatten(1).unsqueeze(-1) - layer.levels.unsqueeze(1)).abs().amin(-1)
    quantized = layer.quantized_weight()
    assert not quantized.requires_grad
    torch.testing.assert_close((layer.mean - quantized).abs().flatten(1), distance, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"num_levels": 1}, ValueError, "num_levels must be from 2 to 16, got 1", id="M1"),
        pytest.param({"num_levels": 17}, ValueError, "num_levels must be from 2 to 16, got 17", id="M17"),
        pytest.param({"num_levels": True}, TypeError, "num_levels must be an int, got bool", id="M-bool"),
        pytest.param({"num_levels": 3.0}, TypeError, "num_levels must be an int, got float", id="M-float"),
        pytest.param(
            {"granularity": "row"}, ValueError, "granularity must be one of tensor, channel, got 'row'", id="row"
        ),
        pytest.param(
            {"partition": "even"}, ValueError, "partition must be one of nearest, learned, got 'even'", id="even"
        ),
        pytest.param({"estimator": None}, ValueError, "estimator must be one of moment, .*got None", id="estimator"),
        pytest.param(
            {"prior": "laplace"}, ValueError, "prior must be one of spike_slab, gaussian.*laplace", id="prior"
        ),
        pytest.param({"spike_width": 0.0}, ValueError, "spike_width must be from 0.001 .* got 0", id="spike-width"),
        pytest.param({"slab_share": "all"}, TypeError, "slab_share must be a number, got str", id="slab-share"),
        pytest.param({"start_sigma": -0.1}, ValueError, "start_sigma must be from 0.001 to 10, got -0.1", id="sigma"),
        pytest.param({"padding_mode": "zero"}, (ValueError, TypeError), "padding_mode", id="padding-mode"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        pytest.param(
            "linear", torch.zeros(2, 12), ValueError, r"x must have the shape .*13\], got \[2, 12\]", id="linear"
        ),
        pytest.param(
            "linear", torch.zeros(2, 13).long(), TypeError, "x must be floating point.*int64", id="linear-int"
        ),
        pytest.param("linear", [[0.0] * 13], TypeError, "x must be a tensor, got list", id="linear-list"),
        pytest.param(
            "conv2d", torch.zeros(2, 3, 9, 9), ValueError, r"x must have .*4, .*\[2, 3, 9, 9\]", id="channels"
        ),
        pytest.param("conv2d", torch.zeros(9, 9), ValueError, r"x must have the shape .*\[9, 9\]", id="matrix"),
        pytest.param("conv2d", torch.zeros(3, 9, 9), ValueError, "x must have the shape", id="unbatched-channels"),
        pytest.param("conv2d", torch.zeros(1, 1, 4, 9, 9), ValueError, "x must have the shape", id="volume"),
        pytest.param("conv2d", torch.zeros(2, 4, 9, 9).int(), TypeError, "x must be floating point", id="conv2d-int"),
    ],
)
def test_bad_input(kind: str, x: Any, error: type[Exception], message: str, training: bool) -> None:
    with pytest.raises(error, match=message):
        make(kind).train(training)(x)


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_own_state_dict_round_trip(kind: str, granularity: str, partition: str) -> None:
    options = {"num_levels": 5, "granularity": granularity, "partition": partition}
    layer = make(kind, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.manual_seed(9)
    other = type(layer)(*((13, 7) if kind == "linear" else (4, 6, (3, 2), 1, 0, 1, 2)), **options)
    result = other.load_state_dict(layer.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert list(other.state_dict()) == list(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(other.levels, layer.levels) and torch.equal(other.thresholds, layer.thresholds)
    assert torch.equal(other.quantized_weight(), layer.quantized_weight())
    assert torch.equal(other.kl_divergence(), layer.kl_divergence())


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("nested", [False, True], ids=["layer", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_of_a_plain_layer_loads_and_fits_the_codebook(kind: str, nested: bool, partition: str) -> None:
    layer = make(kind, partition=partition)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3)
    torch.manual_seed(5)
    plain: nn.Module = nn.Linear(13, 7) if kind == "linear" else nn.Conv2d(4, 6, (3, 2), groups=2)
    with torch.no_grad():
        plain.weight.mul_(3.0)
    state = plain.state_dict()
    keys = list(state)
    if nested:
        nn.Sequential(nn.ReLU(), layer).load_state_dict(nn.Sequential(nn.ReLU(), plain).state_dict(), strict=True)
    else:
        layer.load_state_dict(state, strict=True)
    assert list(state) == keys
    assert torch.equal(layer.mean, plain.weight) and torch.equal(layer.bias, plain.bias)
    levels = lloyd_max(plain.weight.detach().reshape(1, -1), 3)
    torch.testing.assert_close(layer.levels, levels)
    torch.testing.assert_close(layer.thresholds, 0.5 * (levels[:, 1:] + levels[:, :-1]))
    assert layer.prior_sigma2.item() == pytest.approx(plain.weight.square().mean().item())
    assert layer.mean.requires_grad and layer.log_sigma2.requires_grad and layer.mean.is_leaf


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param({"weight": torch.zeros(7, 12), "bias": torch.zeros(7)}, "size mismatch for weight", id="shape"),
        pytest.param({"bias": torch.zeros(7)}, "Missing key.*weight", id="no-weight"),
        pytest.param({"weight": torch.randn(7, 13)}, "Missing key.*bias", id="no-bias"),
        pytest.param({"weight": torch.randn(7, 13), "log_sigma2": torch.zeros(7, 13)}, "raw_levels", id="half"),
        pytest.param(
            {"weight": torch.randn(7, 13), "bias": torch.zeros(7), "extra": torch.zeros(1)},
            "Unexpected.*extra",
            id="extra",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
        make("linear").load_state_dict(state)


def test_a_state_dict_of_another_codebook() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for raw_levels"):
        make("linear", num_levels=4).load_state_dict(make("linear", num_levels=3).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*raw_thresholds"):
        make("linear").load_state_dict(make("linear", partition="learned").state_dict())


@pytest.mark.parametrize("value", [-1e4, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_levels_stay_in_order_under_huge_parameters(granularity: str, partition: str, value: float) -> None:
    layer = make("linear", num_levels=4, granularity=granularity, partition=partition)
    with torch.no_grad():
        layer.raw_levels.fill_(value)
        if partition == "learned":
            layer.raw_thresholds.copy_(value * torch.tensor([-1.0, 0.0, 1.0]).expand_as(layer.raw_thresholds))
    levels, thresholds = layer.levels, layer.thresholds
    assert torch.isfinite(levels).all() and torch.isfinite(thresholds).all()
    assert (torch.diff(levels, dim=1) > 0.0).all(), levels
    assert (thresholds >= levels[:, :-1]).all() and (thresholds <= levels[:, 1:]).all()
    loss = layer(torch.ones(2, 13)).sum() + layer.kl_divergence()
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_set_levels(granularity: str) -> None:
    layer = make("conv2d", num_levels=3, granularity=granularity, partition="learned")
    groups = layer.levels.shape[0]
    levels = torch.tensor([[-0.2, 0.0, 0.3]]) + 0.1 * torch.arange(groups).view(-1, 1)
    thresholds = torch.tensor([[-0.05, 0.25]]) + 0.1 * torch.arange(groups).view(-1, 1)
    layer.set_levels_(levels, thresholds)
    torch.testing.assert_close(layer.levels, levels)
    torch.testing.assert_close(layer.thresholds, thresholds)
    torch.testing.assert_close(layer.log_sigma2, torch.full_like(layer.log_sigma2, 0.02).log().mul(2.0))
    layer.set_levels_(levels.double() * 2.0)
    torch.testing.assert_close(layer.levels, levels * 2.0)
    torch.testing.assert_close(layer.thresholds, levels[:, 1:] + levels[:, :-1])


@pytest.mark.parametrize("levels", [[-0.2, 0.0, 0.2], [0.0, 0.1, 0.3], [-0.7, -0.1, 0.0]], ids=str)
def test_the_slab_is_centred_at_a_level_set_to_zero(levels: list[float]) -> None:
    """Whatever raw parameters round it to."""
    layer = make("linear")
    exact = torch.tensor([levels])
    layer.set_levels_(exact)
    assert abs(layer.levels[0, levels.index(0.0)].item()) <= 1e-7
    divergence = spike_slab_kl(layer.mean, layer.log_sigma2, exact, codebook.TAU_PER_GAP * codebook.gaps(exact))
    torch.testing.assert_close(layer.kl_divergence(), divergence, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("levels", "thresholds", "error", "message"),
    [
        pytest.param([[0.0, 1.0]], None, ValueError, r"levels must have the shape \[1, 3\], got \[1, 2\]", id="count"),
        pytest.param([0.0, 1.0, 2.0], None, ValueError, r"levels must have the shape \[1, 3\], got \[3\]", id="vector"),
        pytest.param([[0.0, 2.0, 1.0]], None, ValueError, "levels must be finite and strictly increasing", id="order"),
        pytest.param([[0.0, 1.0, 1.0]], None, ValueError, "levels must be finite and strictly increasing", id="equal"),
        pytest.param([[0.0, 1.0, torch.nan]], None, ValueError, "levels must be finite", id="nan"),
        pytest.param([[-torch.inf, 0.0, 1.0]], None, ValueError, "levels must be finite", id="inf"),
        pytest.param([[0, 1, 2]], None, TypeError, "levels must be floating point, got torch.int64", id="int"),
        pytest.param(
            [[0.0, 1.0, 2.0]], [[0.5]], ValueError, r"thresholds must have .*\[1, 2\], got \[1, 1\]", id="cuts"
        ),
        pytest.param([[0.0, 1.0, 2.0]], [[0.5, 0.9]], ValueError, "thresholds must lie between", id="cut-below"),
        pytest.param([[0.0, 1.0, 2.0]], [[0.0, 1.5]], ValueError, "thresholds must lie between", id="cut-on-level"),
        pytest.param([[0.0, 1.0, 2.0]], [[torch.nan, 1.5]], ValueError, "thresholds must lie between", id="cut-nan"),
    ],
)
def test_set_levels_refuses(levels: Any, thresholds: Any, error: type[Exception], message: str) -> None:
    layer = make("linear", partition="learned")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(error, match=message):
        layer.set_levels_(torch.tensor(levels), None if thresholds is None else torch.tensor(thresholds))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items()), "it changed the layer"


def test_set_levels_refuses_levels_that_are_one_in_the_layers_precision() -> None:
    layer = make("linear")
    with pytest.raises(ValueError, match="levels must be finite and strictly increasing"):
        layer.set_levels_(torch.tensor([[-1.0, 1.0, 1.0 + 1e-12]], dtype=torch.float64))


def test_set_levels_refuses_what_is_no_tensor_and_thresholds_of_a_nearest_partition() -> None:
    layer = make("linear")
    with pytest.raises(TypeError, match="levels must be a tensor, got list"):
        layer.set_levels_([[0.0, 1.0, 2.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='only with partition="learned"'):
        layer.set_levels_(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 1.5]]))


@pytest.mark.parametrize("name", ["weight", "bias", "log_sigma2", "raw_levels", "raw_thresholds"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_parameters_that_are_not_finite_are_named(name: str, value: float) -> None:
    layer = make("conv2d", partition="learned")
    layer.check_parameters()
    with torch.no_grad():
        getattr(layer, name).view(-1)[-1] = value
    for check in (layer.check_parameters, layer.codes):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            check()


@pytest.mark.parametrize(("value", "shown"), [(-41.0, "-41"), (10.5, "10.5")])
def test_log_sigma2_out_of_range(value: float, shown: str) -> None:
    layer = make("linear")
    with torch.no_grad():
        layer.log_sigma2[3, 4] = value
    with pytest.raises(ValueError, match=rf"log_sigma2 must be from -40.* to 10.*, got .*{shown}"):
        layer.check_parameters()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_with_few_values_gets_a_codebook(kind: str, granularity: str) -> None:
    """A constant weight, as of an averaging filter, or more levels than weights a channel."""
    layer = make(kind, num_levels=16, granularity=granularity)
    for value in (1.0, 0.0, -0.4196):
        state = {"weight": torch.full_like(layer.mean, value), "bias": torch.zeros(layer.mean.shape[0])}
        layer.load_state_dict(state)
        assert (torch.diff(layer.levels, dim=1) > 0.0).all()
        layer.check_parameters()


def test_one_weight_a_channel() -> None:
    layer = BayesLinear(1, 8, granularity="channel")
    assert (torch.diff(layer.levels, dim=1) > 0.0).all()
    assert torch.isfinite(layer(torch.ones(3, 1))).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_spike_and_slab_divergence_has_windows_in_proportion_to_the_gaps(granularity: str) -> None:
    layer = make("conv2d", num_levels=4, granularity=granularity)
    levels = layer.levels.detach()
    steps = torch.diff(levels, dim=1)
    gaps = torch.stack([torch.cat([steps[:, :1], steps], 1), torch.cat([steps, steps[:, -1:]], 1)]).amin(0)
    expected = formulas.spike_slab_kl(layer.mean, layer.log_sigma2, levels, 0.375 * gaps)
    assert layer.kl_divergence().item() == pytest.approx(expected, rel=1e-4)


def test_the_gaussian_divergence_is_exact() -> None:
    layer = make("conv2d", prior="gaussian")
    with torch.no_grad():
        layer.log_sigma2.uniform_(-6.0, 1.0)
    spread = layer.mean.detach().square().mean().sqrt()
    posterior = torch.distributions.Normal(layer.mean, (0.5 * layer.log_sigma2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, spread)).sum()
    torch.testing.assert_close(layer.kl_divergence(), expected, rtol=1e-5, atol=1e-3)


def test_the_deterministic_layer_has_no_divergence() -> None:
    kl = make("linear", estimator="deterministic").kl_divergence()
    assert kl.shape == () and kl.item() == 0.0


def test_the_meta_device() -> None:
    with torch.device("meta"):
        layer = BayesLinear(13, 7, granularity="channel", partition="learned")
    assert layer.levels.shape == (7, 3) and layer.levels.device.type == "meta"
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(make("linear", granularity="channel", partition="learned").state_dict())
    layer.check_parameters()


def test_what_is_not_the_default_is_shown() -> None:
    shown = repr(make("conv2d", num_levels=5, granularity="channel", prior="gaussian"))
    assert shown == (
        "BayesConv2d(4, 6, kernel_size=(3, 2), stride=(1, 1), groups=2, num_levels=5, estimator='moment',"
        " granularity='channel', prior='gaussian')"
    )
    assert "partition='learned'" in repr(make("linear", partition="learned"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_mixture_has_the_numbers_of_the_layer(granularity: str) -> None:
    options = {"prior": "mixture", "spike_width": 0.4, "slab_share": 0.3, "start_sigma": 0.2}
    layer = make("conv2d", num_levels=4, granularity=granularity, **options)
    levels = layer.levels.detach()
    narrowest = torch.diff(levels, dim=1).amin(1).view(-1, 1, 1, 1)
    torch.testing.assert_close((0.5 * layer.log_sigma2).exp(), (0.2 * narrowest).expand_as(layer.mean))
    slab = layer.mean.detach().square().mean().item()
    expected = formulas.mixture_kl(layer.mean, layer.log_sigma2, levels, slab, 0.4, 0.3)
    assert layer.kl_divergence().item() == pytest.approx(expected, rel=1e-4)
    assert "prior='mixture', spike_width=0.4, slab_share=0.3, start_sigma=0.2" in repr(layer)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_means_are_bounded_by_a_gap_beyond_the_levels(kind: str, granularity: str) -> None:
    layer = make(kind, num_levels=3, granularity=granularity, prior="mixture")
    levels = layer.levels.detach()
    gap = torch.diff(levels, dim=1).amin(1)
    low, high = levels[:, 0] - gap, levels[:, 2] + gap
    with torch.no_grad():
        rows = layer.mean.flatten(1)
        rows[:, 0], rows[:, 1] = low - 1.0, high + 2.0
        kept = rows[:, 2:].clone()
    layer.bound_means_()
    rows = layer.mean.detach().flatten(1)
    torch.testing.assert_close(rows[:, 0], low.expand(len(rows)))
    torch.testing.assert_close(rows[:, 1], high.expand(len(rows)))
    inside = (kept >= low.view(-1, 1)) & (kept <= high.view(-1, 1))
    assert inside.any() and torch.equal(rows[:, 2:][inside], kept[inside])
