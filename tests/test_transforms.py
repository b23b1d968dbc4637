"""torch.compile as one graph and torch.func on layers in training, in evaluation and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

import bqnn
from bqnn.bayes.estimator import ESTIMATORS
from bqnn.core.check import PRECISIONS

X = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> None:
    torch.compiler.reset()


def make_net(estimator: str = "moment", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)
    return bqnn.convert(nn.Sequential(*layers), 3, estimator=estimator, **options)


def networks() -> list[Any]:
    cases = [
        pytest.param((estimator, training), id=f"{estimator}-{'train' if training else 'eval'}")
        for estimator in ESTIMATORS
        for training in (True, False)
    ]
    return [*cases, pytest.param(("packed", False), id="packed")]


def build(case: tuple[str, bool]) -> nn.Module:
    kind, training = case
    return bqnn.pack(make_net()) if kind == "packed" else make_net(kind).train(training)


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def gradients(net: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """By loss.backward(), of the sum of squares of the outputs, after torch.manual_seed(3)."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters(net).items()}
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    functional_call(net, leaves, (x,)).square().sum().backward()
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return {name: zeros[name] if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}, x.grad


@pytest.mark.parametrize("case", networks())
def test_gradients_are_those_of_backward(case: tuple[str, bool]) -> None:
    net = build(case)
    by_parameters, by_x = gradients(net, X)

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, tensors, (x,)).square().sum()

    torch.manual_seed(3)
    found = grad(loss, argnums=(0, 1))(parameters(net), X)
    torch.testing.assert_close(found[1], by_x)
    for name, gradient in by_parameters.items():
        torch.testing.assert_close(found[0][name], gradient)


@pytest.mark.parametrize("case", networks())
def test_per_sample_gradients(case: tuple[str, bool]) -> None:
    net = build(case)

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, tensors, (x[None],)).square().sum()

    torch.manual_seed(3)
    by_parameters, by_x = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0), randomness="same")(parameters(net), X)
    for i in range(len(X)):
        expected = gradients(net, X[i : i + 1])
        torch.testing.assert_close(by_x[i], expected[1][0])
        for name, gradient in expected[0].items():
            torch.testing.assert_close(by_parameters[name][i], gradient)


@pytest.mark.parametrize("case", networks())
def test_vmap_draws_as_its_randomness_says(case: tuple[str, bool]) -> None:
    net = build(case)
    images = X[:1, None].expand(3, 1, 2, 5, 5)
    different = vmap(net, randomness="different")(images)
    torch.manual_seed(3)
    same = vmap(net, randomness="same")(images)
    torch.manual_seed(3)
    torch.testing.assert_close(same, net(X[:1]).expand(3, 1, 3))
    random = case[1] and case[0] != "deterministic"
    assert torch.allclose(different[0], different[1]) != random
    if random:
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(net)(images)


@pytest.mark.parametrize("case", networks())
def test_jacobians(case: tuple[str, bool]) -> None:
    net, rows = build(case), []
    for i in range(3):
        x = X[:1].clone().requires_grad_()
        torch.manual_seed(3)
        rows.append(torch.autograd.grad(net(x)[0, i], x)[0][0])
    torch.manual_seed(3)
    torch.testing.assert_close(jacrev(net)(X[:1])[0, :, 0], torch.stack(rows))
    torch.manual_seed(3)
    batched = torch.autograd.functional.jacobian(net, X[:1], vectorize=True)
    torch.testing.assert_close(batched[0, :, 0], torch.stack(rows))


@pytest.mark.parametrize("case", [case for case in networks() if case.values[0][1] or case.values[0][0] == "packed"])
def test_forward_mode_says_that_there_is_none(case: tuple[str, bool]) -> None:
    with pytest.raises(NotImplementedError, match="jvp"):
        jacfwd(build(case), randomness="same")(X[:1])
    if case[1]:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            build(case)(forward_ad.make_dual(X, torch.ones_like(X)))


