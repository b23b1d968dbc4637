"""The CUDA kernels of packed_linear: on a GPU where there is one, and on the host, which needs none.

The host walks blocks, threads and lanes through the kernel's own index, decoding and summing functions, in
cuda_probe.cpp; the product of a tensor core is a loop there.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn import PackedLinear
from bqnn.core import native
from bqnn.core.codes import pack_codes
from bqnn.core.geometry import LinearGeometry
from bqnn.core.int8 import quantize_rows
from bqnn.ops import dispatch
from bqnn.ops.backends import cuda_packed, gpu_layout
from bqnn.ops.backends.cuda_packed import MAX_ROWS
from bqnn.ops.backends.gpu_layout import make_gpu_layout, row_words
from bqnn.ops.packed_linear import packed_linear
from bqnn.ops.packed_product import PackedCall
from tests.support.packed_products import linear_case as make_case
from tests.support.packed_products import relative_error
from tests.support.shapes import EVERY_M, GRANULARITIES

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
MODES = ("fp32", "bf16", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Call(ctypes.Structure):
    """PackedLinearCall of csrc/cuda/packed_linear.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("words", "levels", "integers", "x", "bias", "scale")]
        + [(name, ctypes.c_void_p) for name in ("row_scale", "partial", "y")]
        + [("channels", ctypes.c_int64)]
        + [(name, ctypes.c_int32) for name in ("row_loads", "x_columns", "rows", "num_levels", "codebooks")]
        + [(name, ctypes.c_int32) for name in ("mode", "x_element", "y_element", "row_warps", "splits", "relu")]
    )


