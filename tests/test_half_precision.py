"""Half precision and autocast: every public function on networks and inputs of every dtype, against float64.

A network of half precision is compared with the float64 network that has the same parameters, on the same inputs: what
is left is the rounding of products and outputs, and nothing that is made of them may be infinite or of 8 bits.
"""

from __future__ import annotations

import contextlib
import copy
import math
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.bayes.estimator import ESTIMATORS
from bqnn.bayes.layers import bayes_layers
from bqnn.bayes.options import PRIORS
from bqnn.core.check import PRECISIONS
from bqnn.ops import moment_linear, sample_linear
from tests.support import formulas

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
Y = torch.tensor([0, 2, 1, 3, 4, 2, 0])
SIZES = [1e-4, 0.02, 1.0]  # the deviations of weights

# How a network and its inputs come in: their dtype, and that of autocast if it is on.
SETTINGS = [
    *(pytest.param(dtype, None, id=str(dtype)[6:]) for dtype in DTYPES),
    *(pytest.param(torch.float32, dtype, id=f"autocast-{str(dtype)[6:]}") for dtype in HALVES),
    pytest.param(torch.float64, torch.bfloat16, id="float64-in-autocast"),
]


def make_net(dtype: torch.dtype, size: float = 0.1, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    for layer in (net[0], net[4]):
        nn.init.normal_(layer.weight, std=size)
    return bqnn.convert(net.to(dtype), 3, **options)


def inputs(dtype: torch.dtype, count: int = 7) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def computed_in(dtype: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """What nn.Linear computes, and returns, in."""
    return dtype if cast is None or dtype == torch.float64 else cast


def exactly(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype, roundings: float = 8.0) -> None:
    """Finite, and off by so many roundings of the largest in ``dtype``."""
    assert found.isfinite().all() and exact.isfinite().all()
    allowed = roundings * max(torch.finfo(dtype).eps, 1e-12)
    assert (found.double() - exact.double()).abs().max() <= allowed * exact.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize(("dtype", "cast"), SETTINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["train", "eval", "sampling"])
def test_forward_and_gradients(mode: str, estimator: str, dtype: torch.dtype, cast: torch.dtype | None) -> None:
    net, results = make_net(dtype, estimator=estimator), []
    used = computed_in(dtype, cast)
    for each, kind in ((net, cast), (exactly(net), None)):
        each.train(mode == "train")
        x = inputs(dtype).to(each[0].weight.dtype).requires_grad_()
        torch.manual_seed(3)
        with autocast(kind), bqnn.sampling(each) if mode == "sampling" else contextlib.nullcontext():
            hidden = each[0](x)
            output = each[4](hidden.flatten(1))
        (hidden.double().square().mean() + output.double().square().mean()).backward()
        results.append((hidden, output, x.grad, *(p.grad for p in each.parameters() if p.grad is not None)))
    assert results[0][0].dtype == results[0][1].dtype == used
    # A coarse variance has 8 bits, and the square root of it is multiplied by noise of up to 4 deviations.
    noisy = mode != "eval" and estimator in ("moment", "local")
    within = torch.bfloat16 if noisy else used
    for found, exact in zip(results[0], results[1], strict=True):
        assert_near(found.detach(), exact.detach(), within, 32.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("size", SIZES)
def test_divergence_and_objective(size: float, granularity: str, prior: str, dtype: torch.dtype) -> None:
    net = make_net(dtype, size, prior=prior, granularity=granularity)
    exact, x = exactly(net), inputs(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    value, right = bqnn.kl_divergence(net), bqnn.kl_divergence(exact)
    assert value.dtype == wide and value.item() == pytest.approx(right.item(), rel=1e-4)
    value.backward()
    right.backward()
    limit = torch.finfo(dtype).max
    for name, parameter in net.named_parameters():
        by_exact = dict(exact.named_parameters())[name].grad
        if by_exact is not None:
            # Where the divergence is steepest, at a weight on its level, the gradient is of the weight's last bit.
            assert parameter.grad.isfinite().all(), name
            share = (parameter.grad.double() - by_exact.clamp(-limit, limit)).norm() / by_exact.norm().clamp(max=limit)
            assert share < 0.02, name
    net.zero_grad()
    loss, nll, kl = bqnn.elbo(net(x), Y, net, 1000, bqnn.kl_warmup(1, 2))
    assert loss.dtype == nll.dtype == kl.dtype == wide
    loss.backward()
    assert loss.item() == pytest.approx(nll.item() + 0.5 * kl.item() / 1000, rel=1e-5)
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_the_divergence_of_many_weights() -> None:
    """A sum beyond 65504, of terms that bfloat16 would stop counting at 256."""
    for dtype in HALVES:
        layer = bqnn.BayesLinear(512, 512, dtype=dtype)
        layer.log_sigma2.data.fill_(-20.0)
        exact = layer.kl_divergence().item(), copy.deepcopy(layer).double().kl_divergence().item()
        assert exact[1] > 70_000 and exact[0] == pytest.approx(exact[1], rel=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", [3, 16])
@pytest.mark.parametrize("size", SIZES)
def test_levels_are_those_of_float64(size: float, num_levels: int, granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 32, dtype=dtype)
    nn.init.normal_(plain.weight, std=size)
    found = bqnn.convert(plain, num_levels, granularity=granularity)
    exact = bqnn.convert(copy.deepcopy(plain).double(), num_levels, granularity=granularity)
    assert found.levels.dtype == dtype and bqnn.pack(found).levels.dtype == torch.float32
    assert (bqnn.pack(found).levels.diff(dim=1) > 0).all()
    assert (found.levels.double() - exact.levels).abs().max() <= 0.01 * exact.levels.abs().max()
    later = bqnn.convert(copy.deepcopy(plain).float(), num_levels, granularity=granularity).to(dtype)
    assert (later.levels.double() - exact.levels).abs().max() <= 0.01 * exact.levels.abs().max()
    assert later.level_scale.dtype == later.prior_sigma2.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predictions(dtype: torch.dtype) -> None:
    net = make_net(dtype).eval()
    for layer in bayes_layers(net).values():
        layer.log_sigma2.data.add_(1.0)
    x = inputs(dtype, 50)
    torch.manual_seed(3)
    found = bqnn.predict(net, x, samples=16)
    torch.manual_seed(3)
    with torch.no_grad():
        draws = torch.stack([bqnn.sample(net)(x) for _ in range(16)]).double().softmax(-1)
    mean = draws.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    information = entropy - torch.special.entr(draws).sum(-1).mean(0)
    for each, right in zip(found, (mean, entropy, information), strict=True):
        assert each.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(each.double(), right, rtol=1e-5, atol=1e-6)
    assert (bqnn.predict(net, x).probs.sum(-1) - 1.0).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reports_statistics_and_packed_networks(dtype: torch.dtype) -> None:
    net, x = make_net(dtype), inputs(dtype)
    exact = exactly(net)
    for found, right in zip(bqnn.report(net).layers, bqnn.report(exact).layers, strict=True):
        assert found.occupancy == right.occupancy and found.near_share == pytest.approx(right.near_share)
        assert found.quantization_loss == pytest.approx(right.quantization_loss, rel=1e-4)
    for each, own in ((net, x), (exact, x.double())):
        bqnn.refresh_batchnorm(each, own.split([5, 2]))
    assert_near(net[1].running_var, exact[1].running_var, dtype)
    for precision in PRECISIONS:
        packed, right = bqnn.pack(net, precision).eval(), bqnn.pack(exactly(net), "fp32").eval()(x.double())
        for input_dtype in (dtype, torch.float32):
            assert packed[0](x.to(input_dtype)).dtype == input_dtype
        steps = {"fp32": 16.0 * torch.finfo(dtype).eps + 1e-5, "bf16": 0.05, "int8": 0.05}
        found = packed(x)
        assert found.isfinite().all()
        assert (found.double() - right).norm() <= max(steps[precision], 0.02 * (dtype in HALVES)) * right.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_there_and_back(assign: bool, dtype: torch.dtype) -> None:
    net = make_net(dtype, partition="learned")
    other = make_net(dtype, 1.0, partition="learned")
    other.load_state_dict(copy.deepcopy(net.state_dict()), assign=assign)
    for a, b in zip(bayes_layers(net).values(), bayes_layers(other).values(), strict=True):
        assert torch.equal(a.levels, b.levels) and torch.equal(a.thresholds, b.thresholds)
    assert torch.equal(net.eval()(inputs(dtype)), other.eval()(inputs(dtype)))
    # Half precision and back loses bits of the parameters alone.
    there = copy.deepcopy(net).half().to(dtype)
    for a, b in zip(bayes_layers(net).values(), bayes_layers(there).values(), strict=True):
        assert (a.levels - b.levels).abs().max() <= 0.01 * a.levels.abs().max()


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("mode", ["categorical", "gaussian", "straight_through"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0, 2000.0])
@pytest.mark.parametrize("in_autocast", [False, True])
def test_float16_activations_of_any_size(in_autocast: bool, scale: float, mode: str, coarse: bool) -> None:
    """Squares from 256 on are beyond float16, variances of narrow codebooks below it."""
    generator = torch.Generator().manual_seed(0)
    x = ((torch.rand(64, 32, generator=generator) * 2 - 1) * scale).half()
    levels = torch.tensor([[-1e-3, 0.0, 1e-3]])
    weight, log_sigma2 = 1e-3 * torch.randn(16, 32, generator=generator), torch.full((16, 32), 2 * math.log(1e-4))
    tensors = [x, weight, log_sigma2, levels, 0.5 * (levels[:, 1:] + levels[:, :-1])]
    results = []
    for cast in (torch.float32, torch.float64):
        wide = [tensors[0] if cast == torch.float32 else x.double(), *(tensor.to(cast) for tensor in tensors[1:])]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in wide]
        with autocast(torch.float16 if in_autocast else None):
            y = moment_linear(*leaves, None, torch.tensor(5), 0, mode, coarse and cast == torch.float32)
        (y.double() / scale).sum().backward()
        results.append((y, leaves[0].grad, leaves[1].grad, leaves[2].grad))
    assert results[0][0].dtype == torch.float16
    for found, exact in zip(*results, strict=True):
        assert_near(found.detach(), exact.detach(), torch.bfloat16 if coarse else torch.float16, 32.0)


def test_samples_of_half_precision_parameters_are_those_of_the_stored_numbers() -> None:
    torch.manual_seed(0)
    for dtype in HALVES:
        weight, levels = 0.02 * torch.randn(32, 64), torch.tensor([[-0.02, 0.0, 0.02]])
        tensors = [t.to(dtype) for t in (weight, torch.full_like(weight, -9.0), levels)]
        thresholds = torch.tensor([[-0.01, 0.01]], dtype=dtype)
        y = sample_linear(torch.eye(64, dtype=dtype), *tensors, thresholds, None, torch.tensor(7))
        noise = formulas.noise(7, 0, weight.shape)
        drawn = tensors[0].double() + noise * tensors[1].double().mul(0.5).exp()
        right = formulas.quantize(drawn, tensors[2].double(), thresholds.double())
        # float32 draws may fall on the other side of a threshold where float64 ones all but meet it.
        assert (y.t().double() != right).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compiled_layers_in_autocast(dtype: torch.dtype) -> None:
    net, x = make_net(torch.float32).train(), inputs(torch.float32)
    compiled = torch.compile(net[4], backend="aot_eager", fullgraph=True)
    with autocast(dtype):
        y = compiled(x.flatten(1).repeat(1, 2))
    assert y.dtype == dtype
    F.cross_entropy(y.float(), Y).backward()
    assert net[4].weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("size", SIZES)
def test_weights_that_are_read_are_those_of_float64(size: float, estimator: str, dtype: torch.dtype) -> None:
    net = make_net(dtype, size, estimator=estimator).train()
    exact = exactly(net).train()
    for name, layer in bayes_layers(net).items():
        twin = exact.get_submodule(name)
        torch.manual_seed(3)
        found = layer.weight.clone()
        torch.manual_seed(3)
        right = twin.weight.clone()
        assert found.dtype == layer.weight.dtype == dtype and found.isfinite().all()
        # A draw in float32 may fall on the other side of a threshold that one in float64 all but meets.
        far = (found.double() - right).abs() > 0.02 * twin.levels.abs().max()
        assert far.double().mean() < 0.02
        found.sum().backward()
        assert layer.mean.grad.dtype == dtype and layer.mean.grad.isfinite().all()
