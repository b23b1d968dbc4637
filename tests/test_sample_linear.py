"""sample_linear against a straight-through construction in autograd, with noise made by a second implementation."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bqnn import BackendError
from bqnn.ops import sample_linear
from tests.support import formulas
from tests.support.helpers import (
    SEED,
    Case,
    assert_matches,
    compare_layouts,
    compiled_backends,
    make_case,
    sampled_product,
    served,
    triton_devices,
    usable_backends,
)
from tests.support.shapes import EVERY_M, GRANULARITIES, INTERPRETED, LINEAR_GRID, SMALL_LINEAR, SOME_M, LinearShape

RUNS_ON = usable_backends("sample_linear")
# From here the calls of the noise cross into the counter's second word.
OFFSET = 2**32 - 2
GRADIENTS = ("x", "weight", "log_sigma2", "levels", "bias")
# Elements of a matrix that a program of Triton takes; interpreted, a program takes as long whatever its size.
BLOCKS = (128, 512, 4096) if INTERPRETED else (16, 64, 1024, 4096)


def sampled_case(shape: LinearShape, num_levels: int, granularity: str) -> Case:
    return make_case(shape, num_levels, granularity, noise=(SEED, OFFSET))


def noise_of(case: Case) -> Tensor:
    return formulas.noise(SEED, OFFSET, case.weight.shape)


def run(case: Case, backend: str | None = None, seed: int = SEED, offset: int = OFFSET) -> Tensor:
    return sample_linear(*case.tensors(), torch.tensor(seed), offset, backend)


def run_deterministic(case: Case, backend: str | None = None) -> Tensor:
    x, weight, _, levels, thresholds, bias = case.tensors()
    return sample_linear(x, weight, None, levels, thresholds, bias, backend=backend)


def transposed(case: Case) -> Case:
    return Case(*(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in case.tensors()))


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), LINEAR_GRID)
def test_values_and_gradients(shape: LinearShape, num_levels: int, granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = sampled_case(shape, num_levels, granularity)
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(partial(run, backend=backend), formula, case, device, GRADIENTS)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), LINEAR_GRID)
def test_deterministic(shape: LinearShape, num_levels: int, granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(shape, num_levels, granularity)
    formula = partial(sampled_product, noise=None)
    gradients = ("x", "weight", "levels", "bias")
    assert_matches(partial(run_deterministic, backend=backend), formula, case, device, gradients)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_input_and_float32_weight(
    dtype: torch.dtype, num_levels: int, granularity: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    case = sampled_case(LinearShape(9, 33, 129), num_levels, granularity).to(x=dtype)
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(served(run, backend), formula, case, device, GRADIENTS)


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("stochastic", [True, False], ids=["sampled", "deterministic"])
def test_product_with_a_weight_sampled_before(
    stochastic: bool, num_levels: int, granularity: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("bqnn.kernels.sample_linear"), "FUSED_ROWS", 0)
    for shape in (LinearShape(5, 9, 341), LinearShape(3, 7, 64)):
        case = make_case(shape, num_levels, granularity, (SEED, OFFSET) if stochastic else None)
        formula = partial(sampled_product, noise=noise_of(case) if stochastic else None)
        gradients = GRADIENTS if stochastic else tuple(name for name in GRADIENTS if name != "log_sigma2")
        assert_matches(
            partial(run if stochastic else run_deterministic, backend="triton"), formula, case, device, gradients
        )


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("columns", [64, 63], ids=["aligned", "odd"])
def test_the_sample_does_not_depend_on_tiles(columns: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: fused in every tile that there is, and made before the product."""
    kernels = importlib.import_module("bqnn.kernels.sample_linear")
    case = sampled_case(LinearShape(1, 40, columns), 3, "channel")
    case = replace(case, x=torch.eye(columns), bias=torch.zeros(40)).to(device)
    expected = run(case, "reference")
    for rows in (1, 32, 64, 128, 256):
        for dtype in (torch.float32, torch.float16):
            tiles = kernels._tiles(rows, dtype, 64)
            monkeypatch.setattr(kernels, "_tiles", lambda *_, tiles=tiles: tiles)
            assert torch.equal(run(case, "triton"), expected), tiles
            monkeypatch.undo()
    monkeypatch.setattr(kernels, "FUSED_ROWS", 0)
    for elements in BLOCKS:
        monkeypatch.setattr(importlib.import_module("bqnn.kernels.launch"), "MATRIX_BLOCK", elements)
        assert torch.equal(run(case, "triton"), expected), elements


