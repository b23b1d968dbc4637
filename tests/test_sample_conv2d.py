"""sample_conv2d against a straight-through construction in autograd, with noise made by a second implementation."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn import BackendError
from bqnn.core.product import Conv2dProduct
from bqnn.ops import sample_conv2d, sample_linear
from tests.support import formulas
from tests.support.helpers import (
    SEED,
    Case,
    assert_matches,
    channels_last,
    compare_layouts,
    compiled_backends,
    geometry_arguments,
    make_case,
    sampled_product,
    served,
    triton_devices,
    usable_backends,
)
from tests.support.shapes import CONV2D_GRID, EVERY_M, GATHERED_CONV2D, GRANULARITIES, SMALL_CONV2D, SOME_M, Conv2dShape

RUNS_ON = usable_backends("sample_conv2d")
# From here the calls of the noise cross into the counter's second word.
OFFSET = 2**32 - 2
GRADIENTS = ("x", "weight", "log_sigma2", "levels", "bias")
LAYOUTS = [
    pytest.param((), id="contiguous"),
    pytest.param(("x",), id="x-channels-last"),
    pytest.param(("weight", "log_sigma2"), id="weight-channels-last"),
    pytest.param(("x", "weight", "log_sigma2"), id="channels-last"),
]


def sampled_case(shape: Conv2dShape, num_levels: int, granularity: str) -> Case:
    return make_case(shape, num_levels, granularity, noise=(SEED, OFFSET))


def noise_of(case: Case) -> Tensor:
    return formulas.noise(SEED, OFFSET, case.weight.shape)


def run(case: Case, backend: str | None = None, seed: int = SEED, offset: int = OFFSET) -> Tensor:
    return sample_conv2d(*case.tensors(), torch.tensor(seed), offset, **case.geometry, backend=backend)


def run_deterministic(case: Case, backend: str | None = None) -> Tensor:
    x, weight, _, levels, thresholds, bias = case.tensors()
    return sample_conv2d(x, weight, None, levels, thresholds, bias, **case.geometry, backend=backend)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), CONV2D_GRID)
def test_values_and_gradients(shape: Conv2dShape, num_levels: int, granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = sampled_case(shape, num_levels, granularity)
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(partial(run, backend=backend), formula, case, device, GRADIENTS)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), CONV2D_GRID)
def test_deterministic(shape: Conv2dShape, num_levels: int, granularity: str, runs_on: tuple[str, str]) -> None:
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
    case = sampled_case(SMALL_CONV2D, num_levels, granularity).to(x=dtype)
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(served(run, backend), formula, case, device, GRADIENTS)


# The backend "triton" chooses among these ways, by the constants of its kernels.
WAYS = {
    "sampled": {"SAMPLED_BLOCKS": 10**9},
    "sampled-before": {"SAMPLED_BLOCKS": 0, "NARROW": 10**9},
    "torch": {"SAMPLED_BLOCKS": 0, "NARROW": 0},
}


def force(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(importlib.import_module("bqnn.kernels.sample_conv2d"), name, value)


@pytest.mark.parametrize("device", triton_devices("sample_conv2d"))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", GATHERED_CONV2D)
def test_every_way(shape: Conv2dShape, way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(way, monkeypatch)
    case = sampled_case(shape, 3, "channel")
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(partial(run, backend="triton"), formula, case, device, GRADIENTS)


@pytest.mark.parametrize("device", triton_devices("sample_conv2d"))
@pytest.mark.parametrize("way", ["sampled", "sampled-before"])
@pytest.mark.parametrize("shape", GATHERED_CONV2D[:2])
def test_parts_of_a_product(shape: Conv2dShape, way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(way, monkeypatch)
    for module in ("launch", "conv2d"):
        monkeypatch.setattr(importlib.import_module(f"bqnn.kernels.{module}"), "processors", lambda _: 64)
    case = sampled_case(shape, 3, "tensor")
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(partial(run, backend="triton"), formula, case, device, GRADIENTS)
    assert_matches(partial(run, backend="triton"), formula, channels_last(case, ("x",)), device, GRADIENTS)


@pytest.mark.parametrize("device", triton_devices("sample_conv2d"))
@pytest.mark.parametrize("way", ["sampled", "sampled-before"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GATHERED_CONV2D[:2])
def test_low_precision_gathered(
    shape: Conv2dShape, dtype: torch.dtype, way: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(way, monkeypatch)
    case = sampled_case(shape, 5, "channel").to(x=dtype)
    formula = partial(sampled_product, noise=noise_of(case))
    assert_matches(partial(run, backend="triton"), formula, case, device, GRADIENTS)


@pytest.mark.parametrize("device", triton_devices("sample_conv2d"))
@pytest.mark.parametrize("way", WAYS)
def test_the_sample_does_not_depend_on_tiles(way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: with an impulse as its input, a convolution gives its weight."""
    force(way, monkeypatch)
    for inputs in (3, 18):
        case = sampled_case(Conv2dShape(1, inputs, 19, 1, 1, (3, 2), padding=(2, 1)), 3, "channel")
        impulse = torch.eye(inputs).view(inputs, inputs, 1, 1)
        case = replace(case, x=impulse, bias=torch.zeros(19)).to(device)
        expected = run(case, "reference")
        for side in (16, 32):
            limited = lambda _, most, side=side: min(side, most)  # noqa: E731
            monkeypatch.setattr(importlib.import_module("bqnn.kernels.conv2d"), "tile_side", limited)
            assert torch.equal(run(case, "triton"), expected), side


