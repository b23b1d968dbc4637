"""Hostile arguments to every op of ``torch.ops.bqnn_cpu``: an error that names the argument, or the right answer.

Each case runs in this process: a read or write beyond a tensor, a division by zero or an endless loop would end it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.core.codes import pack_codes, packed_width
from bqnn.ops.backends.cpu_layout import make_layout

pytestmark = pytest.mark.skipif(bqnn.cpu_isa() == "none", reason="no CPU kernels")

HUGE = 2**62
ops = torch.ops.bqnn_cpu


def refused(name: str, call: Callable[[], Any]) -> None:
    """``call`` has to raise a ValueError: the argument's name, what it needs, what it got."""
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be .+, got ") as error:
        call()
    assert "\n" not in str(error.value).split(", got ")[0]


def make(num_levels: int = 3, channels: int = 20, columns: int = 36) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_levels)
    codes = torch.randint(num_levels, (channels, columns), dtype=torch.uint8, generator=generator)
    return pack_codes(codes, num_levels), torch.linspace(-1.0, 1.5, num_levels)[None]


def layout_arguments(**changes: Any) -> dict[str, Any]:
    codes, levels = make()
    arguments = {
        "codes": codes,
        "levels": levels,
        "int8_levels": torch.zeros(1, 3, dtype=torch.int8),
        "int8_scale": torch.zeros(1),
        "columns": 36,
        "kernel_size": [3, 3],
        "dilation_w": 1,
        "groups": 1,
        "precision": "fp32",
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("kernel_size", {"kernel_size": [0, 3]}, id="kernel-0"),
        pytest.param("kernel_size", {"kernel_size": [-3, -3]}, id="kernel-negative"),
        pytest.param("kernel_size", {"kernel_size": [2**31, 1]}, id="kernel-int64"),
        pytest.param("kernel_size", {"kernel_size": [3]}, id="kernel-1d"),
        pytest.param("columns", {"columns": 0}, id="columns-0"),
        pytest.param("columns", {"columns": -36}, id="columns-negative"),
        pytest.param("columns", {"columns": 35}, id="columns-no-multiple"),
        pytest.param("codes", {"columns": 360}, id="columns-past-the-codes"),
        pytest.param("codes", {"columns": HUGE // 9 * 9}, id="columns-huge"),
        pytest.param("dilation_w", {"dilation_w": 0}, id="dilation-0"),
        pytest.param("dilation_w", {"dilation_w": 2**32 + 1}, id="dilation-int64"),
        pytest.param("groups", {"groups": 0}, id="groups-0"),
        pytest.param("groups", {"groups": 3}, id="groups-no-divisor"),
        pytest.param("groups", {"groups": -1}, id="groups-negative"),
        pytest.param("precision", {"precision": "int4"}, id="precision-unknown"),
        pytest.param("precision", {"precision": ""}, id="precision-empty"),
        pytest.param("levels", {"levels": torch.zeros(1, 1)}, id="one-level"),
        pytest.param("levels", {"levels": torch.zeros(1, 17)}, id="17-levels"),
        pytest.param("levels", {"levels": torch.zeros(3)}, id="levels-1d"),
        pytest.param("levels", {"levels": torch.zeros(2, 3)}, id="two-codebooks"),
        pytest.param("levels", {"levels": torch.zeros(0, 3)}, id="no-codebook"),
        pytest.param("levels", {"levels": torch.zeros(1, 3, dtype=torch.float64)}, id="levels-float64"),
        pytest.param("codes", {"codes": make()[0].int()}, id="codes-int32"),
        pytest.param("codes", {"codes": make()[0][:, 1:]}, id="codes-narrow"),
        pytest.param("codes", {"codes": make()[0].T.contiguous().T}, id="codes-strided"),
        pytest.param("codes", {"codes": make()[0][:0]}, id="no-channel"),
        pytest.param("codes", {"codes": make()[0].flatten()}, id="codes-1d"),
        pytest.param("int8_levels", {"int8_levels": torch.zeros(1, 2, dtype=torch.int8)}, id="few-int8-levels"),
        pytest.param("int8_levels", {"int8_levels": torch.zeros(1, 3)}, id="int8-levels-float"),
        pytest.param("int8_scale", {"int8_scale": torch.zeros(0)}, id="no-int8-scale"),
    ],
)
def test_packed_layout_refuses(name: str, changes: dict[str, Any]) -> None:
    assert ops.packed_layout(**layout_arguments()).dtype == torch.uint8
    refused(name, lambda: ops.packed_layout(**layout_arguments(**changes)))


@pytest.mark.parametrize("num_levels", [3, 5])
def test_codes_that_are_no_digits_stay_in_the_table(num_levels: int) -> None:
    """A byte above the largest number that so many digits make, as a damaged file has it."""
    channels, columns = 20, 64
    codes = torch.full((channels, packed_width(columns, num_levels)), 255, dtype=torch.uint8)
    levels = torch.linspace(-1.0, 1.5, num_levels)[None]
    x = torch.rand(3, columns)
    y = ops.packed_linear(x, make_layout(codes, levels, columns, "fp32"), None)
    bound = x.sum(1, keepdim=True) * 1.5 + 1e-4
    assert bool((y.abs() <= bound).all())


def linear_layout() -> Tensor:
    codes, levels = make()
    return make_layout(codes, levels, 36, "fp32")


def conv_layout(precision: str = "fp32", num_levels: int = 3, dilation_w: int = 1) -> Tensor:
    codes, levels = make(num_levels)
    return make_layout(codes, levels, 36, precision, (3, 3), dilation_w)


@pytest.mark.parametrize(
    ("name", "x", "bias"),
    [
        pytest.param("x", torch.zeros(2, 35), None, id="columns-few"),
        pytest.param("x", torch.zeros(2, 37), None, id="columns-many"),
        pytest.param("x", torch.zeros(()), None, id="scalar"),
        pytest.param("x", torch.zeros(2, 36, dtype=torch.float64), None, id="float64"),
        pytest.param("x", torch.zeros(2, 36, dtype=torch.float16), None, id="float16"),
        pytest.param("x", torch.zeros(2, 36, dtype=torch.int32), None, id="int32"),
        pytest.param("bias", torch.zeros(2, 36), torch.zeros(19), id="bias-short"),
        pytest.param("bias", torch.zeros(2, 36), torch.zeros(0), id="bias-empty"),
    ],
)
def test_packed_linear_refuses(name: str, x: Tensor, bias: Tensor | None) -> None:
    refused(name, lambda: ops.packed_linear(x, linear_layout(), bias))


def test_packed_linear_refuses_the_layout_of_a_convolution() -> None:
    refused("layout", lambda: ops.packed_linear(torch.zeros(2, 36), conv_layout(), None))


@pytest.mark.parametrize(
    ("name", "stride", "padding", "dilation"),
    [
        pytest.param("stride", [0, 1], [1, 1], [1, 1], id="stride-0"),
        pytest.param("stride", [1, -1], [1, 1], [1, 1], id="stride-negative"),
        pytest.param("stride", [2**32, 1], [1, 1], [1, 1], id="stride-int64"),
        pytest.param("stride", [1], [1, 1], [1, 1], id="stride-1d"),
        pytest.param("stride", [], [1, 1], [1, 1], id="stride-empty"),
        pytest.param("padding", [1, 1], [-1, 0], [1, 1], id="padding-negative"),
        pytest.param("padding", [1, 1], [2**31, 0], [1, 1], id="padding-int64"),
        pytest.param("padding", [1, 1], [HUGE, HUGE], [1, 1], id="padding-huge"),
        pytest.param("padding", [1, 1], [2**30, 2**30], [1, 1], id="padding-overflows"),
        pytest.param("padding", [2**31 - 1] * 2, [2**31 - 1] * 2, [1, 1], id="padding-under-a-stride"),
        pytest.param("padding", [1, 1], [1, 1, 1], [1, 1], id="padding-3d"),
        pytest.param("dilation", [1, 1], [1, 1], [-1, 1], id="dilation-negative"),
        pytest.param("dilation", [1, 1], [1, 1], [0, 1], id="dilation-0"),
        pytest.param("dilation", [1, 1], [1, 1], [1, 2], id="dilation-not-the-layouts"),
        pytest.param("dilation", [1, 1], [1, 1], [2**33, 1], id="dilation-int64"),
        pytest.param("x", [1, 1], [0, 0], [2**31 - 1, 1], id="dilation-beyond-x"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_packed_conv2d_refuses(
    precision: str, name: str, stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    x = torch.zeros(1, 4, 6, 6)
    refused(name, lambda: ops.packed_conv2d(x, conv_layout(precision), None, stride, padding, dilation))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(1, 3, 6, 6), id="channels"),
        pytest.param(torch.zeros(4, 6, 6), id="3d"),
        pytest.param(torch.zeros(1, 4, 2, 6), id="small"),
        pytest.param(torch.zeros(1, 4, 0, 6), id="empty"),
        pytest.param(torch.zeros(1, 4, 6, 6, dtype=torch.float64), id="float64"),
    ],
)
def test_packed_conv2d_refuses_x(x: Tensor) -> None:
    refused("x", lambda: ops.packed_conv2d(x, conv_layout(), None, [1, 1], [0, 0], [1, 1]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_strides_and_paddings_beyond_x_are_right(precision: str, channels_last: bool) -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layout = conv_layout(precision)
    whole = ops.packed_conv2d(x, layout, None, [1, 1], [40, 40], [1, 1])
    y = ops.packed_conv2d(x, layout, None, [2**31 - 1, 50], [40, 40], [1, 1])
    torch.testing.assert_close(y, whole[:, :, ::1000, ::50], rtol=1e-5, atol=1e-5)
    assert y.shape == (2, 20, 1, 2)


def headers() -> list[Any]:
    """Layouts with one 32-bit number of the header changed."""
    changed = []
    for offset in range(0, 320, 4):
        for value in (0, 1, -1, 2, 17, 2**31 - 1, -(2**31)):
            changed.append(pytest.param(offset, value, id=f"{offset}-{value}"))
    return changed


@pytest.mark.parametrize(("offset", "value"), headers())
def test_an_altered_layout_is_refused_or_harmless(offset: int, value: int) -> None:
    codes, levels = make()
    for layout, run in (
        (conv_layout(), lambda it: ops.packed_conv2d(torch.ones(1, 4, 6, 6), it, None, [1, 1], [1, 1], [1, 1])),
        (make_layout(codes, levels, 36, "int8"), lambda it: ops.packed_linear(torch.ones(3, 36), it, None)),
    ):
        altered = layout.clone()
        altered[offset : offset + 4].view(torch.int32).fill_(value)
        try:
            run(altered)
        except ValueError as error:
            assert re.match(r"(layout|x|dilation|bias) must be ", str(error))


OTHER_BYTES: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda layout: layout[:0],
    "zeros": torch.zeros_like,
    "ones": lambda layout: torch.full_like(layout, 255),
    "short": lambda layout: layout[:-64].clone(),
    "long": lambda layout: torch.cat([layout, layout]),
    "odd": lambda layout: torch.cat([layout[:1], layout])[1:],
    "float": lambda layout: layout.float(),
    "strided": lambda layout: torch.stack([layout, layout], 1)[:, 0],
}


@pytest.mark.parametrize("kind", OTHER_BYTES)
def test_other_bytes_are_no_layout(kind: str) -> None:
    layout = OTHER_BYTES[kind](linear_layout())
    refused("layout", lambda: ops.packed_linear(torch.zeros(2, 36), layout, None))


def test_the_body_of_a_layout_may_hold_anything() -> None:
    """Codes, indices and levels of another weight, or noise, are read as some weight."""
    for num_levels, precision in ((2, "fp32"), (3, "fp32"), (4, "bf16"), (5, "int8"), (16, "fp32")):
        codes, levels = make(num_levels, 150, 36)
        linear = make_layout(codes, levels, 36, precision)
        conv = make_layout(codes, levels, 36, precision, (3, 3))
        for layout in (linear, conv):
            noise = torch.randint(256, (layout.numel() - 384,), dtype=torch.uint8)
            layout[384:] = noise
        for rows in (1, 5, 40):
            assert ops.packed_linear(torch.ones(rows, 36), linear, None).shape == (rows, 150)
        assert ops.packed_conv2d(torch.ones(2, 4, 6, 6), conv, None, [1, 1], [1, 1], [1, 1]).shape == (2, 150, 6, 6)


def test_the_kernels_have_names() -> None:
    x, layout = torch.randn(2, 36), linear_layout()
    name = ops.packed_linear_kernel(x, layout)
    isa = {"scalar": "scalar", "avx2": "AVX2", "avx512": "AVX-512", "amx": "AVX-512"}[bqnn.cpu_isa()]
    assert name.startswith(isa) and "fp32" in name
    assert ops.packed_linear_kernel(torch.randn(0, 36), layout) == "none"
    name = ops.packed_conv2d_kernel(torch.randn(1, 4, 6, 6), conv_layout("int8"), [1, 1], [1, 1], [1, 1])
    assert name.split()[0] in ("scalar", "AVX2", "AVX-512", "AMX") and "int" in name


def test_kernels_with_names_check_their_arguments() -> None:
    refused("x", lambda: ops.packed_linear_kernel(torch.zeros(2, 3), linear_layout()))
    refused("stride", lambda: ops.packed_conv2d_kernel(torch.zeros(1, 4, 6, 6), conv_layout(), [0, 1], [1, 1], [1, 1]))


# --- training ---------------------------------------------------------------------------------------------------------

SEED = torch.tensor(1)
WEIGHT, LEVELS, THRESHOLDS = torch.randn(5, 7), torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([[-0.5, 0.5]])
SIGMA = torch.full((5, 7), -4.0)


def training_calls() -> dict[str, dict[str, Any]]:
    """Valid arguments of every op of training, by name."""
    x = torch.rand(2, 3, 4, 5)
    posterior = {"weight": WEIGHT, "log_sigma2": SIGMA, "levels": LEVELS, "thresholds": THRESHOLDS}
    like = torch.empty_like
    return {
        "random_words": {"seed": 1, "first": 0, "out": torch.empty(8, dtype=torch.int32)},
        "add_noise": {"mean": x.clone(), "variance": x.clone(), "seed": SEED, "offset": 0, "keep_slope": True},
        "multiply": {"grad": x, "slope": x.clone(), "out": like(x)},
        "noise_gradient": {"grad": x, "variance": x.clone(), "seed": SEED, "offset": 0, "out": like(x)},
        "square": {"x": x, "out": like(x)},
        "add_square_gradient": {"grad": x.clone(), "x": x, "grad_square": x.clone()},
        "sample": {**posterior, "seed": SEED, "offset": 0, "quantized": like(WEIGHT)},
        "sample_backward": {
            "grad": WEIGHT,
            **posterior,
            "seed": SEED,
            "offset": 0,
            "grad_log_sigma2": like(WEIGHT),
            "grad_levels": like(LEVELS),
        },
        "moments": {**posterior, "mode": 0, "mean": like(WEIGHT), "variance": like(WEIGHT)},
        "moments_backward": {
            "grad_mean": WEIGHT.clone(),
            "grad_variance": WEIGHT,
            **posterior,
            "mode": 0,
            "grad_log_sigma2": like(WEIGHT),
            "grad_levels": like(LEVELS),
            "grad_thresholds": like(THRESHOLDS),
        },
        "codebook_from_raw": {
            "raw_levels": LEVELS,
            "scale": torch.ones(1),
            "raw_thresholds": THRESHOLDS,
            "levels": like(LEVELS),
            "thresholds": like(THRESHOLDS),
            "tau": like(LEVELS),
        },
        "codebook_from_raw_backward": {
            "grad_levels": LEVELS,
            "grad_thresholds": THRESHOLDS,
            "raw_levels": LEVELS,
            "scale": torch.ones(1),
            "raw_thresholds": THRESHOLDS,
            "grad_raw_levels": like(LEVELS),
            "grad_raw_thresholds": like(THRESHOLDS),
        },
        "assign_codes": {"weight": WEIGHT, "thresholds": THRESHOLDS, "packed": False, "out": torch.empty(5, 7).byte()},
        "spike_slab_kl": {
            **{k: posterior[k] for k in ("weight", "log_sigma2", "levels")},
            "tau": LEVELS.abs() + 0.1,
            "out": torch.empty(1),
        },
        "spike_slab_kl_backward": {
            "grad": torch.ones(1),
            **{k: posterior[k] for k in ("weight", "log_sigma2", "levels")},
            "tau": LEVELS.abs() + 0.1,
            "grad_weight": like(WEIGHT),
            "grad_log_sigma2": like(WEIGHT),
            "grad_levels": like(LEVELS),
        },
        "mixture_kl": {
            **{k: posterior[k] for k in ("weight", "log_sigma2", "levels")},
            **{"slab_sigma2": torch.ones(1), "spike_width": 0.25, "slab_share": 0.1},
            "out": torch.empty(1),
        },
        "mixture_kl_backward": {
            "grad": torch.ones(1),
            **{k: posterior[k] for k in ("weight", "log_sigma2", "levels")},
            **{"slab_sigma2": torch.ones(1), "spike_width": 0.25, "slab_share": 0.1},
            "grad_weight": like(WEIGHT),
            "grad_log_sigma2": like(WEIGHT),
            "grad_levels": like(LEVELS),
        },
    }


def hostile(tensor: Tensor) -> dict[str, Tensor]:
    """What no op takes in the place of ``tensor``."""
    found = {
        "float64": tensor.double() if tensor.dtype != torch.float64 else tensor.float(),
        "bool": tensor.bool(),
        "long": torch.cat([tensor.flatten(), tensor.flatten()]),
        "strided": torch.stack([tensor, tensor], -1)[..., 0],
        "none of it": tensor.flatten()[:0],
    }
    if tensor.dim() > 1:
        found["a level more"] = torch.cat([tensor] * 18, -1)
    return found


@pytest.mark.parametrize("op", training_calls())
def test_training_ops_refuse(op: str) -> None:
    arguments = training_calls()[op]
    getattr(ops, op)(**arguments)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in tensors:
        for kind, bad in hostile(arguments[name]).items():
            if bad.is_contiguous() and kind == "strided":
                continue  # one element
            if op == "random_words" and kind in ("long", "none of it"):
                continue  # as many calls as there is room for
            with pytest.raises(ValueError, match=r"^\w+ must be .+, got "):
                getattr(ops, op)(**{**training_calls()[op], name: bad})


@pytest.mark.parametrize("mode", [-1, 3, HUGE])
def test_modes_are_three(mode: int) -> None:
    for op in ("moments", "moments_backward"):
        refused("mode", lambda op=op: getattr(ops, op)(**{**training_calls()[op], "mode": mode}))


@pytest.mark.parametrize("num_levels", [1, 17, 64])
def test_codebooks_have_2_to_16_levels(num_levels: int) -> None:
    levels = torch.arange(float(num_levels))[None]
    for op in ("spike_slab_kl", "spike_slab_kl_backward"):
        changes = {"levels": levels, "tau": levels.abs() + 1}
        refused("levels", lambda op=op, changes=changes: getattr(ops, op)(**{**training_calls()[op], **changes}))
    for op in ("mixture_kl", "mixture_kl_backward"):
        refused("levels", lambda op=op: getattr(ops, op)(**{**training_calls()[op], "levels": levels}))
    thresholds = torch.arange(float(num_levels - 1))[None]
    codes = {"weight": WEIGHT, "thresholds": thresholds, "out": torch.empty(5, 7).byte()}
    for packed in (False, True):
        refused("thresholds", lambda packed=packed: ops.assign_codes(**codes, packed=packed))


@pytest.mark.parametrize(("name", "value"), [("spike_width", 0.0), ("spike_width", float("nan")), ("slab_share", 1.0)])
def test_mixtures_have_parts(name: str, value: float) -> None:
    for op in ("mixture_kl", "mixture_kl_backward"):
        refused(name, lambda op=op: getattr(ops, op)(**{**training_calls()[op], name: value}))


def test_assign_codes_fills_whole_bytes_and_no_more() -> None:
    for columns in (1, 4, 5, 6, 11):
        weight = torch.randn(3, columns)
        width = packed_width(columns, 3)
        ops.assign_codes(weight, THRESHOLDS, True, torch.empty(3, width, dtype=torch.uint8))
        for wrong in (width - 1, width + 1):
            out = torch.empty(3, wrong, dtype=torch.uint8)
            refused("out", lambda weight=weight, out=out: ops.assign_codes(weight, THRESHOLDS, True, out))


def test_a_deviation_needs_a_seed_and_its_gradient_a_place() -> None:
    refused("seed", lambda: ops.sample(**{**training_calls()["sample"], "seed": None}))
    backward = training_calls()["sample_backward"]
    refused("grad_log_sigma2", lambda: ops.sample_backward(**{**backward, "grad_log_sigma2": None}))
    refused("mean", lambda: ops.moments(**{**training_calls()["moments"], "mean": None}))


@pytest.mark.parametrize("weight", [torch.zeros(()), torch.zeros(0, 7), torch.zeros(5, 0)])
def test_weights_of_no_size(weight: Tensor) -> None:
    if weight.dim() == 0:
        refused("weight", lambda: ops.assign_codes(weight, THRESHOLDS, False, torch.empty(1).byte()))
        return
    ops.assign_codes(weight, THRESHOLDS, False, torch.empty(weight.shape, dtype=torch.uint8))
    out = torch.empty(1)
    ops.spike_slab_kl(weight, weight.clone(), LEVELS, LEVELS.abs() + 0.1, out)
    assert float(out) == 0.0
    out = torch.empty(1)
    ops.mixture_kl(weight, weight.clone(), LEVELS, torch.ones(()), 0.25, 0.1, out)
    assert float(out) == 0.0