@pytest.mark.parametrize("device", triton_devices("sample_linear"))
@pytest.mark.parametrize("columns", [64, 63], ids=["aligned", "odd"])
def test_gradients_do_not_depend_on_tiles(columns: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, where the weight's gradient is the outputs': backward makes the sample of forward again."""
    kernels, launch = (importlib.import_module(f"bqnn.kernels.{name}") for name in ("sample_linear", "launch"))
    case = sampled_case(LinearShape(1, 40, columns), 3, "channel")
    case = replace(case, x=torch.eye(columns), bias=torch.zeros(40)).to(device)
    upstream = torch.randn(columns, 40, generator=torch.Generator().manual_seed(0)).to(device)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = case.leaves()
        run(leaves, backend).backward(upstream)
        return leaves.weight.grad, leaves.log_sigma2.grad, leaves.levels.grad

    expected = gradients("triton")
    torch.testing.assert_close(expected, gradients("reference"), rtol=1e-5, atol=1e-5)
    for BM, BN, BK in ((16, 16, 32), (64, 32, 16), (32, 128, 64)):
        tiles = {"BM": BM, "BN": BN, "BK": BK}
        monkeypatch.setattr(kernels, "_weight_tiles", lambda *_, tiles=tiles: tiles)
        *found, levels = gradients("triton")
        assert all(torch.equal(one, other) for one, other in zip(found, expected)), tiles
        torch.testing.assert_close(levels, expected[2], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(kernels, "FUSED_ROWS", 0)
    for elements in BLOCKS:
        monkeypatch.setattr(launch, "MATRIX_BLOCK", elements)
        *found, levels = gradients("triton")
        assert all(torch.equal(one, other) for one, other in zip(found, expected)), elements
        torch.testing.assert_close(levels, expected[2], rtol=1e-5, atol=1e-5)


def test_float64() -> None:
    case = sampled_case(SMALL_LINEAR, 5, "channel").to(torch.float64)
    # The noise is float32 in every dtype.
    noise = formulas.noise(SEED, OFFSET, case.weight.shape)
    found, expected = case.leaves(), case.leaves()
    y, reference = run(found), sampled_product(expected, noise)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    reference.square().sum().backward()
    for name in GRADIENTS:
        tolerance = 1e-5 if name == "log_sigma2" else 1e-10
        torch.testing.assert_close(
            getattr(found, name).grad, getattr(expected, name).grad, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_identity_gives_the_sampled_weight_bit_for_bit(
    num_levels: int, granularity: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    case = sampled_case(LinearShape(1, 7, 63), num_levels, granularity)
    case = replace(case, x=torch.eye(63), bias=torch.zeros(7))
    sample = case.weight.double() + (0.5 * case.log_sigma2.double()).exp() * noise_of(case)
    cells = formulas.one_hot_cells(formulas.codes_of(sample, case.thresholds.double()), case.levels)
    expected = (cells * case.levels.unsqueeze(1)).sum(-1)
    assert not torch.equal(expected, formulas.quantize(case.weight, case.levels, case.thresholds))
    assert torch.equal(run(case.to(device), backend).cpu().t(), expected)


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_seed_and_offset_choose_the_noise(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(LinearShape(1, 8, 64), 3, "tensor").to(device)
    case = replace(case, x=torch.eye(64, device=device), log_sigma2=torch.zeros_like(case.weight))
    case = replace(case, weight=torch.zeros_like(case.weight), bias=torch.zeros_like(case.bias))
    first = run(case, backend).t()
    assert torch.equal(run(case, backend).t(), first)
    assert not torch.equal(run(case, backend, seed=SEED + 1).t(), first)
    assert not torch.equal(run(case, backend, seed=SEED + 2**40).t(), first)
    later = run(case, backend, offset=OFFSET + 16).t()  # 16 calls are the 64 weights of a row
    assert torch.equal(later[:-1], first[1:])
    assert not torch.equal(later[-1], first[0])


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_one_sample_for_the_whole_batch(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, "channel").to(device)
    columns = case.x.shape[1]
    each = torch.eye(columns, device=device)  # sums have one term, since a GEMM may add each row in its own order
    y = run(replace(case, x=torch.cat([each, each])), backend)
    assert torch.equal(y[:columns], y[columns:])


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_gradients_are_of_the_sample_of_the_forward_pass(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, "tensor").to(device).leaves()
    y = run(case, backend)
    run(case, backend, seed=1)  # another sample is drawn in between
    torch.manual_seed(1)
    first = torch.autograd.grad(y.sum(), [case.x, case.log_sigma2], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [case.x, case.log_sigma2])
    quantized = run(replace(case, x=torch.eye(13, device=device), bias=torch.zeros_like(case.bias)), backend).t()
    torch.testing.assert_close(first[0], quantized.sum(0).expand(3, -1))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...], runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, "tensor")
    case = replace(case, x=torch.randn(*leading, 13, generator=torch.Generator().manual_seed(1))).to(device).leaves()
    y = run(case, backend)
    assert y.shape == (*leading, 7)
    rows = run(replace(case, x=case.x.reshape(-1, 13)), backend)
    torch.testing.assert_close(y.reshape(-1, 7), rows)
    y.sum().backward()
    for name in GRADIENTS:
        gradient = getattr(case, name).grad
        assert gradient.shape == getattr(case, name).shape and torch.isfinite(gradient).all()
    assert case.x.numel() or not case.weight.grad.any()


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter(granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, granularity).to(device)
    wide = torch.zeros(7, 26, device=device)
    wide[:, ::2] = case.weight
    sliced = replace(case, x=case.x.repeat_interleave(2, 0)[::2], weight=wide[:, ::2])
    compare_layouts(partial(run, backend=backend), case, transposed(case), sliced)


@pytest.mark.parametrize("wanted", [("bias",), ("x",), ("levels",), ("weight", "bias"), ("log_sigma2",)], ids=str)
def test_only_what_requires_a_gradient_gets_one(wanted: tuple[str, ...]) -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor").leaves()
    run(case).sum().backward()
    frozen = make_case(SMALL_LINEAR, 3, "tensor")
    for name in wanted:
        getattr(frozen, name).requires_grad_()
    run(frozen).sum().backward()
    for name in (*GRADIENTS, "thresholds"):
        gradient = getattr(frozen, name).grad
        assert (gradient is not None) == (name in wanted)
        assert gradient is None or torch.equal(gradient, getattr(case, name).grad)
    assert case.thresholds.grad is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout: str, granularity: str) -> None:
    case, seed = make_case(SMALL_LINEAR, 3, granularity), torch.tensor(SEED)
    if layout == "transposed":
        case = transposed(case)
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors()]
    torch.library.opcheck(torch.ops.bqnn.sample_linear.default, (*leaves, seed, 3))
    arguments = (torch.randn(3, 7), *case.tensors()[:5], seed, 3, True)
    torch.library.opcheck(torch.ops.bqnn.sample_linear_backward.default, arguments)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck_without_what_is_optional(granularity: str) -> None:
    x, weight, _, levels, thresholds, _ = make_case(SMALL_LINEAR, 3, granularity).tensors()
    arguments = (x, weight.requires_grad_(), None, levels, thresholds, None, None, 0)
    torch.library.opcheck(torch.ops.bqnn.sample_linear.default, arguments)
    arguments = (torch.randn(3, 7), x, weight.detach(), None, levels, thresholds, None, 0, False)
    torch.library.opcheck(torch.ops.bqnn.sample_linear_backward.default, arguments)


@pytest.mark.parametrize("runs_on", compiled_backends("sample_linear"))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles(granularity: str, runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, granularity).to(device)
    eager, compiled = case.leaves(), case.leaves()
    expected = run(eager, backend)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled, backend)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name in GRADIENTS:
        assert torch.equal(getattr(compiled, name).grad, getattr(eager, name).grad)


@pytest.mark.parametrize("backend", ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor")
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::sample_linear: \w+ .*\w"):
        run(case, backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::sample_linear: \w+ .*\w"):
        run(case)


SMALL = make_case(SMALL_LINEAR, 3, "tensor")


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        pytest.param("x", SMALL.x[:, :-1], ValueError, r"x must have the shape \[..., 13\], got \[3, 12\]", id="x"),
        pytest.param("x", SMALL.x.long(), TypeError, "x must be floating point.*int64", id="x-int"),
        pytest.param("x", torch.tensor(1.0), ValueError, r"x must have the shape", id="x-scalar"),
        pytest.param("weight", SMALL.weight.int(), TypeError, "weight must be floating point.*int32", id="weight-int"),
        pytest.param("weight", None, TypeError, "weight must be a tensor", id="weight-none"),
        pytest.param("weight", SMALL.weight[0], ValueError, "weight must have the shape", id="weight-1d"),
        pytest.param("weight", SMALL.weight[..., None], ValueError, "weight must have the shape", id="weight-3d"),
        pytest.param("log_sigma2", SMALL.log_sigma2[:-1], ValueError, r"log_sigma2.*\[7, 13\], got \[6", id="sigma"),
        pytest.param("log_sigma2", SMALL.log_sigma2.int(), TypeError, "log_sigma2 must be float", id="sigma-int"),
        pytest.param("levels", SMALL.levels[0], ValueError, r"levels must have the shape.*\[3\]", id="levels-1d"),
        pytest.param("levels", torch.tensor(1.0), ValueError, "levels must have the shape", id="levels-scalar"),
        pytest.param("levels", SMALL.levels.tolist(), TypeError, "levels must be a tensor.*list", id="levels-list"),
        pytest.param("levels", SMALL.levels.expand(2, 3), ValueError, r"levels .* 2 to 16\], got \[2, 3", id="groups"),
        pytest.param("levels", SMALL.levels[:, :1], ValueError, r"levels .* 2 to 16\], got \[1, 1\]", id="M1"),
        pytest.param("thresholds", SMALL.thresholds[:, :1], ValueError, r"thresholds.*7, 2\], got \[1, 1", id="cuts"),
        pytest.param("thresholds", SMALL.thresholds.to("meta"), ValueError, "thresholds is on meta", id="device"),
        pytest.param("bias", SMALL.bias[:-1], ValueError, r"bias must have the shape \[7\], got \[6\]", id="bias"),
        pytest.param("bias", SMALL.bias.int(), TypeError, "bias must be floating point", id="bias-int"),
        pytest.param("seed", None, ValueError, "seed is needed with log_sigma2", id="seed-none"),
        pytest.param("seed", 3, TypeError, "seed must be an int64 scalar tensor, got int", id="seed-int"),
        pytest.param(
            "seed", torch.tensor(3.5), TypeError, "seed must be an int64 scalar tensor.*float32", id="seed-float"
        ),
        pytest.param(
            "seed", torch.tensor([3, 4]), ValueError, r"seed must be an int64 scalar.*\[2\]", id="seed-vector"
        ),
    ],
)
def test_bad_input(argument: str, value: object, error: type[Exception], message: str) -> None:
    names = ("x", "weight", "log_sigma2", "levels", "thresholds", "bias")
    arguments = dict(zip(names, SMALL.tensors())) | {"seed": torch.tensor(SEED)}
    with pytest.raises(error, match=message):
        sample_linear(**arguments | {argument: value})  # type: ignore[arg-type]
