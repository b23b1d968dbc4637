"""Launches that between them choose every kernel and every configuration of bqnn.kernels: what is compiled in tests.

A case is a function without arguments that runs launchers on CPU tensors, whose values do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bqnn.core.codes import packed_width
from bqnn.core.geometry import Conv2dGeometry, LinearGeometry
from bqnn.core.product import Conv2dProduct, LinearProduct
from bqnn.core.quantizer import Posterior
from bqnn.kernels import (
    assign_codes,
    launch,
    mixture_kl,
    moment,
    moment_conv2d,
    moment_linear,
    noise,
    sample,
    sample_conv2d,
    sample_linear,
    spike_slab_kl,
)
from bqnn.kernels.arguments import Noise
from bqnn.kernels.geometry import output_of
from bqnn.kernels.packed import Epilogue, sum_of_parts
from bqnn.ops import dispatch
from bqnn.ops.packed_product import PackedCall
from tests.support.shapes import Conv2dShape

NOISE = Noise(2**62, 2**33)
PRODUCT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Cases = dict[str, Callable[[], Any]]


def posterior(shape: tuple[int, ...], num_levels: int, groups: int) -> Posterior:
    weight, log_sigma2 = torch.zeros(shape), torch.zeros(shape)
    return Posterior(weight, log_sigma2, torch.zeros(groups, num_levels), torch.zeros(groups, num_levels - 1))


def call_sample_linear(
    batch: int, dtype: torch.dtype, columns: int = 512, num_levels: int = 3, groups: int = 1, stochastic: bool = True
) -> None:
    channels = 256
    x, grad = torch.zeros(batch, columns, dtype=dtype), torch.zeros(batch, channels, dtype=dtype)
    weight = posterior((channels, columns), num_levels, groups)
    if not stochastic:
        weight = weight._replace(log_sigma2=None)
    sample_linear.forward(x, weight, torch.zeros(channels), NOISE, LinearProduct())
    sample_linear.backward(grad, x, weight, NOISE, True, LinearProduct())


def in_tf32(call: Callable[[], Any]) -> None:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        call()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _sample(columns: int, num_levels: int, groups: int) -> None:
    weight = posterior((64, columns), num_levels, groups)
    for dtype in PRODUCT_DTYPES:
        sample.sample(weight, NOISE, dtype)
        sample.sample_backward(weight.weight.to(dtype), weight, NOISE)


def call_conv2d(
    op: ModuleType,
    shape: Conv2dShape,
    dtype: torch.dtype,
    num_levels: int = 3,
    groups: int = 1,
    tf32: bool = True,
    **mode: Any,
) -> None:
    """``mode`` is that of a moment op: without a ``slope`` of forward, backward makes it again."""
    x = torch.zeros(shape.batch, shape.inputs, shape.height, shape.width, dtype=dtype)
    weight_shape = (shape.channels, shape.inputs // shape.groups, *shape.kernel)
    weight, product = posterior(weight_shape, num_levels, groups), Conv2dProduct(**shape.geometry)
    grad = torch.zeros(output_of(x, weight.weight.to(dtype), product)[0], dtype=dtype)
    forward, backward = mode.values(), [value for key, value in mode.items() if key == "mode"]
    slopes = [[grad.bfloat16()], [None]] if mode else [[]]
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        op.forward(x, weight, torch.zeros(shape.channels), NOISE, *forward, product)
        for slope in slopes:
            op.backward(grad, *slope, x, weight, NOISE, *backward, True, product)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def call_moment_linear(
    batch: int,
    dtype: torch.dtype,
    columns: int = 512,
    num_levels: int = 3,
    groups: int = 1,
    mode: str = "categorical",
    coarse: bool = True,
) -> None:
    channels = 256
    x, grad = torch.zeros(batch, columns, dtype=dtype), torch.zeros(batch, channels, dtype=dtype)
    weight, product = posterior((channels, columns), num_levels, groups), LinearProduct()
    _, slope = moment_linear.forward(x, weight, torch.zeros(channels), NOISE, mode, coarse, product)
    moment_linear.backward(grad, slope if coarse else None, x, weight, NOISE, mode, True, product)


def in_parts(call: Callable[[], Any]) -> None:
    """With as many processors as an H200 has, for which contractions are cut up."""
    with mock.patch.object(launch, "processors", lambda device: 132):
        call()


def _moment(columns: int, num_levels: int, groups: int, mode: str) -> None:
    weight = posterior((64, columns), num_levels, groups)
    for dtype in PRODUCT_DTYPES:
        moment.moments(weight, mode, dtype)
        grad = torch.zeros(64, columns, dtype=dtype)
        moment.moments_backward(moment.Moments(grad, grad), weight, mode)


def _noisy(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    for dtype in PRODUCT_DTYPES:
        y = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
        noise.noisy(y, y, NOISE, y, y.bfloat16())
        noise.noisy(y, y, NOISE, y, None)
        noise.noisy(None, y, NOISE, None, y)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SAMPLE_LINEAR: Cases = {
    **{
        f"sample_linear-bfloat16-B{batch}": partial(call_sample_linear, batch, torch.bfloat16)
        for batch in (1, 32, 64, 128)
    },
    **{f"sample_linear-float32-B{batch}": partial(call_sample_linear, batch, torch.float32) for batch in (1, 32, 64)},
    **{f"sample_linear-{_name(dtype)}-B256": partial(call_sample_linear, 256, dtype) for dtype in PRODUCT_DTYPES},
    **{
        f"sample_linear-tf32-B{batch}": partial(in_tf32, partial(call_sample_linear, batch, torch.float32))
        for batch in (32, 256)
    },
    "sample_linear-bfloat16-B256-M16": partial(call_sample_linear, 256, torch.bfloat16, 512, 16),
    "sample_linear-bfloat16-B256-M16-K511-channel": partial(call_sample_linear, 256, torch.bfloat16, 511, 16, 256),
    "sample_linear-float32-B256-M16-K511-channel": partial(call_sample_linear, 256, torch.float32, 511, 16, 256),
    "sample_linear-bfloat16-B256-M16-deterministic": partial(
        call_sample_linear, 256, torch.bfloat16, 512, 16, stochastic=False
    ),
    "sample-M3": partial(_sample, 512, 3, 1),
    "sample-M16-K25-channel": partial(_sample, 25, 16, 64),
}

WIDE_CONV2D = Conv2dShape(4, 128, 128, 16, 16, (3, 3), padding=(1, 1))
TO_FEW_CONV2D = Conv2dShape(4, 160, 12, 16, 16, (3, 3), padding=(1, 1))
FROM_FEW_CONV2D = Conv2dShape(8, 6, 16, 14, 14, (5, 5))
STRIDED_CONV2D = Conv2dShape(8, 64, 128, 32, 32, (3, 3), stride=(2, 2), padding=(1, 1))
FEW_STRIDED_CONV2D = Conv2dShape(8, 64, 128, 16, 16, (3, 3), stride=(2, 2), padding=(1, 1))
POINTWISE_CONV2D = Conv2dShape(4, 128, 128, 16, 16, (1, 1))
FEW_POINTWISE_CONV2D = Conv2dShape(1, 128, 128, 8, 8, (1, 1))
FEW_PIXELS_CONV2D = Conv2dShape(1, 64, 64, 7, 9, (3, 3), padding=(1, 1))
FEW_PIXELS_TO_MANY_CONV2D = Conv2dShape(1, 64, 128, 12, 12, (3, 3), padding=(1, 1))
FEW_PIXELS_FROM_MANY_CONV2D = Conv2dShape(1, 128, 32, 12, 12, (3, 3), padding=(1, 1))
FEW_PIXELS_TO_FEW_CONV2D = Conv2dShape(1, 64, 12, 8, 8, (3, 3), padding=(1, 1))


def _conv2d_cases(op: ModuleType, **mode: Any) -> Cases:
    run = partial(call_conv2d, op, **mode)
    name = op.__name__.split(".")[-1]
    half, single = torch.bfloat16, torch.float32
    return {
        f"{name}-bfloat16-wide": partial(run, WIDE_CONV2D, half),
        f"{name}-float16-wide": partial(run, WIDE_CONV2D, torch.float16),
        f"{name}-bfloat16-to-few": partial(run, TO_FEW_CONV2D, half),
        f"{name}-bfloat16-from-few": partial(run, FROM_FEW_CONV2D, half),
        f"{name}-bfloat16-strided": partial(run, STRIDED_CONV2D, half),
        f"{name}-bfloat16-few-strided": partial(run, FEW_STRIDED_CONV2D, half),
        f"{name}-bfloat16-few-pixels-from-many": partial(run, FEW_PIXELS_FROM_MANY_CONV2D, half),
        f"{name}-bfloat16-few-pixels": partial(run, FEW_PIXELS_CONV2D, half),
        f"{name}-bfloat16-few-pixels-M16-channel": partial(run, FEW_PIXELS_CONV2D, half, 16, 64),
        f"{name}-bfloat16-few-pixels-to-many-M4": partial(run, FEW_PIXELS_TO_MANY_CONV2D, half, 4),
        f"{name}-tf32-wide": partial(run, WIDE_CONV2D, single),
        f"{name}-float32-ieee-wide": partial(run, WIDE_CONV2D, single, tf32=False),
        f"{name}-float32-ieee-to-few": partial(run, TO_FEW_CONV2D, single, tf32=False),
        f"{name}-float32-ieee-from-few": partial(run, FROM_FEW_CONV2D, single, tf32=False),
        f"{name}-float32-ieee-few-pixels-to-few-M4": partial(run, FEW_PIXELS_TO_FEW_CONV2D, single, 4, tf32=False),
        f"{name}-float32-ieee-few-pixels-M16-channel": partial(run, FEW_PIXELS_CONV2D, single, 16, 64, tf32=False),
    }


CONV2D: Cases = {
    **_conv2d_cases(sample_conv2d),
    **_conv2d_cases(moment_conv2d, mode="categorical", coarse=True),
    **{
        f"moment_conv2d-bfloat16-{name}": partial(
            call_conv2d, moment_conv2d, shape, torch.bfloat16, mode="categorical", coarse=True
        )
        for name, shape in (("pointwise", POINTWISE_CONV2D), ("few-pointwise", FEW_POINTWISE_CONV2D))
    },
}

MOMENT_LINEAR: Cases = {
    **{f"moment_linear-bfloat16-B{batch}": partial(call_moment_linear, batch, torch.bfloat16) for batch in (1, 32, 64)},
    **{f"moment_linear-{_name(dtype)}-B128": partial(call_moment_linear, 128, dtype) for dtype in PRODUCT_DTYPES},
    **{
        f"moment_linear-{_name(dtype)}-B128-M16-K511-channel": partial(call_moment_linear, 128, dtype, 511, 16, 256)
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{
        f"moment_linear-tf32-B{batch}": partial(in_tf32, partial(call_moment_linear, batch, torch.float32))
        for batch in (32, 128)
    },
    "moment_linear-float32-B64-M4": partial(call_moment_linear, 64, torch.float32, 512, 4),
    **{
        f"moment_linear-{_name(dtype)}-B{batch}-M16-K511-straight_through": partial(
            call_moment_linear, batch, dtype, 511, 16, mode="straight_through"
        )
        for dtype, batch in ((torch.float32, 32), (torch.float32, 64), (torch.bfloat16, 128))
    },
    "moment_linear-bfloat16-B128-channel": partial(call_moment_linear, 128, torch.bfloat16, groups=256),
    "moment_linear-bfloat16-B128-exact": partial(call_moment_linear, 128, torch.bfloat16, coarse=False),
    "moment_linear-bfloat16-B128-parts": partial(in_parts, partial(call_moment_linear, 128, torch.bfloat16)),
    **{
        f"moment_linear-bfloat16-B128-{mode}": partial(call_moment_linear, 128, torch.bfloat16, 512, 16, mode=mode)
        for mode in ("gaussian", "straight_through")
    },
    "moment-M3": partial(_moment, 512, 3, 1, "categorical"),
    "moment-M3-K54": partial(_moment, 54, 3, 1, "categorical"),
    "moment-M16-K25-channel": partial(_moment, 25, 16, 64, "categorical"),
    "moment-M16-straight_through": partial(_moment, 512, 16, 1, "straight_through"),
    "moment-gaussian": partial(_moment, 512, 3, 1, "gaussian"),
    "noise": partial(_noisy, (64, 512), torch.contiguous_format),
    "noise-channels_last": partial(_noisy, (4, 16, 8, 8), torch.channels_last),
}


def _spike_slab_kl(num_levels: int, groups: int = 1, columns: int = 4096) -> None:
    weight, log_sigma2, levels, _ = posterior((64, columns), num_levels, groups)
    spike_slab_kl.forward(weight, log_sigma2, levels, levels)
    spike_slab_kl.backward(torch.zeros(()), weight, log_sigma2, levels, levels)


def _mixture_kl(num_levels: int, groups: int = 1, columns: int = 4096) -> None:
    weight, log_sigma2, levels, _ = posterior((64, columns), num_levels, groups)
    mixture_kl.forward(weight, log_sigma2, levels, torch.ones(()), 0.25, 0.1)
    mixture_kl.backward(torch.zeros(()), weight, log_sigma2, levels, torch.ones(()), 0.25, 0.1)


def _assign_codes(num_levels: int, groups: int = 1, columns: int = 4096) -> None:
    weight, _, _, thresholds = posterior((64, columns), num_levels, groups)
    for packed in (False, True):
        assign_codes.assign_codes(weight, thresholds, packed)


_BY_LEVELS = {"spike_slab_kl": _spike_slab_kl, "mixture_kl": _mixture_kl, "assign_codes": _assign_codes}
ELEMENTWISE: Cases = {
    f"{name}-M{num_levels}": partial(call, num_levels)
    for name, call in _BY_LEVELS.items()
    for num_levels in (2, 3, 4, 5, 8, 16)
} | {
    f"{name}-M{num_levels}-K25-channel": partial(call, num_levels, 64, 25)
    for name, call in _BY_LEVELS.items()
    for num_levels in (3, 16)
}
ELEMENTWISE["spike_slab_kl-M3-K25"] = partial(_spike_slab_kl, 3, 1, 25)
ELEMENTWISE["mixture_kl-M3-K25"] = partial(_mixture_kl, 3, 1, 25)


def _packed_weight(channels: int, columns: int, num_levels: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes, levels, bias."""
    codes = torch.zeros(channels, packed_width(columns, num_levels), dtype=torch.uint8)
    levels = torch.arange(num_levels, dtype=torch.float32).expand(groups, -1).contiguous()
    return codes, levels, torch.zeros(channels)


