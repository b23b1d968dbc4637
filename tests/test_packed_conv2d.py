"""packed_conv2d against a dense float64 convolution."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import PRECISIONS
from bqnn.core.int8 import round_levels
from bqnn.core.native import cpu_isa
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu_layout import make_layout
from bqnn.ops.packed_conv2d import packed_conv2d
from bqnn.ops.packed_product import decode
from tests.support import formulas
from tests.support.helpers import forced_or_automatic, triton_devices, usable_backends
from tests.support.packed_products import conv2d_case as make_case
from tests.support.packed_products import relative_error
from tests.support.shapes import INTERPRETED

BACKENDS = [param for param in usable_backends("packed_conv2d") if not INTERPRETED or param.values[0][1] == "triton"]
GEOMETRIES: dict[str, tuple[tuple[int, int, int], int | tuple[int, int], dict[str, Any]]] = {
    "1x1": ((1, 1, 1), (1, 1), {}),
    "linear": ((3, 9, 7), 1, {}),
    "lenet1": ((7, 6, 1), (5, 5), {}),
    "stride-padding": ((5, 16, 6), (3, 2), {"stride": (2, 1), "padding": (1, 2)}),
    "dilation": ((3, 9, 4), 3, {"padding": 4, "dilation": (2, 3)}),
    "groups": ((2, 12, 8), (3, 3), {"groups": 4, "padding": 1}),
    "depthwise": ((2, 10, 5), 3, {"groups": 5, "stride": 3}),
}
CASES = [
    pytest.param(num_levels, *case, id=f"M{num_levels}-{name}")
    for name, case in GEOMETRIES.items()
    for num_levels in ((3,) if INTERPRETED and name != "1x1" else range(2, 17))
]


def run(
    backend: tuple[str, str],
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    *args: Any,
    relu: bool = False,
) -> Tensor:
    """The convolution by a backend on its device, moved back; float64 by the one that takes it."""
    device, name = backend
    tensors = [tensor if tensor is None else tensor.to(device) for tensor in (x, codes, levels, bias)]
    return forced_or_automatic(lambda each: packed_conv2d(*tensors, *args, backend=each, relu=relu), name).cpu()


def arguments_of(kernel_size: Any, geometry: dict[str, Any], precision: str = "fp32") -> tuple[Any, ...]:
    """What follows the bias among the arguments of the op."""
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return kernel_size, *(defaults | geometry).values(), precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("num_levels", "shape", "kernel_size", "geometry"), CASES)
def test_fp32(
    num_levels: int,
    granularity: str,
    shape: tuple[int, int, int],
    kernel_size: Any,
    geometry: dict[str, Any],
    backend: tuple[str, str],
) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, granularity, shape, kernel_size, geometry.get("groups", 1))
    y = run(backend, x, codes, levels, bias, *arguments_of(kernel_size, geometry))
    exact = F.conv2d(x.double(), weight, bias.double(), **geometry)
    assert y.shape == exact.shape
    assert y.dtype == torch.float32
    assert relative_error(y, exact) <= 1e-5
    y = run(backend, x.double(), codes, levels, None, *arguments_of(kernel_size, geometry))
    assert relative_error(y, F.conv2d(x.double(), weight, None, **geometry)) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_bf16_rounds_the_operands_only(num_levels: int, backend: tuple[str, str]) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, "channel", (4, 9, 6), 3)
    x *= torch.logspace(-4, 4, 4).view(-1, 1, 1, 1)
    exact = F.conv2d(x.bfloat16().double(), weight.bfloat16().double(), bias.double(), padding=1)
    assert relative_error(run(backend, x, codes, levels, bias, 3, 1, 1, 1, 1, "bf16"), exact) <= 1e-6


def int8_convolution(
    x: Tensor, codes: Tensor, levels: Tensor, bias: Tensor, kernel: tuple[int, int], geometry: dict[str, Any]
) -> Tensor:
    """What "int8" states, a sample at a time: windows by unfold, then formulas.int8_product of one group."""
    options = {"padding": (0, 0), "stride": (1, 1), "dilation": (1, 1), **geometry}
    groups = options.pop("groups", 1)
    columns = x.shape[1] // groups * kernel[0] * kernel[1]
    integers, scale = round_levels(levels, columns)
    weight = decode(codes, integers.float(), columns).numpy()
    scale = scale.expand(len(codes)).numpy()
    size = F.conv2d(x[:, :1], torch.zeros(1, 1, *kernel), **options).shape[2:]
    samples = []
    for image in x:
        windows = F.unfold(image[None], kernel, options["dilation"], options["padding"], options["stride"])[0]
        largest = image.abs().amax().expand(windows.shape[1], 1)
        parts = []
        for g, (w, s, b) in enumerate(zip(*(np.array_split(t, groups) for t in (weight, scale, bias.numpy())))):
            # The scale is the sample's: a last column, with no weight, that holds its largest element.
            rows = torch.cat([windows[g * columns : (g + 1) * columns].t(), largest], 1).numpy()
            parts.append(formulas.int8_product(rows, np.pad(w, ((0, 0), (0, 1))), s, b).T)
        samples.append(torch.from_numpy(np.concatenate(parts)).view(-1, *size))
    return torch.stack(samples)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("num_levels", "shape", "kernel_size", "geometry"), CASES)
def test_int8_gives_the_stated_bits(
    num_levels: int,
    granularity: str,
    shape: tuple[int, int, int],
    kernel_size: Any,
    geometry: dict[str, Any],
    backend: tuple[str, str],
) -> None:
    x, codes, levels, bias, _ = make_case(num_levels, granularity, shape, kernel_size, geometry.get("groups", 1))
    x *= torch.logspace(-30, 30, len(x)).view(-1, 1, 1, 1)
    y = run(backend, x, codes, levels, bias, *arguments_of(kernel_size, geometry, "int8"))
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    assert torch.equal(y, int8_convolution(x, codes, levels, bias, kernel, geometry))
    last = x.contiguous(memory_format=torch.channels_last)
    again = run(backend, last, codes, levels, bias, *arguments_of(kernel_size, geometry, "int8"))
    assert torch.equal(again, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_of_extreme_samples(backend: tuple[str, str]) -> None:
    x, codes, levels, bias, _ = make_case(3, "channel", (5, 9, 6), 3)
    x[0] = 0.0
    x[1] *= 1e-43
    x[2, 1, 2, 3], x[3, 5, -1, -1] = float("nan"), float("-inf")
    y = run(backend, x, codes, levels, bias, 3, 1, 1, 1, 1, "int8")
    assert torch.equal(y[0], bias.view(-1, 1, 1).expand_as(y[0]))
    assert y[2:4].isnan().all()
    x, y = x[[0, 1, 4]], y[[0, 1, 4]]
    assert torch.equal(y, int8_convolution(x, codes, levels, bias, (3, 3), {"padding": (1, 1)}))


@pytest.mark.parametrize("device", triton_devices("packed_conv2d"))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_in_parts(groups: int, granularity: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more processors than tiles, each takes a part of the columns."""
    launch = importlib.import_module("bqnn.kernels.launch")
    monkeypatch.setattr(launch, "processors", lambda device: 5 * groups)
    x, codes, levels, bias, weight = make_case(3, granularity, (1, 6, 64 * groups), (5, 2), groups)
    for b in (bias, None):
        exact = F.conv2d(x.double(), weight, None if b is None else b.double(), groups=groups)
        arguments = (5, 2), 1, 0, 1, groups
        assert relative_error(run((device, "triton"), x, codes, levels, b, *arguments, "fp32"), exact) <= 1e-5
        expected = packed_conv2d(x, codes, levels, b, *arguments, "int8", backend="reference")
        assert torch.equal(run((device, "triton"), x, codes, levels, b, *arguments, "int8"), expected)
        rectified = run((device, "triton"), x, codes, levels, b, *arguments, "int8", relu=True)
        assert torch.equal(rectified, expected.relu())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["channel"] if INTERPRETED else ["tensor", "channel"])