@pytest.mark.parametrize("device", triton_devices("sample_conv2d"))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [GATHERED_CONV2D[0], GATHERED_CONV2D[-1]])
def test_memory_formats_are_those_of_the_reference(
    shape: Conv2dShape, layout: tuple[str, ...], way: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(way, monkeypatch)
    case = channels_last(make_case(shape, 3, "tensor").to(device), layout)
    seed, geometry = torch.tensor(SEED), geometry_arguments(case)
    y, expected = (run(case, backend) for backend in ("triton", "reference"))
    assert y.stride() == expected.stride()
    found, expected = (
        torch.ops.bqnn.sample_conv2d_backward(y, *case.tensors()[:5], seed, 3, True, *geometry, backend)
        for backend in ("triton", "reference")
    )
    assert [tensor.stride() for tensor in found] == [tensor.stride() for tensor in expected]


def test_float64() -> None:
    case = sampled_case(SMALL_CONV2D, 5, "channel").to(torch.float64)
    found, expected = case.leaves(), case.leaves()
    y, reference = run(found), sampled_product(expected, noise_of(case))
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    reference.square().sum().backward()
    for name in GRADIENTS:
        tolerance = 1e-5 if name == "log_sigma2" else 1e-10  # the noise is float32 in every dtype
        gradients = (getattr(owner, name).grad for owner in (found, expected))
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_an_impulse_gives_the_sampled_weight_bit_for_bit(
    num_levels: int, granularity: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    shape = Conv2dShape(1, 3, 7, 5, 3, (5, 3), padding=(4, 2))
    case = sampled_case(shape, num_levels, granularity)
    case = replace(case, x=F.pad(torch.eye(3).view(3, 3, 1, 1), (1, 1, 2, 2)), bias=torch.zeros(7))
    sample = case.weight.double() + (0.5 * case.log_sigma2.double()).exp() * noise_of(case)
    cells = formulas.one_hot_cells(formulas.codes_of(sample, case.thresholds.double()), case.levels)
    expected = (cells * case.levels.unsqueeze(1)).sum(-1).view(case.weight.shape)
    assert not torch.equal(expected, formulas.quantize(case.weight, case.levels, case.thresholds))
    y = run(
        case.to(device), backend
    ).cpu()  # image c has a 1 in channel c alone, so y[c, n] is the weight [n, c] turned
    assert torch.equal(y[:, :, 2:7, 1:4].flip(2, 3).transpose(0, 1), expected)


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_a_kernel_of_one_pixel_is_a_linear_layer(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = sampled_case(Conv2dShape(3, 13, 7, 1, 1, (1, 1)), 3, "channel").to(device)
    x, weight, log_sigma2, *rest = case.tensors()
    flat = [tensor.flatten(1) for tensor in (x, weight, log_sigma2)]
    expected = sample_linear(*flat, *rest, torch.tensor(SEED), OFFSET, backend="reference")
    torch.testing.assert_close(run(case, backend).flatten(1), expected)


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_seed_and_offset_choose_the_noise(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(Conv2dShape(4, 4, 8, 1, 1, (1, 1)), 3, "tensor").to(device)
    zero = {name: torch.zeros_like(getattr(case, name)) for name in ("weight", "log_sigma2", "bias")}
    case = replace(case, x=torch.eye(4, device=device).view(4, 4, 1, 1), **zero)
    first = run(case, backend)[..., 0, 0].t()
    assert torch.equal(run(case, backend)[..., 0, 0].t(), first)
    assert not torch.equal(run(case, backend, seed=SEED + 1)[..., 0, 0].t(), first)
    later = run(case, backend, offset=OFFSET + 1)[..., 0, 0].t()  # a call is the 4 weights of a channel
    assert torch.equal(later[:-1], first[1:])


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_empty_batch(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, "tensor")
    full = case.product(case.x, case.weight)
    case = replace(case, x=case.x[:0]).to(device).leaves()
    y = run(case, backend)
    assert y.shape == (0, *full.shape[1:])
    y.sum().backward()
    for name in GRADIENTS:
        gradient = getattr(case, name).grad
        assert gradient.shape == getattr(case, name).shape and not gradient.any()


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter(granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, granularity).to(device)
    turned = {name: getattr(case, name).mT.contiguous().mT for name in ("x", "weight", "log_sigma2")}
    others = [channels_last(case, names.values[0]) for names in LAYOUTS[1:]]
    compare_layouts(partial(run, backend=backend), case, replace(case, **turned), *others)


@pytest.mark.parametrize("wanted", [("bias",), ("x",), ("levels",), ("weight", "bias"), ("log_sigma2",)], ids=str)
def test_only_what_requires_a_gradient_gets_one(wanted: tuple[str, ...]) -> None:
    case = make_case(SMALL_CONV2D, 3, "tensor").leaves()
    run(case).sum().backward()
    frozen = make_case(SMALL_CONV2D, 3, "tensor")
    for name in wanted:
        getattr(frozen, name).requires_grad_()
    run(frozen).sum().backward()
    for name in (*GRADIENTS, "thresholds"):
        gradient = getattr(frozen, name).grad
        assert (gradient is not None) == (name in wanted)
        assert gradient is None or torch.equal(gradient, getattr(case, name).grad)
    assert case.thresholds.grad is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: tuple[str, ...], granularity: str) -> None:
    case, seed = channels_last(make_case(SMALL_CONV2D, 3, granularity), layout), torch.tensor(SEED)
    upstream = torch.randn_like(case.product(case.x, case.weight))
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors()]
    geometry = geometry_arguments(case)
    torch.library.opcheck(torch.ops.bqnn.sample_conv2d.default, (*leaves, seed, 3, *geometry))
    arguments = (upstream, *case.tensors()[:5], seed, 3, True, *geometry)
    torch.library.opcheck(torch.ops.bqnn.sample_conv2d_backward.default, arguments)


def test_opcheck_without_what_is_optional() -> None:
    case = make_case(SMALL_CONV2D, 3, "channel")
    x, weight, _, levels, thresholds, _ = case.tensors()
    upstream, geometry = torch.randn_like(case.product(x, weight)), geometry_arguments(case)
    arguments = (x, weight.requires_grad_(), None, levels, thresholds, None, None, 0, *geometry)
    torch.library.opcheck(torch.ops.bqnn.sample_conv2d.default, arguments)
    arguments = (upstream, x, weight.detach(), None, levels, thresholds, None, 0, False, *geometry)
    torch.library.opcheck(torch.ops.bqnn.sample_conv2d_backward.default, arguments)


@pytest.mark.parametrize("runs_on", compiled_backends("sample_conv2d"))
@pytest.mark.parametrize("layout", LAYOUTS[::3])
def test_compiles(layout: tuple[str, ...], runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case = channels_last(make_case(SMALL_CONV2D, 3, "tensor").to(device), layout)
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [tensor.detach().requires_grad_() for tensor in case.tensors()]
        y = function(Case(*leaves, case.geometry), backend)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SMALL_CONV2D, 3, "tensor")
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::sample_conv2d: \w+ .*\w"):
        run(case, backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::sample_conv2d: \w+ .*\w"):
        run(case)


SMALL = make_case(SMALL_CONV2D, 3, "tensor")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"x": SMALL.x[:, :-1]}, ValueError, r"x must have the shape \[batch, 4, .*\[2, 3, 5, 7\]", id="x"),
        pytest.param({"x": SMALL.x[0]}, ValueError, r"x must have the shape .*\[4, 5, 7\]", id="x-3d"),
        pytest.param({"x": SMALL.x.long()}, TypeError, "x must be floating point.*int64", id="x-int"),
        pytest.param({"weight": SMALL.weight.int()}, TypeError, "weight must be floating.*int32", id="weight-int"),
        pytest.param({"weight": SMALL.weight[0]}, ValueError, "weight must have the shape", id="weight-3d"),
        pytest.param({"log_sigma2": SMALL.log_sigma2[:-1]}, ValueError, "log_sigma2 must have", id="sigma"),
        pytest.param({"levels": SMALL.levels[0]}, ValueError, "levels must have the shape", id="levels"),
        pytest.param({"thresholds": SMALL.thresholds[:, :1]}, ValueError, r"thresholds.*\[1, 1\]", id="thresholds"),
        pytest.param({"bias": SMALL.bias[:-1]}, ValueError, r"bias must have the shape \[6\], got \[5\]", id="bias"),
        pytest.param({"seed": None}, ValueError, "seed is needed with log_sigma2", id="seed"),
        pytest.param({"groups": 0}, ValueError, "groups must divide.*got 0", id="groups-0"),
        pytest.param({"groups": 4}, ValueError, "groups must divide.*got 4 for 8 and 6", id="groups-4"),
        pytest.param({"stride": (0, 1)}, ValueError, "stride must be one integer or two", id="stride"),
        pytest.param({"padding": (-1, 0)}, ValueError, "padding must be one integer or two", id="padding"),
        pytest.param({"dilation": (1, 0)}, ValueError, "dilation must be one integer or two", id="dilation"),
        pytest.param({"dilation": (9, 1)}, ValueError, "x must be large enough", id="kernel-past-the-image"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("x", "weight", "log_sigma2", "levels", "thresholds", "bias")
    arguments = dict(zip(names, SMALL.tensors())) | {"seed": torch.tensor(SEED)} | SMALL.geometry
    with pytest.raises(error, match=message):
        sample_conv2d(**arguments | changes)


def test_pointwise_strides_of_a_channels_last_input() -> None:
    """torch's own gradient of the weight writes past its memory here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    weight, grad = torch.randn(2, 3, 1, 1, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)
    product = Conv2dProduct((2, 2), (0, 0), (1, 1), 1)
    _, expected = product.backward(grad.double(), x.double(), weight.double(), False)
    for _ in range(100):
        images = x.contiguous(memory_format=torch.channels_last)
        _, found = product.backward(grad, images, weight, False)
        torch.testing.assert_close(found, expected.float())


def test_windows_that_see_padding_alone() -> None:
    """Channels-last, with a bias: torch's own convolution reads past its memory here."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 2, 8, 2, generator=generator), torch.randn(1, 2, 2, 1, generator=generator)
    product, bias = Conv2dProduct((1, 3), (0, 1), (1, 3), 1), torch.ones(1)
    for _ in range(20):
        y = product.forward(x.contiguous(memory_format=torch.channels_last), weight, bias)
        torch.testing.assert_close(y, torch.ones(3, 1, 7, 2))
    assert y.is_contiguous(memory_format=torch.channels_last)
