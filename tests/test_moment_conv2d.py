"""moment_conv2d against sums over the cells of the partition, by numerical gradients, and against moment_linear."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn import BackendError
from bqnn.core.quantizer import MODES
from bqnn.ops import moment_conv2d, moment_linear, sample_conv2d
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
    moment_product,
    served,
    triton_devices,
    usable_backends,
)
from tests.support.shapes import CONV2D_GRID, GATHERED_CONV2D, GRANULARITIES, SMALL_CONV2D, SOME_M, Conv2dShape

RUNS_ON = usable_backends("moment_conv2d")
# From here the calls of the noise cross into the counter's second word.
OFFSET = 2**32 - 2
NAMES = ("x", "weight", "log_sigma2", "levels", "thresholds", "bias")
# A mode has gradients for these; the others get zeros.
GRADIENTS = {
    "categorical": NAMES,
    "gaussian": ("x", "weight", "log_sigma2", "bias"),
    "straight_through": ("x", "weight", "log_sigma2", "levels", "bias"),
}
LAYOUTS = [
    pytest.param((), id="contiguous"),
    pytest.param(("x",), id="x-channels-last"),
    pytest.param(("weight", "log_sigma2"), id="weight-channels-last"),
    pytest.param(("x", "weight", "log_sigma2"), id="channels-last"),
]


def run(
    case: Case, mode: str = "categorical", backend: str | None = None, seed: int = SEED, offset: int = OFFSET
) -> Tensor:
    return moment_conv2d(*case.tensors(), torch.tensor(seed), offset, mode, **case.geometry, backend=backend)


def formula_for(case: Case, mode: str) -> partial[Tensor]:
    return partial(moment_product, noise=formulas.noise(SEED, OFFSET, case.output_shape), mode=mode)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), CONV2D_GRID)
def test_values_and_gradients(
    shape: Conv2dShape, num_levels: int, granularity: str, mode: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    case = make_case(shape, num_levels, granularity)
    assert_matches(partial(run, mode=mode, backend=backend), formula_for(case, mode), case, device, GRADIENTS[mode])


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_levels", SOME_M)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_input_and_float32_weight(
    dtype: torch.dtype, num_levels: int, mode: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, num_levels, "channel").to(x=dtype)
    assert_matches(served(partial(run, mode=mode), backend), formula_for(case, mode), case, device, GRADIENTS[mode])


# The backend "triton" chooses among these ways, by what its kernels say.
WAYS = {
    "linear": {},  # a kernel of one pixel is a linear layer; the others run as "made"
    "made": {"_is_linear": lambda *_: False, "MADE_BLOCKS": 10**9},
    "made-before": {"_is_linear": lambda *_: False, "MADE_BLOCKS": 0},
    "torch": {"is_fused": lambda *_: False},
}


def force(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(importlib.import_module("bqnn.kernels.moment_conv2d"), name, value)


@pytest.mark.parametrize("device", triton_devices("moment_conv2d"))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", GATHERED_CONV2D)
def test_every_way(shape: Conv2dShape, way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(way, monkeypatch)
    case = make_case(shape, 3, "channel")
    assert_matches(partial(run, backend="triton"), formula_for(case, "categorical"), case, device, NAMES)


@pytest.mark.parametrize("device", triton_devices("moment_conv2d"))
@pytest.mark.parametrize("processors", [1, 64], ids=["whole", "parts"])
@pytest.mark.parametrize("way", ["linear", "made-before"])
@pytest.mark.parametrize("size", [(3, 5), (2, 6), (1, 1)], ids=str)
def test_noise_of_a_kernel_of_one_pixel(
    size: tuple[int, int], way: str, processors: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With x = 1, means of 0 and variances of 1 the outputs are bias and noise, in [image, channel, pixel] order."""
    force(way, monkeypatch)
    for module in ("launch", "conv2d"):
        monkeypatch.setattr(importlib.import_module(f"bqnn.kernels.{module}"), "processors", lambda _: processors)
    case = make_case(Conv2dShape(3, 70, 6, *size, (1, 1)), 3, "tensor").to(device)
    x = torch.zeros_like(case.x)
    x[:, 0] = 1.0
    zeros = torch.zeros_like(case.weight)
    case = replace(case, x=x, weight=zeros, log_sigma2=zeros)
    found = run(case, "gaussian", "triton")
    torch.testing.assert_close(found, run(case, "gaussian", "reference"), rtol=1e-5, atol=1e-6)
    assert torch.equal(run(channels_last(case, ("x",)), "gaussian", "triton"), found)