@pytest.mark.parametrize(
    ("num_levels", "shape", "kernel_size", "geometry"),
    [case for case in CASES if case.id.startswith("M3-") or (case.id.endswith("-1x1") and not INTERPRETED)],
)
def test_relu_is_that_of_torch(
    num_levels: int,
    shape: tuple[int, int, int],
    kernel_size: Any,
    geometry: dict[str, Any],
    granularity: str,
    backend: tuple[str, str],
    precision: str,
) -> None:
    x, codes, levels, bias, _ = make_case(num_levels, granularity, shape, kernel_size, geometry.get("groups", 1))
    bias -= 1
    x[-1, 0, 0, 0] = torch.nan
    arguments = arguments_of(kernel_size, geometry, precision)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        y = run(backend, images, codes, levels, bias, *arguments)
        rectified = run(backend, images, codes, levels, bias, *arguments, relu=True)
        assert (y < 0).any() or y.isnan().all()
        assert rectified.stride() == y.stride()
        torch.testing.assert_close(rectified, y.relu(), rtol=0, atol=0, equal_nan=True)
    y = run(backend, x.double(), codes, levels, None, *arguments)
    rectified = run(backend, x.double(), codes, levels, None, *arguments, relu=True)
    torch.testing.assert_close(rectified, y.relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layout_changes_nothing(precision: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "channel", (4, 8, 6), 3, groups=2)
    arguments = (x, codes, levels, bias, 3, 1, 2, (1, 2), 2, precision)
    unread = torch.zeros(0, dtype=torch.uint8)
    y = packed_conv2d(*arguments, backend="reference")
    assert torch.equal(packed_conv2d(*arguments, layout=unread, backend="reference"), y)
    if dispatch.status("packed_conv2d", "cpu", "cpu").usable:
        layout = make_layout(codes, levels, 27, precision, (3, 3), 2, 2)
        y = packed_conv2d(*arguments, backend="cpu")
        assert torch.equal(packed_conv2d(*arguments, layout=layout, backend="cpu"), y)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layouts_and_empty_batch(precision: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "channel", (4, 9, 6), 3)
    y = packed_conv2d(x, codes, levels, bias, 3, precision=precision)
    assert y.is_contiguous()
    last = packed_conv2d(x.contiguous(memory_format=torch.channels_last), codes, levels, bias, 3, precision=precision)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    sliced = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(packed_conv2d(sliced, codes, levels, bias, 3, precision=precision), y)
    half = packed_conv2d(x.half(), codes, levels, bias, 3, precision=precision)
    assert torch.equal(half, packed_conv2d(x.half().float(), codes, levels, bias, 3, precision=precision).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed_conv2d(x, codes, levels, bias, 3, precision=precision), y)
    assert packed_conv2d(x[:0], codes, levels, bias, 3, precision=precision).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
def test_opcheck(precision: str, batch: int, layout: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", (3, 8, 6), 3, groups=2)
    x = x[:batch]
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.stack([x, x], -1)[..., 0]
    geometry = ([3, 3], [2, 1], [1, 0], [1, 2], 2)
    torch.library.opcheck(torch.ops.bqnn.packed_conv2d, (x, codes, levels, bias, *geometry, precision))


@pytest.mark.parametrize("shape", [(3, 1, 6), (1, 1, 1), (2, 5, 1)], ids=str)
def test_opcheck_of_one_channel(shape: tuple[int, int, int]) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", shape, 3)
    for input_ in (x, x.contiguous(memory_format=torch.channels_last)):
        arguments = (input_, codes, levels, bias, [3, 3], [1, 1], [1, 1], [1, 1], 1, "fp32", None, "reference")
        torch.library.opcheck(torch.ops.bqnn.packed_conv2d, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", (4, 9, 6), 3)
    compiled = torch.compile(packed_conv2d, backend=compiler, fullgraph=True)
    expected = packed_conv2d(x, codes, levels, bias, 3, padding=1)
    torch.testing.assert_close(compiled(x, codes, levels, bias, 3, padding=1), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_is_that_of_the_decoded_weight(precision: str) -> None:
    x, codes, levels, bias, weight = make_case(3, "tensor", (4, 9, 6), 3)
    y = packed_conv2d(x.requires_grad_(), codes, levels, bias, 3, precision=precision)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    exact = x.detach().double().requires_grad_()
    F.conv2d(exact, weight).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["levels", "bias"])
def test_other_gradients_are_refused(name: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", (4, 9, 6), 3)
    {"levels": levels, "bias": bias}[name].requires_grad_()
    y = packed_conv2d(x, codes, levels, bias, 3)
    with pytest.raises(NotImplementedError, match="no gradient for levels and bias"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"x": torch.zeros(6, 11, 13)}, ValueError, r"x must .* got \[6, 11, 13\]", id="x-3d"),
        pytest.param({"x": torch.zeros(1, 6, 2, 13)}, ValueError, "x must be large enough", id="x-small"),
        pytest.param(
            {"x": torch.zeros(1, 7, 11, 13)}, ValueError, "codes must have 13 bytes .* got 11", id="x-channels"
        ),
        pytest.param({"x": torch.zeros(1, 0, 11, 13)}, ValueError, "must be 1 or more, got 0", id="x-no-channels"),
        pytest.param({"x": torch.zeros(1, 6, 11, 13).long()}, TypeError, "x must be floating point", id="x-dtype"),
        pytest.param({"codes": torch.zeros(9, 11)}, TypeError, "codes must be torch.uint8", id="codes-dtype"),
        pytest.param({"levels": torch.zeros(3, 3)}, ValueError, r"levels must .* got \[3, 3\]", id="levels-shape"),
        pytest.param({"bias": torch.zeros(1, 9)}, ValueError, "bias must have the shape", id="bias-shape"),
        pytest.param({"groups": 2}, ValueError, "groups must divide .* got 2 for 6 and 9", id="groups"),
        pytest.param({"groups": 0}, ValueError, "groups must divide .* got 0", id="groups-0"),
        pytest.param({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be one integer or two", id="kernel"),
        pytest.param({"stride": 0}, ValueError, "stride must .* got 0", id="stride"),
        pytest.param({"padding": (-1, 0)}, ValueError, "padding must .* 0 or more", id="padding"),
        pytest.param({"dilation": 0}, ValueError, "dilation must .* got 0", id="dilation"),
        pytest.param({"precision": "int4"}, ValueError, "precision must .* got 'int4'", id="precision"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", (4, 9, 6), 3)
    arguments = {"x": x, "codes": codes, "levels": levels, "bias": bias, "kernel_size": 3}
    with pytest.raises(error, match=message):
        packed_conv2d(**(arguments | change))


@pytest.mark.skipif(cpu_isa() == "none", reason="no CPU kernels")
@pytest.mark.parametrize("num_levels", [2, 3])
@pytest.mark.parametrize("channels", [136, 272, 288, 400])
def test_threads_write_their_own_channels(channels: int, num_levels: int) -> None:
    """Channels that are no whole parts: whoever is first, no thread writes what is another's."""
    before = torch.get_num_threads()
    try:
        for size, kernel in ((13, 1), (14, 1), (9, 3)):
            _, codes, levels, bias, weight = make_case(num_levels, "tensor", (1, channels, 48), kernel)
            x = torch.randn(1, 48, size, size)
            exact = F.conv2d(x.double(), weight, bias.double())
            for threads in (2, 3, 4):
                torch.set_num_threads(threads)
                for _ in range(5):
                    y = run(("cpu", "cpu"), x, codes, levels, bias, *arguments_of(kernel, {}))
                    assert relative_error(y, exact) <= 1e-5, (size, kernel, threads)
    finally:
        torch.set_num_threads(before)