class RoundCall(ctypes.Structure):
    """RoundRowsCall of csrc/cuda/packed_linear.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "q", "scale")]
        + [("columns", ctypes.c_int64)]
        + [(name, ctypes.c_int32) for name in ("rows", "x_element")]
    )


def call_of(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    precision: str,
    layout: Tensor | None = None,
    relu: bool = False,
) -> PackedCall:
    return PackedCall(x, codes, levels, bias, LinearGeometry(), precision, layout, relu)


def packed_linear_cuda(*arguments: Any, relu: bool = False) -> Tensor:
    return cuda_packed.packed_linear_cuda(call_of(*arguments, relu=relu))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Host:
    """Stands in for torch.ops.bqnn_cuda.packed_linear; divides the columns over ``splits`` blocks."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.splits, self.launches = library, 1, 0

    def __call__(
        self,
        x: Tensor,
        words: Tensor,
        levels: Tensor,
        integers: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        row_scale: Tensor | None,
        precision: str,
        relu: bool,
        y: Tensor,
    ) -> None:
        tensors = (words, levels, integers, x, bias, scale, row_scale, None, y)
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        numbers = (y.shape[1], words.shape[1] // 4, x.shape[1], len(x), levels.shape[1], len(levels))
        kinds = (MODES.index(precision), DTYPES.index(x.dtype), DTYPES.index(y.dtype))
        call = Call(*map(pointer, tensors), *numbers, *kinds)
        self.library.probe_divide(ctypes.byref(call), 1)
        call.splits, call.relu = self.splits, relu
        partial = torch.full((call.splits, *y.shape), torch.nan)
        call.partial = pointer(partial)
        self.library.probe_packed_linear(ctypes.byref(call))
        self.launches += 1

    def round_rows(self, x: Tensor, q: Tensor, scale: Tensor) -> None:
        assert x.is_contiguous() and q.is_contiguous()
        call = RoundCall(*map(pointer, (x, q, scale)), x.shape[1], len(x), DTYPES.index(x.dtype))
        self.library.probe_round_rows(ctypes.byref(call))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda") / "probe.so"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(COMPILER), *options, str(ROOT / "tests" / "cuda_probe.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Host:
    stand_in = Host(library)
    monkeypatch.setattr(cuda_packed, "_launch", stand_in)
    monkeypatch.setattr(cuda_packed, "_round_rows", stand_in.round_rows)
    return stand_in


Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None", str], Tensor]
"""x, codes, levels, bias and precision, on the CPU, to y."""


@pytest.fixture(params=["host", "gpu"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "host":
        request.getfixturevalue("host")
        return lambda *arguments: packed_linear_cuda(*arguments, None)
    if native.cuda_missing():
        pytest.skip(native.cuda_missing())

    def on_gpu(*arguments: Tensor | str | None) -> Tensor:
        here = [argument.cuda() if isinstance(argument, Tensor) else argument for argument in arguments]
        return packed_linear_cuda(*here, None).cpu()  # type: ignore[arg-type]

    return on_gpu


# A tensor core cuts off what a float32 sum rounds: a sum may have this relative error.
ROUNDING = 5e-6
SHAPES = [
    pytest.param(rows, channels, columns, id=f"B{rows}-N{channels}-K{columns}")
    for rows, channels, columns in [(1, 1, 1), (1, 129, 341), (2, 33, 1031), (3, 7, 129), (8, 141, 63), (16, 35, 300)]
]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize(("rows", "channels", "columns"), SHAPES)
def test_every_precision(num_levels: int, granularity: str, rows: int, channels: int, columns: int, run: Run) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, granularity, rows, channels, columns)
    fp32 = run(x, codes, levels, bias, "fp32")
    assert relative_error(fp32, F.linear(x.double(), weight, bias.double())) <= ROUNDING
    bf16 = run(x, codes, levels, bias, "bf16")
    assert relative_error(bf16, F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())) <= ROUNDING
    for b in (bias, None):
        int8 = run(x, codes, levels, b, "int8")
        assert torch.equal(int8, packed_linear(x, codes, levels, b, "int8", backend="reference"))


@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_levels", [2, 3, 7, 16])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_half_activations(rows: int, num_levels: int, dtype: torch.dtype, precision: str, run: Run) -> None:
    x, codes, levels, bias, _ = make_case(num_levels, "channel", rows, 37, 261)
    x, bias = x.to(dtype), bias.to(dtype)
    y = run(x, codes, levels, bias, precision)
    wide = x.float() if precision == "int8" else x.double()
    exact = packed_linear(wide, codes, levels, bias, precision, backend="reference")
    assert y.dtype == dtype
    # One rounding, but for the few sums that lie at the border between two values.
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * 0.51 * exact.abs().max()
    if precision == "int8":
        assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_identity_gives_the_levels_bit_for_bit(num_levels: int, granularity: str, run: Run) -> None:
    _, codes, levels, _, weight = make_case(num_levels, granularity, 1, 21, 31)
    for rows in torch.eye(31).split(MAX_ROWS):
        fp32 = run(rows, codes, levels, None, "fp32")
        bf16 = run(rows, codes, levels, None, "bf16")
        column = slice(int(rows[0].argmax()), int(rows[-1].argmax()) + 1)
        assert torch.equal(fp32, weight.float().t()[column])
        assert torch.equal(bf16, weight.bfloat16().float().t()[column])


@pytest.mark.parametrize("num_levels", [2, 4, 16])
@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("rows", [1, 16])
def test_columns_shared_among_blocks(num_levels: int, precision: str, rows: int, host: Host) -> None:
    x, codes, levels, bias, _ = make_case(num_levels, "tensor", rows, 9, 2231)
    y = packed_linear_cuda(x, codes, levels, bias, precision, None)
    host.splits = 4  # one of them has nothing to do where a step is 512 columns
    shared = packed_linear_cuda(x, codes, levels, bias, precision, None)
    if precision == "int8":
        assert torch.equal(shared, y)
    else:
        assert relative_error(shared, y.double()) <= 1e-6


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_relu_is_that_of_torch(num_levels: int, precision: str, splits: int, host: Host) -> None:
    x, codes, levels, bias, _ = make_case(num_levels, "channel", 3, 9, 1100)
    x[2, 7], host.splits = torch.nan, splits
    for given in (x, x.half(), x.bfloat16()):
        for b in (bias, None):
            y = packed_linear_cuda(given, codes, levels, b, precision, None)
            rectified = packed_linear_cuda(given, codes, levels, b, precision, None, relu=True)
            assert (y < 0).any()
            torch.testing.assert_close(rectified, y.relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("rows", "channels", "columns", "num_levels", "mode", "row_warps", "splits"),
    [
        pytest.param(1, 16384, 16384, 3, "bf16", 1, 1, id="B1-enough-blocks"),
        pytest.param(1, 4096, 4096, 3, "bf16", 1, 1, id="B1-too-little-work"),
        pytest.param(1, 4096, 16384, 3, "fp32", 4, 4, id="B1-three-parts"),
        pytest.param(8, 16384, 16384, 3, "bf16", 8, 4, id="B8"),
        pytest.param(16, 8192, 8192, 16, "bf16", 8, 8, id="B16"),
        pytest.param(16, 64, 64, 2, "fp32", 8, 1, id="small"),
    ],
)
def test_division_of_the_work_over_132_multiprocessors(
    rows: int,
    channels: int,
    columns: int,
    num_levels: int,
    mode: str,
    row_warps: int,
    splits: int,
    library: ctypes.CDLL,
) -> None:
    call = Call(channels=channels, row_loads=row_words(num_levels, columns) // 4, rows=rows, num_levels=num_levels)
    call.mode = MODES.index(mode)
    library.probe_divide(ctypes.byref(call), 132)
    assert (call.row_warps, call.splits) == (row_warps, splits)


@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_int8_sums_are_exact_beyond_24_bits(num_levels: int, run: Run) -> None:
    index = (torch.arange(8463) % 3 == 0).byte()[None] * (num_levels - 1)
    levels, x = torch.linspace(126.0, 127.0, num_levels)[None], torch.full((1, 8463), 127.0)
    y = run(x, pack_codes(index, num_levels), levels, None, "int8")
    assert y > 2**26
    assert torch.equal(y, packed_linear(x, pack_codes(index, num_levels), levels, None, "int8", backend="reference"))


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 5000])
def test_rows_are_rounded_by_the_rule(
    columns: int, dtype: torch.dtype, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "host":
        request.getfixturevalue("host")
    elif native.cuda_missing():
        pytest.skip(native.cuda_missing())
    x = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    x[:, 0] = 1.0
    x = (x * torch.logspace(-37, 37, 9)[:, None]).to(dtype)
    x[3] = 0.0
    x[4] = 127.0 * (torch.arange(columns) == 0) + 0.5 * (torch.arange(columns) % 2)  # these are ties
    x[5, -1], x[6, 0] = float("nan"), float("-inf")
    x[7, 0] = torch.finfo(dtype).smallest_normal / 4
    here = x if where == "host" else x.cuda()
    q, scale = torch.empty_like(here, dtype=torch.bfloat16), torch.empty(9, device=here.device)
    cuda_packed._round_rows(here, q, scale)
    expected, expected_scale = quantize_rows(x.float())
    assert torch.equal(q.cpu().float(), expected)
    assert torch.equal(scale.cpu().nan_to_num(-1.0), expected_scale.flatten().nan_to_num(-1.0))


def test_wide_range_of_float32(run: Run) -> None:
    x, codes, levels, bias, weight = make_case(5, "channel", 4, 9, 77)
    x *= torch.tensor([1e-25, 1e-12, 1e12, 1e30])[:, None]
    y = run(x, codes, levels, None, "fp32")
    for row, exact in zip(y, F.linear(x.double(), weight)):
        assert relative_error(row, exact) <= ROUNDING


def test_strides_alignment_and_leading_dimensions(host: Host) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 12, 5, 24)
    y = packed_linear_cuda(x, codes, levels, bias, "fp32", None)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(12, 24)
    assert shifted.data_ptr() % 16
    for variant in (x.t().contiguous().t(), shifted):
        assert torch.equal(packed_linear_cuda(variant, codes, levels, bias, "fp32", None), y)
    folded = packed_linear_cuda(x.view(3, 4, 24), codes, levels, bias, "fp32", None)
    assert torch.equal(folded, y.view(3, 4, 5))
    assert packed_linear_cuda(x[:0], codes, levels, bias, "fp32", None).shape == (0, 5)
    layout = make_gpu_layout(codes, levels, 24, "fp32")
    assert torch.equal(packed_linear_cuda(x, codes, levels, bias, "fp32", layout), y)


