"""BayesLinear and BayesConv2d in use: the quantized network of evaluation, training steps, sampling and precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn import BayesConv2d, BayesLinear, sampling
from bqnn.core.geometry import convolved
from tests.support.shapes import GRANULARITIES, SOME_M

ESTIMATORS = ["moment", "sample", "local", "local-quantized", "deterministic"]
CONV_ARGUMENTS = [
    pytest.param({}, id="defaults"),
    pytest.param({"bias": False}, id="no-bias"),
    pytest.param({"stride": 2}, id="stride"),
    pytest.param({"stride": (1, 3)}, id="strides"),
    pytest.param({"padding": 2}, id="padding"),
    pytest.param({"padding": (2, 1), "dilation": (2, 1)}, id="paddings-dilations"),
    pytest.param({"padding": "same"}, id="same"),
    pytest.param({"padding": "same", "kernel_size": (2, 4)}, id="same-even-kernel"),
    pytest.param({"padding": "same", "dilation": (1, 2), "kernel_size": (4, 3)}, id="same-dilation"),
    pytest.param({"padding": "valid"}, id="valid"),
    *(
        pytest.param({"padding": padding, "padding_mode": mode, "kernel_size": kernel}, id=f"{mode}-{padding}-{kernel}")
        for mode in ("reflect", "replicate", "circular")
        for padding, kernel in (((2, 1), 3), ("same", (2, 3)), ("valid", 3))
    ),
    pytest.param({"groups": 2}, id="groups"),
    pytest.param({"groups": 4, "out_channels": 4}, id="depthwise"),
    pytest.param({"dtype": torch.float64}, id="float64"),
    pytest.param({"kernel_size": 1, "bias": False}, id="one-pixel"),
]


def options_of(estimator: str) -> dict[str, Any]:
    return {"estimator": estimator.removesuffix("-quantized"), "quantize_mean": estimator.endswith("-quantized")}


def randn(*shape: int, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_net(estimator: str = "moment", **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    options = {**options_of(estimator), **options}
    conv = BayesConv2d(2, 4, 3, padding=1, **options)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), BayesLinear(36, 5, **options))


X, Y = randn(6, 2, 3, 3), torch.tensor([0, 1, 2, 3, 4, 0])


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = bqnn.elbo(net(X), Y, net, dataset_size=20).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def plain_twin(layer: BayesLinear | BayesConv2d, arguments: dict[str, Any]) -> nn.Module:
    """nn.Linear or nn.Conv2d with the weight Q(mu)."""
    kind = nn.Linear if isinstance(layer, BayesLinear) else nn.Conv2d
    twin = kind(**arguments)
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    with torch.no_grad():
        codes = (layer.mean.flatten(1).unsqueeze(-1) > layer.thresholds.unsqueeze(1)).sum(-1)
        rows = layer.levels.expand(codes.shape[0], -1)
        twin.weight.copy_(rows.gather(1, codes).view(layer.mean.shape))
    return twin


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("changes", CONV_ARGUMENTS)
def test_conv2d_evaluates_as_nn_conv2d_with_the_quantized_weight(changes: dict[str, Any], granularity: str) -> None:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | changes
    layer = BayesConv2d(**arguments, granularity=granularity).eval()
    twin = plain_twin(layer, arguments)
    x = randn(3, 4, 9, 7, dtype=arguments.get("dtype"))
    assert torch.equal(layer.quantized_weight(), twin.weight)
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer(x[0]), twin(x[0]))
    channels_last = x.to(memory_format=torch.channels_last)
    if layer.padding == "valid":
        # Of no pixel to pad the layer makes no copy. nn.Conv2d makes one, a circular one in row-major order, whose
        # convolution adds up in another order.
        twin.padding_mode = "zeros"
    assert torch.equal(layer(channels_last), twin(channels_last))
    assert layer(x[:0]).shape == twin(x[:0]).shape


@pytest.mark.parametrize("changes", CONV_ARGUMENTS)
def test_conv2d_trains_with_the_geometry_of_nn_conv2d(changes: dict[str, Any]) -> None:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | changes
    layer = BayesConv2d(**arguments, estimator="deterministic")
    twin = plain_twin(layer, arguments)
    x = randn(3, 4, 9, 7, dtype=arguments.get("dtype")).requires_grad_()
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x[0]), expected[0])
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"dtype": torch.float64}], ids=["bias", "no-bias", "float64"])
def test_linear_is_nn_linear_with_the_quantized_weight(changes: dict[str, Any], granularity: str) -> None:
    arguments = {"in_features": 13, "out_features": 7} | changes
    layer = BayesLinear(**arguments, granularity=granularity, estimator="deterministic")
    twin = plain_twin(layer, arguments)
    for leading in ((), (5,), (2, 3), (0,)):
        x = randn(*leading, 13, dtype=arguments.get("dtype"))
        torch.testing.assert_close(layer.train()(x), twin(x))
        assert torch.equal(layer.eval()(x), twin(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("prior", ["spike_slab", "gaussian", "mixture"])
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_changes_what_it_should(
    estimator: str, num_levels: int, prior: str, partition: str, granularity: str
) -> None:
    net = make_net(estimator, num_levels=num_levels, prior=prior, partition=partition, granularity=granularity)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    step(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("log_sigma2"):
            learns = estimator != "deterministic"
        elif name.endswith("raw_levels"):
            learns = estimator != "local" or prior != "gaussian"
        elif name.endswith("raw_thresholds"):
            learns = estimator == "moment"
        else:
            learns = True
        assert torch.equal(parameter, before[name]) != learns, name
    for layer in (net[0], net[3]):
        assert (torch.diff(layer.levels, dim=1) > 0.0).all()
        layer.check_parameters()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_learned_thresholds_have_a_gradient(granularity: str) -> None:
    net = make_net(partition="learned", granularity=granularity, num_levels=4)
    bqnn.elbo(net(X), Y, net, dataset_size=20).nll.backward()
    for layer in (net[0], net[3]):
        gradient = layer.raw_thresholds.grad
        assert gradient.shape == layer.thresholds.shape
        assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_manual_seed_governs_a_training_run(estimator: str) -> None:
    def losses(seed: int) -> list[float]:
        net = make_net(estimator)
        optimizer = torch.optim.SGD(bqnn.parameter_groups(net, 0.1))
        torch.manual_seed(seed)
        return [step(net, optimizer) for _ in range(3)]

    first = losses(5)
    assert losses(5) == first
    assert (losses(6) == first) == (estimator == "deterministic")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampling_draws_in_evaluation_mode_and_ends(estimator: str) -> None:
    net = make_net(estimator).eval()
    quantized = net(X)
    assert torch.equal(net(X), quantized)
    with sampling(net):
        draws = torch.stack([net(X) for _ in range(2)])
        assert not net.training
        with sampling(net[0]):
            pass
        assert net[0].sampling, "the inner context ends the outer one's sampling"
    assert torch.equal(draws[0], draws[1]) == (estimator == "deterministic")
    assert torch.equal(net(X), quantized)
    with pytest.raises(KeyError), sampling(net):
        raise KeyError
    assert torch.equal(net(X), quantized)


def test_sampling_of_local_is_around_the_quantized_network() -> None:
    layer = BayesLinear(13, 7, estimator="local").eval()
    with torch.no_grad():
        layer.log_sigma2.fill_(-30.0)
    x = randn(5, 13)
    quantized = layer(x)
    with sampling(layer):
        torch.testing.assert_close(layer(x), quantized, rtol=0.0, atol=1e-4)
    layer.train()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.mean, layer.bias), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training: bool, estimator: str) -> None:
    net = make_net(estimator).train(training)
    torch.manual_seed(1)
    expected = net(X)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(X)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    if training:
        bqnn.elbo(y.float(), Y, net, 20).loss.backward()
        gradients = {name: leaf.grad for name, leaf in net.named_parameters() if leaf.grad is not None}
        assert {"0.weight", "3.weight"} <= set(gradients)
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype, bias: bool, training: bool) -> None:
    for layer, x in ((BayesLinear(4, 3, bias=bias), randn(2, 4)), (BayesConv2d(4, 3, 1, bias=bias), randn(2, 4, 3, 3))):
        assert layer.train(training)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_layers_of_another_dtype_train(dtype: torch.dtype) -> None:
    net = make_net(dtype=dtype)
    output = net(X.to(dtype))
    assert output.dtype == dtype
    bqnn.elbo(output, Y, net, 20).loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.dtype == dtype
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_deepcopy(estimator: str) -> None:
    net = make_net(estimator, partition="learned")
    step(net, torch.optim.SGD(net.parameters(), lr=0.1))
    twin = copy.deepcopy(net)
    results = []
    for candidate in (net, twin):
        torch.manual_seed(3)
        results.append(candidate(X))
    assert torch.equal(*results)
    with torch.no_grad():
        twin[0].weight.add_(1.0)
    assert not torch.equal(twin[0].weight, net[0].weight)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles(estimator: str, training: bool) -> None:
    net = make_net(estimator, partition="learned").train(training)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    results = []
    for candidate in (net, compiled):
        net.zero_grad()
        torch.manual_seed(3)
        y = candidate(X)
        if training:
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    assert not training or len(results[0]) > 4
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", ((1, 3), (2, 2)))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_a_single_column_in_bfloat16(stride: tuple[int, int], memory_format: torch.memory_format) -> None:
    """With AMX, torch's own convolution makes noise of it."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 9, 7), torch.randn(17, 4, 2, 3)
    x, weight = x.bfloat16().contiguous(memory_format=memory_format), weight.bfloat16()
    y = convolved(x, weight, None, stride, (0, 0), (2, 3), 1)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, 0, (2, 3))
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() <= 0.01 * expected.norm()
