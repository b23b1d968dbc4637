"""moment_linear against sums over the cells of the partition, against sampling, and by numerical gradients."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bqnn import BackendError, convert, elbo
from bqnn.bayes.estimator import ESTIMATORS
from bqnn.core import quantizer
from bqnn.core.quantizer import MODES
from bqnn.ops import moment_linear, sample_linear
from tests.support import formulas
from tests.support.helpers import (
    SEED,
    Case,
    assert_matches,
    compare_layouts,
    compiled_backends,
    make_case,
    moment_product,
    served,
    triton_devices,
    usable_backends,
)
from tests.support.shapes import EVERY_M, GRANULARITIES, LINEAR_GRID, SMALL_LINEAR, SOME_M, LinearShape

RUNS_ON = usable_backends("moment_linear")
# From here the calls of the noise cross into the counter's second word.
OFFSET = 2**32 - 2
NAMES = ("x", "weight", "log_sigma2", "levels", "thresholds", "bias")
# A mode has gradients for these; the others get zeros.
GRADIENTS = {
    "categorical": NAMES,
    "gaussian": ("x", "weight", "log_sigma2", "bias"),
    "straight_through": ("x", "weight", "log_sigma2", "levels", "bias"),
}


def run(
    case: Case,
    mode: str = "categorical",
    backend: str | None = None,
    seed: int = SEED,
    offset: int = OFFSET,
    coarse: bool = False,
) -> Tensor:
    return moment_linear(*case.tensors(), torch.tensor(seed), offset, mode, coarse, backend)


def formula_for(case: Case, mode: str) -> partial[Tensor]:
    noise = formulas.noise(SEED, OFFSET, case.output_shape)
    return partial(moment_product, noise=noise, mode=mode)


def transposed(case: Case) -> Case:
    return Case(*(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in case.tensors()))


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), LINEAR_GRID)
def test_values_and_gradients(
    shape: LinearShape, num_levels: int, granularity: str, mode: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    case = make_case(shape, num_levels, granularity)
    assert_matches(partial(run, mode=mode, backend=backend), formula_for(case, mode), case, device, GRADIENTS[mode])


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_input_and_float32_weight(
    dtype: torch.dtype, num_levels: int, granularity: str, mode: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    case = make_case(LinearShape(9, 33, 129), num_levels, granularity).to(x=dtype)
    assert_matches(served(partial(run, mode=mode), backend), formula_for(case, mode), case, device, GRADIENTS[mode])


def choose_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the backend "triton" multiply in one of its ways, whatever the shape."""
    if way == "before":
        monkeypatch.setattr(importlib.import_module("bqnn.kernels.moment_linear"), "OPERATIONS_FUSED", -1)
    if way == "parts":
        monkeypatch.setattr(importlib.import_module("bqnn.kernels.launch"), "processors", lambda device: 132)