def test_ensembles() -> None:
    nets = [make_net() for _ in range(2)]
    with torch.no_grad():
        nets[1][0].weight.add_(0.1)
    stacked = {name: torch.stack([dict(net.named_parameters())[name] for net in nets]) for name in parameters(nets[0])}
    torch.manual_seed(3)
    found = vmap(lambda tensors: functional_call(nets[0], tensors, (X,)), randomness="same")(stacked)
    for i, net in enumerate(nets):
        torch.manual_seed(3)
        torch.testing.assert_close(found[i], net(X))


def test_divergences_have_gradients_and_no_second_ones() -> None:
    layer = make_net()[3]
    tensors = parameters(layer)

    def divergence(log_sigma2: Tensor) -> Tensor:
        levels, _, tau = layer._codebook()
        return bqnn.ops.spike_slab_kl(layer.mean.detach(), log_sigma2, levels.detach(), tau)

    layer.kl_divergence().backward()
    torch.testing.assert_close(grad(divergence)(tensors["log_sigma2"]), layer.log_sigma2.grad)
    with pytest.raises(NotImplementedError, match="spike_slab_kl_backward has no gradient"):
        grad(lambda tensor: grad(divergence)(tensor).sum())(tensors["log_sigma2"])


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_compiles_as_one_graph(estimator: str, partition: str) -> None:
    net = make_net(estimator, partition=partition)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    results = []
    for run in (net, compiled):
        net.zero_grad()
        torch.manual_seed(3)
        y = run(X)
        (y.square().sum() + bqnn.kl_divergence(net)).backward()
        results.append([y, *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager)
    net.eval()
    torch.testing.assert_close(compiled(X), net(X))
    with bqnn.sampling(net):
        assert torch.equal(compiled(X), compiled(X)) == (estimator == "deterministic")
    torch.testing.assert_close(compiled(X), net(X))


@pytest.mark.parametrize("execution", ["auto", "packed", "dense"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_networks_compile_as_one_graph_with_gradients(precision: str, execution: str) -> None:
    net = bqnn.pack(make_net(), precision, execution)
    compiled, results = torch.compile(net, backend="aot_eager", fullgraph=True), []
    for run in (net, compiled):
        x = X.clone().requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0])


SHAPES = [(1, 16, 5, 6), (2, 1, 5, 6), (1, 1, 5, 6), (3, 4, 1, 6), (1, 4, 1, 1), (2, 3, 4, 5), (0, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("execution", ["packed", "dense"])
def test_strides_of_a_convolution_are_those_that_its_fake_says(execution: str, shape: tuple[int, ...]) -> None:
    batch, channels, height, width = shape
    pixels = torch.randn(4 * batch + 1, height, width, channels)
    images = [
        pixels[:batch].permute(0, 3, 1, 2),
        pixels[::4][:batch].permute(0, 3, 1, 2),
        torch.randn(batch, height, width, channels + 3)[..., 1:-2].permute(0, 3, 1, 2),
        torch.randn(shape),
        torch.randn(batch, channels, height, 2 * width)[..., ::2],
        torch.randn(1, channels, height, width).expand(batch, -1, -1, -1),
    ]
    if batch == 1:
        images.append(pixels[0].permute(2, 0, 1)[None])  # of a camera
    net = bqnn.pack(bqnn.convert(nn.Conv2d(channels, 6, 3, padding=1)), execution=execution)
    geometry = [3, 3], [1, 1], [1, 1], [1, 1], 1
    for x in images:
        fake = torch.empty_strided(x.shape, x.stride(), device="meta")
        said = torch.ops.bqnn.packed_conv2d(fake, net.codes.to("meta"), net.levels.to("meta"), None, *geometry, "fp32")
        for y in (net(x), net(x)):  # the second is a direct call
            ambiguous = [size == 1 or batch == 0 for size in y.shape]
            strides = zip(ambiguous, y.stride(), said.stride(), strict=True)
            assert all(any_stride or own == other for any_stride, own, other in strides), x.stride()