@pytest.mark.parametrize(
    ("rows", "dtype", "reason"),
    [
        (MAX_ROWS, torch.float32, ""),
        (MAX_ROWS, torch.float16, ""),
        (MAX_ROWS + 1, torch.float32, "it takes up to 16 rows, got 17"),
        (2, torch.float64, "it takes float32, bfloat16 and float16 activations, got float64"),
    ],
)
def test_many_rows_and_float64_are_not_served(rows: int, dtype: torch.dtype, reason: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", rows, 5, 21)
    assert dispatch.backend("packed_linear", "cuda").serves(call_of(x.to(dtype), codes, levels, bias, "fp32")) == reason


def test_a_layout_is_made_once_for_a_weight(host: Host) -> None:
    x, codes, levels, bias, weight = make_case(3, "channel", 4, 9, 77)
    kept = len(gpu_layout.layouts)
    for half in (False, True, False):
        y = packed_linear_cuda(x.half() if half else x, codes, levels, bias, "fp32")
        assert relative_error(y, F.linear(x.double(), weight, bias.double())) <= (1e-3 if half else ROUNDING)
    assert host.launches == 3
    assert len(gpu_layout.layouts) == kept + 1
    levels += 1.0  # a change in place makes it stale
    y = packed_linear_cuda(x, codes, levels, bias, "fp32")
    assert relative_error(y, F.linear(x.double(), weight + 1.0, bias.double())) <= ROUNDING
    assert len(gpu_layout.layouts) == kept + 1
    del codes
    assert len(gpu_layout.layouts) == kept


def test_why_the_backend_can_not_run() -> None:
    assert "the tensors are on cpu" in dispatch.status("packed_linear", "cuda", "cpu").reason
    state = dispatch.status("packed_linear", "cuda", "cuda")
    assert state.reason == native.cuda_missing()
    if not torch.cuda.is_available():
        assert "no GPU" in state.reason


def replayed(net: Any, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of ``net`` on ``x``, and the output that it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        net(x)  # the first call makes layouts
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
    return graph, y


@pytest.mark.skipif(bool(native.cuda_missing()), reason=native.cuda_missing())
@pytest.mark.parametrize("precision", MODES)
def test_a_cuda_graph_of_a_packed_network(precision: str) -> None:
    layers = []
    for columns, channels in ((1000, 4096), (4096, 33)):
        _, codes, levels, bias, _ = make_case(3, "channel", 1, channels, columns)
        layers.append(PackedLinear(columns, codes, levels, bias, precision, "packed", relu=channels > 33))
    net = torch.nn.Sequential(*layers).cuda()
    x = torch.randn(8, 1000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.inference_mode():
        graph, y = replayed(net, x)
        for seed in range(3):
            x.copy_(torch.randn(8, 1000, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
            graph.replay()
            assert torch.equal(y, net(x))