def call_packed_linear(
    batch: int, precision: str, num_levels: int = 3, groups: int = 1, columns: int = 1024, relu: bool = False
) -> None:
    weight = _packed_weight(512, columns, num_levels, groups)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    call = PackedCall(torch.zeros(batch, columns, dtype=dtype), *weight, LinearGeometry(), precision, None, relu)
    dispatch.backend("packed_linear", "triton").run(call)


def call_packed_conv2d(
    shape: tuple[int, int, int, int], channels: int, precision: str, num_levels: int = 3, groups: int = 1
) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    weight = _packed_weight(channels, shape[1] * 9, num_levels, groups)
    geometry = Conv2dGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    call = PackedCall(torch.zeros(shape, dtype=dtype), *weight, geometry, precision, None, False)
    dispatch.backend("packed_conv2d", "triton").run(call)


def _packed_sum(dtype: torch.dtype) -> None:
    parts, rows = torch.zeros(4, 64, 512, dtype=dtype), torch.zeros(64)
    scale = torch.zeros(512) if dtype == torch.int32 else None
    sum_of_parts(parts, Epilogue(scale, rows, torch.zeros(512)), torch.zeros(64, 512), False)


# A name says the operands' dtype.
PACKED: Cases = {
    **{
        f"packed_linear-bfloat16-B{batch}-M3": partial(call_packed_linear, batch, "bf16")
        for batch in (1, 16, 32, 64, 128)
    },
    "packed_linear-bfloat16-B16-M2": partial(call_packed_linear, 16, "bf16", 2),
    "packed_linear-bfloat16-B64-M2": partial(call_packed_linear, 64, "bf16", 2),
    "packed_linear-bfloat16-B1-M16": partial(call_packed_linear, 1, "bf16", 16),
    "packed_linear-bfloat16-B128-M4-channel": partial(call_packed_linear, 128, "bf16", 4, 512),
    "packed_linear-bfloat16-B64-M16-K511-channel": partial(call_packed_linear, 64, "bf16", 16, 512, 511),
    **{f"packed_linear-int8-B{batch}-M3": partial(call_packed_linear, batch, "int8") for batch in (1, 16, 128)},
    "packed_linear-int8-B64-M4-channel": partial(call_packed_linear, 64, "int8", 4, 512),
    **{f"packed_linear-float32-B{batch}-M3": partial(call_packed_linear, batch, "fp32") for batch in (1, 16, 64)},
    "packed_linear-float32-B64-M5-channel": partial(call_packed_linear, 64, "fp32", 5, 512),
    "packed_linear-float32-B32-M16-K511-channel": partial(call_packed_linear, 32, "fp32", 16, 512, 511),
    "packed_linear-bfloat16-B128-M3-relu": partial(call_packed_linear, 128, "bf16", relu=True),
    "packed_linear-float32-B64-M3-relu": partial(call_packed_linear, 64, "fp32", relu=True),
    "packed_conv2d-bfloat16-C128-M3": partial(call_packed_conv2d, (1, 128, 16, 16), 128, "bf16"),
    "packed_conv2d-bfloat16-C3-M16": partial(call_packed_conv2d, (1, 3, 16, 16), 12, "bf16", 16),
    "packed_conv2d-bfloat16-C128-N512-M5": partial(call_packed_conv2d, (1, 128, 8, 8), 512, "bf16", 5),
    "packed_conv2d-int8-C128-M3": partial(call_packed_conv2d, (1, 128, 8, 8), 128, "int8"),
    "packed_conv2d-float32-C128-M3": partial(call_packed_conv2d, (1, 128, 16, 16), 128, "fp32"),
    "packed_sum-float32": partial(_packed_sum, torch.float32),
    "packed_sum-int32": partial(_packed_sum, torch.int32),
}


CASES: Cases = {**SAMPLE_LINEAR, **MOMENT_LINEAR, **CONV2D, **ELEMENTWISE, **PACKED}