@pytest.mark.parametrize("device", triton_devices("moment_conv2d"))
@pytest.mark.parametrize("way", ["made", "made-before"])
@pytest.mark.parametrize("shape", GATHERED_CONV2D[:2])
def test_parts_of_a_product(shape: Conv2dShape, way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(way, monkeypatch)
    for module in ("launch", "conv2d"):
        monkeypatch.setattr(importlib.import_module(f"bqnn.kernels.{module}"), "processors", lambda _: 64)
    case = make_case(shape, 3, "tensor")
    function, formula = partial(run, backend="triton"), formula_for(case, "categorical")
    assert_matches(function, formula, case, device, NAMES)
    assert_matches(function, formula, channels_last(case, ("x",)), device, NAMES)


@pytest.mark.parametrize("device", triton_devices("moment_conv2d"))
@pytest.mark.parametrize("way", ["made", "made-before"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GATHERED_CONV2D[:2])
def test_low_precision_gathered(
    shape: Conv2dShape, dtype: torch.dtype, way: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(way, monkeypatch)
    case = make_case(shape, 5, "channel").to(x=dtype)
    assert_matches(partial(run, backend="triton"), formula_for(case, "categorical"), case, device, NAMES)


@pytest.mark.parametrize("device", triton_devices("moment_conv2d"))
def test_tiles_do_not_matter(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(Conv2dShape(1, 20, 37, 3, 4, (3, 2), padding=(1, 1)), 3, "channel").to(device)
    for way in ("made", "made-before"):
        force(way, monkeypatch)
        expected = run(case, backend="reference")
        for side in (16, 32):
            limited = lambda _, most, side=side: min(side, most)  # noqa: E731
            monkeypatch.setattr(importlib.import_module("bqnn.kernels.conv2d"), "tile_side", limited)
            torch.testing.assert_close(run(case, backend="triton"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", triton_devices("moment_conv2d"))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("processors", [1, 64], ids=["whole", "parts"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [GATHERED_CONV2D[0], GATHERED_CONV2D[-1]])
def test_coarse_variance(
    shape: Conv2dShape,
    layout: tuple[str, ...],
    processors: int,
    way: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, what is kept and gradients are the reference's, but for a rounding to bfloat16, in its memory formats."""
    force(way, monkeypatch)
    monkeypatch.setattr(importlib.import_module("bqnn.kernels.launch"), "processors", lambda _: processors)
    case = channels_last(make_case(shape, 3, "tensor").to(device), layout)
    seed, geometry = torch.tensor(SEED), geometry_arguments(case)
    noise = (seed, 3, "categorical")
    (y, kept), (expected, slope) = (
        torch.ops.bqnn.moment_conv2d(*case.tensors(), *noise, True, *geometry, backend)
        for backend in ("triton", "reference")
    )
    assert (y.stride(), kept.stride()) == (expected.stride(), slope.stride())
    assert kept.dtype == torch.bfloat16
    assert (y - expected).square().mean() <= 2.0**-16 * expected.square().mean()
    torch.testing.assert_close(kept, slope, rtol=2**-6, atol=0.0)
    found, expected = (
        torch.ops.bqnn.moment_conv2d_backward(y, slope, *case.tensors()[:5], *noise, True, *geometry, backend)
        for backend in ("triton", "reference")
    )
    assert [tensor.stride() for tensor in found] == [tensor.stride() for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M)
def test_gradcheck(num_levels: int, granularity: str, mode: str) -> None:
    shape = Conv2dShape(1, 2, 2, 3, 3, (2, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    case = make_case(shape, num_levels, granularity).to(torch.float64)
    # The straight-through gradient of the weight is not the slope of the forward pass.
    checked = [name for name in NAMES if not (mode == "straight_through" and name == "weight")]

    def function(*tensors: Tensor) -> Tensor:
        return run(replace(case, **dict(zip(checked, tensors, strict=True))), mode)

    inputs = [getattr(case, name).clone().requires_grad_() for name in checked]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_of_one_pixel_is_a_linear_layer(mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(Conv2dShape(3, 13, 7, 1, 1, (1, 1)), 3, "channel").to(device)
    x, weight, log_sigma2, *rest = case.tensors()
    flat = [tensor.flatten(1) for tensor in (x, weight, log_sigma2)]
    expected = moment_linear(*flat, *rest, torch.tensor(SEED), OFFSET, mode, backend="reference")
    torch.testing.assert_close(run(case, mode, backend).flatten(1), expected)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", ["categorical", "straight_through"])
def test_without_variance_it_is_the_deterministic_layer(mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 5, "channel").to(device)
    case = replace(case, log_sigma2=torch.full_like(case.log_sigma2, -40.0))
    x, weight, _, levels, thresholds, bias = case.tensors()
    expected = sample_conv2d(x, weight, None, levels, thresholds, bias, **case.geometry)
    torch.testing.assert_close(run(case, mode, backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_image_gives_the_bias_and_finite_gradients(mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, "tensor")
    case = replace(case, x=torch.cat([torch.zeros_like(case.x[:1]), case.x[1:]])).to(device).leaves()
    y = run(case, mode, backend)
    assert torch.equal(y[0], case.bias.view(-1, 1, 1).expand_as(y[0]))
    y.square().sum().backward()
    for name in GRADIENTS[mode]:
        assert torch.isfinite(getattr(case, name).grad).all()


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_seed_and_offset_choose_the_noise_of_the_outputs(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(Conv2dShape(3, 2, 4, 3, 3, (3, 3), padding=(1, 1)), 3, "tensor").to(device)
    case = replace(case, x=case.x[:1].expand(3, -1, -1, -1))
    first = run(case, backend=backend)
    assert torch.equal(run(case, backend=backend), first)
    assert not torch.equal(run(case, backend=backend, seed=SEED + 1), first)
    later = run(case, backend=backend, offset=OFFSET + 9)  # nine calls are the 4 x 3 x 3 outputs of an image
    torch.testing.assert_close(later[:-1], first[1:])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, "tensor")
    shape = case.output_shape
    case = replace(case, x=case.x[:0]).to(device).leaves()
    y = run(case, mode, backend)
    assert y.shape == (0, *shape[1:])
    y.sum().backward()
    for name in GRADIENTS[mode]:
        gradient = getattr(case, name).grad
        assert gradient.shape == getattr(case, name).shape and not gradient.any()


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter(granularity: str, mode: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, granularity).to(device)
    turned = {name: getattr(case, name).mT.contiguous().mT for name in ("x", "weight", "log_sigma2")}
    others = [channels_last(case, names.values[0]) for names in LAYOUTS[1:]]
    compare_layouts(partial(run, mode=mode, backend=backend), case, replace(case, **turned), *others)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: tuple[str, ...], coarse: bool, mode: str) -> None:
    case, seed = channels_last(make_case(SMALL_CONV2D, 3, "channel"), layout), torch.tensor(SEED)
    y = case.product(case.x, case.weight)
    geometry = geometry_arguments(case)
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors()]
    torch.library.opcheck(torch.ops.bqnn.moment_conv2d.default, (*leaves, seed, 3, mode, coarse, *geometry))
    saved = torch.rand_like(y).to(torch.bfloat16, memory_format=torch.channels_last) if coarse else None
    arguments = (torch.randn_like(y), saved, *case.tensors()[:5], seed, 3, mode, True, *geometry)
    torch.library.opcheck(torch.ops.bqnn.moment_conv2d_backward.default, arguments)


def test_opcheck_without_what_is_optional() -> None:
    case, seed = make_case(SMALL_CONV2D, 3, "tensor"), torch.tensor(SEED)
    tensors, geometry = case.tensors()[:5], geometry_arguments(case)
    leaves = [tensors[0], *(tensor.clone().requires_grad_() for tensor in tensors[1:])]
    noise = (seed, 0, "categorical", False)
    torch.library.opcheck(torch.ops.bqnn.moment_conv2d.default, (*leaves, None, *noise, *geometry))
    upstream = torch.randn(case.output_shape)
    arguments = (upstream, None, *tensors, *noise, *geometry)
    torch.library.opcheck(torch.ops.bqnn.moment_conv2d_backward.default, arguments)


@pytest.mark.parametrize("runs_on", compiled_backends("moment_conv2d"))
@pytest.mark.parametrize("layout", LAYOUTS[::3])
@pytest.mark.parametrize("mode", MODES)
def test_compiles(mode: str, layout: tuple[str, ...], runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case = channels_last(make_case(SMALL_CONV2D, 3, "tensor").to(device), layout)
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [tensor.detach().requires_grad_() for tensor in case.tensors()]
        y = function(Case(*leaves, case.geometry), mode, backend)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SMALL_CONV2D, 3, "tensor")
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::moment_conv2d: \w+ .*\w"):
        run(case, backend=backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::moment_conv2d: \w+ .*\w"):
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
        pytest.param({"log_sigma2": None}, TypeError, "log_sigma2 must be a tensor, got NoneType", id="sigma-none"),
        pytest.param({"log_sigma2": SMALL.log_sigma2[:-1]}, ValueError, "log_sigma2 must have", id="sigma"),
        pytest.param({"levels": SMALL.levels[0]}, ValueError, "levels must have the shape", id="levels"),
        pytest.param({"thresholds": SMALL.thresholds[:, :1]}, ValueError, r"thresholds.*\[1, 1\]", id="thresholds"),
        pytest.param({"bias": SMALL.bias[:-1]}, ValueError, r"bias must have the shape \[6\], got \[5\]", id="bias"),
        pytest.param({"seed": None}, TypeError, "seed must be an int64 scalar tensor, got NoneType", id="seed"),
        pytest.param({"mode": "median"}, ValueError, "mode must be one of categorical.*got 'median'", id="mode"),
        pytest.param({"groups": 0}, ValueError, "groups must divide.*got 0", id="groups-0"),
        pytest.param({"groups": 4}, ValueError, "groups must divide.*got 4 for 8 and 6", id="groups-4"),
        pytest.param({"stride": (0, 1)}, ValueError, "stride must be one integer or two", id="stride"),
        pytest.param({"dilation": (9, 1)}, ValueError, "x must be large enough", id="kernel-past-the-image"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES, SMALL.tensors())) | {"seed": torch.tensor(SEED)} | SMALL.geometry
    with pytest.raises(error, match=message):
        moment_conv2d(**arguments | changes)