@pytest.mark.parametrize("device", triton_devices("moment_linear"))
@pytest.mark.parametrize("way", ["parts", "before"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_ways_to_multiply(
    dtype: torch.dtype, granularity: str, mode: str, way: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_way(way, monkeypatch)
    case = make_case(LinearShape(5, 41, 141), 5, granularity).to(x=dtype)
    assert_matches(partial(run, mode=mode, backend="triton"), formula_for(case, mode), case, device, GRADIENTS[mode])


@pytest.mark.parametrize("device", triton_devices("moment_linear"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layers_under_autocast(
    estimator: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole layers on the kernels multiply in the dtype of autocast, and their gradients are the reference's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(80, 4))
    net = convert(net, 3, estimator=estimator).to(device)
    x, gradients = torch.randn(2, 3, 6, 6).to(device), []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("BQNN_BACKEND", backend)
        torch.manual_seed(1)
        net.zero_grad()
        with torch.autocast(device, dtype):
            y = net(x)
        assert y.dtype == dtype
        elbo(y.float(), torch.tensor([0, 1], device=device), net, 20).loss.backward()
        found = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
        gradients.append({"y": y.detach().float(), **found})
    for name, expected in gradients[1].items():
        difference = (gradients[0][name] - expected).square().mean().sqrt()
        assert gradients[0][name].dtype == torch.float32
        assert difference <= 2.0**-5 * expected.square().mean().sqrt(), name


@pytest.mark.parametrize("device", triton_devices("moment_linear"))
@pytest.mark.parametrize("way", ["fused", "parts", "before"])
@pytest.mark.parametrize("mode", MODES)
def test_a_coarse_variance_changes_values_and_gradients_by_its_rounding(
    mode: str, way: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_way(way, monkeypatch)
    # With one codebook the gradient of its two thresholds cancels, and the rounding alone is 2^-7 of it.
    case = make_case(LinearShape(9, 41, 101), 3, "channel").to(device)
    exact, coarse = case.leaves(), case.leaves()
    outputs = run(exact, mode, "reference"), run(coarse, mode, "triton", coarse=True)
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(5)).to(device)
    for y in outputs:
        y.backward(upstream)
    pairs = {name: (getattr(exact, name).grad, getattr(coarse, name).grad) for name in GRADIENTS[mode]}
    assert not torch.allclose(*outputs, rtol=1e-5, atol=1e-5), "nothing was rounded"
    for name, (expected, found) in {"y": outputs, **pairs}.items():
        difference = (found - expected).square().mean().sqrt()
        assert difference <= 2.0**-7 * expected.square().mean().sqrt(), name


@pytest.mark.parametrize("device", triton_devices("moment_linear"))
@pytest.mark.parametrize("channels", [72, 71], ids=["aligned", "odd"])
def test_noise_does_not_depend_on_tiles(channels: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("bqnn.kernels.moment_linear")
    case = make_case(LinearShape(21, channels, 37), 3, "tensor").to(device)
    expected = run(case, backend="reference")
    for rows, width, step in ((16, 16, 64), (32, 128, 16), (64, 32, 32)):
        monkeypatch.setattr(kernels, "_rows_of_block", lambda *_, rows=rows: rows)
        monkeypatch.setattr(kernels, "_width", lambda *_, width=width: width)
        monkeypatch.setattr(kernels, "_step", lambda *_, step=step: step)
        torch.testing.assert_close(run(case, backend="triton"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
def test_gradcheck(num_levels: int, granularity: str, mode: str) -> None:
    case = make_case(LinearShape(2, 3, 5), num_levels, granularity).to(torch.float64)
    # The straight-through gradient of the weight is not the slope of the forward pass.
    checked = [name for name in NAMES if not (mode == "straight_through" and name == "weight")]

    def function(*tensors: Tensor) -> Tensor:
        return run(replace(case, **dict(zip(checked, tensors, strict=True))), mode)

    inputs = [getattr(case, name).clone().requires_grad_() for name in checked]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_moments_are_those_of_the_sampled_levels(num_levels: int, granularity: str) -> None:
    case = make_case(LinearShape(1, 3, 4), num_levels, granularity).to(torch.float64)
    draws = 20_000
    generator = torch.Generator().manual_seed(num_levels)
    noise = torch.randn(draws, 3, 4, generator=generator, dtype=torch.float64)
    samples = case.weight + (0.5 * case.log_sigma2).exp() * noise
    rows = samples.transpose(0, 1).reshape(3, -1)
    levels = formulas.quantize(rows, case.levels, case.thresholds).view(3, draws, 4)
    mean, variance = quantizer.moments(case.weight, case.log_sigma2, case.levels, case.thresholds)
    standard_error = (variance / draws).sqrt() + 1e-9
    assert ((levels.mean(1) - mean).abs() <= 5.0 * standard_error).all()
    fourth = (levels - mean.unsqueeze(1)).pow(4).mean(1)
    standard_error = ((fourth - variance.square()).clamp(min=0.0) / draws).sqrt() + 1e-3 * variance + 1e-6
    assert ((levels.var(1) - variance).abs() <= 5.0 * standard_error).all()


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_normal_with_the_mean_and_variance_of_the_mode(mode: str) -> None:
    rows = 40_000
    case = make_case(LinearShape(1, 7, 13), 5, "channel")
    y = run(replace(case, x=case.x.expand(rows, -1)), mode).double()
    exact = case.to(torch.float64)
    tensors = (exact.weight, exact.log_sigma2, exact.levels, exact.thresholds)
    mean, variance = formulas.weight_moments(*tensors, mode)
    mean, variance = (exact.x @ mean.t() + exact.bias)[0], (exact.x.square() @ variance.t())[0]
    assert ((y.mean(0) - mean).abs() < 4.5 * (variance / rows).sqrt()).all()
    assert ((y.var(0) / variance - 1.0).abs() < 4.5 * (2.0 / rows) ** 0.5).all()
    correlation = torch.corrcoef(y.t()) - torch.eye(7)
    assert correlation.abs().max() < 4.5 / rows**0.5


def test_variance_keeps_its_relative_precision_in_both_tails() -> None:
    z = torch.linspace(-5.0, 5.0, 101)
    case = Case(
        torch.ones(1, 1),
        0.1 * z.view(-1, 1),
        torch.full((101, 1), 0.1).square().log(),
        torch.tensor([[-1.0, 1.0]]),
        torch.tensor([[0.0]]),
        torch.zeros(101),
    )
    arguments = (case.weight, case.log_sigma2, case.levels, case.thresholds)
    _, variance = quantizer.moments(*arguments)
    _, exact = quantizer.moments(*(tensor.double() for tensor in arguments))
    probability = torch.special.ndtr(z.double())
    torch.testing.assert_close(exact.flatten(), 4.0 * probability * (1.0 - probability), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(variance.double(), exact, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", ["categorical", "straight_through"])
def test_without_variance_it_is_the_deterministic_layer(mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 5, "channel").to(device)
    case = replace(case, log_sigma2=torch.full_like(case.log_sigma2, -40.0))
    x, weight, _, levels, thresholds, bias = case.tensors()
    expected = sample_linear(x, weight, None, levels, thresholds, bias)
    torch.testing.assert_close(run(case, mode, backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("log_sigma2", [-40.0, 10.0])
def test_extreme_parameters_give_finite_gradients(log_sigma2: float, mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(LinearShape(3, 7, 14), 3, "tensor")
    weight = case.weight.clone()
    weight[0], weight[1], weight[2, :2] = 1e4, -1e4, case.thresholds[0]
    x = case.x.clone()
    x[0] = 0.0  # its output has no variance at all
    case = replace(case, x=x, weight=weight, log_sigma2=torch.full_like(weight, log_sigma2)).to(device).leaves()
    y = run(case, mode, backend)
    assert torch.equal(y[0], case.bias)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    for name in GRADIENTS[mode]:
        assert torch.isfinite(getattr(case, name).grad).all()


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_seed_and_offset_choose_the_noise_of_the_outputs(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(LinearShape(5, 8, 13), 3, "tensor").to(device)
    x = torch.zeros(5, 13, device=device)
    x[:, 0] = case.x[0, 0]  # sums have one term, since a GEMM may add each row in its own order
    case = replace(case, x=x)
    first = run(case, backend=backend)
    assert torch.equal(run(case, backend=backend), first)
    assert not torch.equal(run(case, backend=backend, seed=SEED + 1), first)
    assert not torch.equal(run(case, backend=backend, seed=SEED + 2**40), first)
    later = run(case, backend=backend, offset=OFFSET + 2)  # two calls are the 8 outputs of a row
    assert torch.equal(later[:-1], first[1:])
    assert first.unique(dim=0).shape[0] == 5, "rows of a batch share their noise"


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...], mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, "tensor")
    case = replace(case, x=torch.randn(*leading, 13, generator=torch.Generator().manual_seed(1))).to(device).leaves()
    y = run(case, mode, backend)
    assert y.shape == (*leading, 7)
    torch.testing.assert_close(y.reshape(-1, 7), run(replace(case, x=case.x.reshape(-1, 13)), mode, backend))
    y.sum().backward()
    for name in GRADIENTS[mode]:
        gradient = getattr(case, name).grad
        assert gradient.shape == getattr(case, name).shape and torch.isfinite(gradient).all()
        assert case.x.numel() or not gradient.any()


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter(granularity: str, mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, granularity).to(device)
    wide = torch.zeros(7, 26, device=device)
    wide[:, ::2] = case.weight
    sliced = replace(case, x=case.x.repeat_interleave(2, 0)[::2], weight=wide[:, ::2])
    compare_layouts(partial(run, mode=mode, backend=backend), case, transposed(case), sliced)


@pytest.mark.parametrize("wanted", [("bias",), ("x",), ("levels",), ("thresholds",), ("log_sigma2",)], ids=str)
def test_only_what_requires_a_gradient_gets_one(wanted: tuple[str, ...]) -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor").leaves()
    run(case).sum().backward()
    frozen = make_case(SMALL_LINEAR, 3, "tensor")
    for name in wanted:
        getattr(frozen, name).requires_grad_()
    run(frozen).sum().backward()
    for name in NAMES:
        gradient = getattr(frozen, name).grad
        assert (gradient is not None) == (name in wanted)
        assert gradient is None or torch.equal(gradient, getattr(case, name).grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout: str, coarse: bool, mode: str) -> None:
    case, seed = make_case(SMALL_LINEAR, 3, "channel"), torch.tensor(SEED)
    if layout == "transposed":
        case = transposed(case)
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors()]
    torch.library.opcheck(torch.ops.bqnn.moment_linear.default, (*leaves, seed, 3, mode, coarse))
    saved = torch.rand(3, 7).bfloat16() if coarse else None
    arguments = (torch.randn(3, 7), saved, *case.tensors()[:5], seed, 3, mode, True)
    torch.library.opcheck(torch.ops.bqnn.moment_linear_backward.default, arguments)


def test_opcheck_without_what_is_optional() -> None:
    tensors = make_case(SMALL_LINEAR, 3, "tensor").tensors()[:5]
    leaves = [tensors[0], *(tensor.clone().requires_grad_() for tensor in tensors[1:])]
    noise = (torch.tensor(SEED), 0, "categorical", False)
    torch.library.opcheck(torch.ops.bqnn.moment_linear.default, (*leaves, None, *noise))
    arguments = (torch.randn(3, 7), None, *tensors, *noise)
    torch.library.opcheck(torch.ops.bqnn.moment_linear_backward.default, arguments)


@pytest.mark.parametrize("runs_on", compiled_backends("moment_linear"))
@pytest.mark.parametrize("mode", MODES)
def test_compiles(mode: str, runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, "channel").to(device)
    eager, compiled = case.leaves(), case.leaves()
    expected = run(eager, mode, backend)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled, mode, backend)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name in GRADIENTS[mode]:
        assert torch.equal(getattr(compiled, name).grad, getattr(eager, name).grad)


@pytest.mark.parametrize("backend", ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor")
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::moment_linear: \w+ .*\w"):
        run(case, backend=backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::moment_linear: \w+ .*\w"):
        run(case)


SMALL = make_case(SMALL_LINEAR, 3, "tensor")


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        pytest.param("x", SMALL.x[:, :-1], ValueError, r"x must have the shape \[..., 13\], got \[3, 12\]", id="x"),
        pytest.param("x", SMALL.x.long(), TypeError, "x must be floating point.*int64", id="x-int"),
        pytest.param("weight", SMALL.weight.int(), TypeError, "weight must be floating point.*int32", id="weight-int"),
        pytest.param("weight", SMALL.weight[0], ValueError, "weight must have the shape", id="weight-1d"),
        pytest.param("log_sigma2", None, TypeError, "log_sigma2 must be a tensor, got NoneType", id="sigma-none"),
        pytest.param("log_sigma2", SMALL.log_sigma2[:-1], ValueError, r"log_sigma2.*\[7, 13\], got \[6", id="sigma"),
        pytest.param("levels", SMALL.levels[0], ValueError, r"levels must have the shape.*\[3\]", id="levels-1d"),
        pytest.param("levels", torch.tensor(1.0), ValueError, "levels must have the shape", id="levels-scalar"),
        pytest.param("levels", SMALL.levels.expand(2, 3), ValueError, r"levels .* 2 to 16\], got \[2, 3", id="groups"),
        pytest.param("thresholds", SMALL.thresholds[:, :1], ValueError, r"thresholds.*7, 2\], got \[1, 1", id="cuts"),
        pytest.param("thresholds", SMALL.thresholds.to("meta"), ValueError, "thresholds is on meta", id="device"),
        pytest.param("bias", SMALL.bias[:-1], ValueError, r"bias must have the shape \[7\], got \[6\]", id="bias"),
        pytest.param("seed", None, TypeError, "seed must be an int64 scalar tensor, got NoneType", id="seed-none"),
        pytest.param("seed", 3, TypeError, "seed must be an int64 scalar tensor, got int", id="seed-int"),
        pytest.param("seed", torch.tensor(3.5), TypeError, "seed must be an int64.*float32", id="seed-float"),
        pytest.param("seed", torch.tensor([3, 4]), ValueError, r"seed must be an int64.*\[2\]", id="seed-vector"),
        pytest.param("mode", "median", ValueError, "mode must be one of categorical.*got 'median'", id="mode"),
    ],
)
def test_bad_input(argument: str, value: object, error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES, SMALL.tensors())) | {"seed": torch.tensor(SEED)}
    with pytest.raises(error, match=message):
        moment_linear(**arguments | {argument: value})  # type: ignore[arg-type]
