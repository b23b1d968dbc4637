"""packed_linear against a dense float64 product."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn import BackendError
from bqnn.core.check import PRECISIONS
from bqnn.core.codes import pack_codes
from bqnn.core.int8 import integer_limit
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu_layout import make_layout
from bqnn.ops.packed_linear import packed_linear
from bqnn.ops.packed_product import decode
from tests.support import formulas
from tests.support.helpers import forced_or_automatic, triton_devices, usable_backends
from tests.support.packed_products import linear_case as make_case
from tests.support.packed_products import relative_error
from tests.support.shapes import EVERY_M, GRANULARITIES, INTERPRETED, SOME_M

BACKENDS = [param for param in usable_backends("packed_linear") if not INTERPRETED or param.values[0][1] == "triton"]
SHAPES = [
    pytest.param(rows, channels, columns, id=f"B{rows}-N{channels}-K{columns}")
    for rows, channels, columns in (
        [(1, 1, 1), (1, 29, 141), (17, 7, 63)]
        if INTERPRETED
        else [(1, 1, 1), (1, 129, 341), (63, 7, 63), (5, 341, 129)]
    )
]


def int8_weight(codes: Tensor, levels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """What "int8" makes of a packed weight: integers [N, columns] as float32, and scale [N, 1]."""
    limit = integer_limit(columns, levels.shape[1])
    codebooks = [formulas.int8_codebook(row, limit) for row in levels.tolist()]
    integers = torch.tensor([row for row, _ in codebooks], dtype=torch.float32)
    scale = torch.tensor([float(s) for _, s in codebooks]).unsqueeze(1)
    return decode(codes, integers, columns), scale.expand(len(codes), 1)


def run(
    backend: tuple[str, str],
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    bias: Tensor | None = None,
    precision: str = "fp32",
    relu: bool = False,
) -> Tensor:
    """The product by a backend on its device, moved back; float64 by the one that takes it."""
    device, name = backend
    tensors = [tensor if tensor is None else tensor.to(device) for tensor in (x, codes, levels, bias)]
    return forced_or_automatic(lambda each: packed_linear(*tensors, precision, backend=each, relu=relu), name).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize(("rows", "channels", "columns"), SHAPES)
def test_fp32(
    num_levels: int, granularity: str, rows: int, channels: int, columns: int, backend: tuple[str, str]
) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, granularity, rows, channels, columns)
    y = run(backend, x, codes, levels, bias)
    assert y.dtype == torch.float32
    assert relative_error(y, F.linear(x.double(), weight, bias.double())) <= 1e-5
    assert relative_error(run(backend, x.double(), codes, levels), F.linear(x.double(), weight)) <= 1e-12


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_identity_gives_the_levels_bit_for_bit(
    num_levels: int, granularity: str, backend: tuple[str, str], precision: str
) -> None:
    _, codes, levels, _, weight = make_case(num_levels, granularity, 1, 13, 31)
    assert torch.equal(decode(codes, levels, 31), weight.float())
    expected = weight.float()
    if precision == "bf16":
        expected = expected.bfloat16().float()
    elif precision == "int8":
        integers, scale = int8_weight(codes, levels, 31)
        expected = (127 * integers * scale) * (torch.tensor(1.0) / 127)
    assert torch.equal(run(backend, torch.eye(31), codes, levels, precision=precision), expected.t())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_bf16_rounds_the_operands_only(num_levels: int, backend: tuple[str, str]) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, "channel", 17, 33, 129)
    exact = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert relative_error(run(backend, x, codes, levels, bias, "bf16"), exact) <= 1e-6
    assert 1e-4 < relative_error(exact, F.linear(x.double(), weight, bias.double())) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize(("rows", "channels", "columns"), SHAPES)
def test_int8_gives_the_stated_bits(
    num_levels: int, granularity: str, rows: int, channels: int, columns: int, backend: tuple[str, str]
) -> None:
    x, codes, levels, bias, _ = make_case(num_levels, granularity, rows, channels, columns)
    x *= torch.logspace(-30, 30, rows)[:, None]  # float32 has no square of the outer ones
    integers, scale = (tensor.numpy() for tensor in int8_weight(codes, levels, columns))
    for b in (bias, None):
        y = run(backend, x, codes, levels, b, "int8")
        expected = formulas.int8_product(x.numpy(), integers, scale[:, 0], None if b is None else b.numpy())
        assert torch.equal(y, torch.from_numpy(expected))
    y = run(backend, x.double(), codes, levels, bias, "int8")
    expected = formulas.int8_product(x.double().numpy(), integers, scale[:, 0], bias.numpy(), dtype=np.float64)
    assert torch.equal(y, torch.from_numpy(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_sums_are_exact_beyond_24_bits(backend: tuple[str, str]) -> None:
    index = torch.arange(4231) % 3 == 0
    levels, x = torch.tensor([[126.0, 127.0]]), torch.full((1, 4231), 127.0)  # both scales are 1
    total = 127 * (126 * len(index) + index.sum())
    assert total > 2**24
    y = run(backend, x, pack_codes(index[None].byte(), 2), levels, precision="int8")
    assert y.item() == total.float().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_of_extreme_rows(backend: tuple[str, str]) -> None:
    x = torch.tensor([[0.0, 0.0], [3e38, 1e38], [2e-43, -1e-43], [float("nan"), 1.0], [1.0, float("-inf")]])
    codes, levels = pack_codes(torch.tensor([[0, 1]], dtype=torch.uint8), 2), torch.tensor([[-1.0, 1.0]])
    y = run(backend, x, codes, levels, precision="int8").flatten()
    integers, scale = (tensor.numpy() for tensor in int8_weight(codes, levels, 2))
    expected = formulas.int8_product(x[:3].numpy(), integers, scale[:, 0], None)
    assert torch.equal(y[:3], torch.from_numpy(expected).flatten())
    assert y[0] == 0
    assert y[1:3].ne(0).all()
    assert y[3:].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_computes_what_the_reference_does(backend: tuple[str, str], precision: str) -> None:
    x, codes, levels, bias, _ = make_case(5, "channel", 17, 33, 129)
    y = run(backend, x, codes, levels, bias, precision)
    expected = packed_linear(x.double(), codes, levels, bias, precision, backend="reference")
    if precision == "int8":
        assert torch.equal(y, packed_linear(x, codes, levels, bias, precision, backend="reference"))
    elif precision == "fp32":
        assert relative_error(y, expected) <= 1e-5
    else:
        x = x.bfloat16().float()  # float64 activations are rounded from float64
        assert relative_error(y, packed_linear(x.double(), codes, levels, bias, precision, backend="reference")) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 16, 33, 65, 130, 300])
@pytest.mark.parametrize("num_levels", [2, 3, 4, 5])
def test_any_number_of_rows(num_levels: int, rows: int, backend: tuple[str, str]) -> None:
    if INTERPRETED and rows > 16 and num_levels != 3:
        pytest.skip("too slow to interpret: seconds")
    channels, columns = (20, 300) if INTERPRETED else (70, 600)
    x, codes, levels, bias, weight = make_case(num_levels, "channel", rows, channels, columns)
    exact = F.linear(x.double(), weight, bias.double())
    assert relative_error(run(backend, x, codes, levels, bias), exact) <= 1e-5
    expected = packed_linear(x, codes, levels, bias, "int8", backend="reference")
    assert torch.equal(run(backend, x, codes, levels, bias, "int8"), expected)
    rounded = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert relative_error(run(backend, x, codes, levels, bias, "bf16"), rounded) <= 1e-6


@pytest.mark.parametrize("device", triton_devices("packed_linear"))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("processors", [2, 5, 64])
def test_a_product_in_parts(processors: int, granularity: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more processors than tiles, each takes a part of the columns."""
    launch = importlib.import_module("bqnn.kernels.launch")
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    assert launch.splits_of((1, 1), 48, 16, torch.device(device))[0] > 1
    x, codes, levels, bias, weight = make_case(3, granularity, 20, 9, 700)
    for b in (bias, None):
        exact = F.linear(x.double(), weight, None if b is None else b.double())
        assert relative_error(run((device, "triton"), x, codes, levels, b), exact) <= 1e-5
        expected = packed_linear(x, codes, levels, b, "int8", backend="reference")
        assert torch.equal(run((device, "triton"), x, codes, levels, b, "int8"), expected)
        assert torch.equal(run((device, "triton"), x, codes, levels, b, "int8", relu=True), expected.relu())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["channel"] if INTERPRETED else GRANULARITIES)
@pytest.mark.parametrize("num_levels", SOME_M if INTERPRETED else EVERY_M)
def test_relu_is_that_of_torch(num_levels: int, granularity: str, backend: tuple[str, str], precision: str) -> None:
    for rows in (1, 6) if INTERPRETED else (1, 2, 6, 40):
        x, codes, levels, bias, _ = make_case(num_levels, granularity, rows, 37, 21)
        if rows > 1:
            x[-1, 0] = torch.nan
        for b in (bias, None):
            y = run(backend, x, codes, levels, b, precision)
            assert (y < 0).any()
            torch.testing.assert_close(
                run(backend, x, codes, levels, b, precision, relu=True), y.relu(), rtol=0, atol=0, equal_nan=True
            )
    if INTERPRETED:
        return
    half = run(backend, x.half(), codes, levels, bias.half(), precision)
    rectified = run(backend, x.half(), codes, levels, bias.half(), precision, relu=True)
    torch.testing.assert_close(rectified, half.relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layout_changes_nothing(precision: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    unread = torch.zeros(0, dtype=torch.uint8)
    y = packed_linear(x, codes, levels, bias, precision, backend="reference")
    assert torch.equal(packed_linear(x, codes, levels, bias, precision, unread, "reference"), y)
    if dispatch.status("packed_linear", "cpu", "cpu").usable:
        layout = make_layout(codes, levels, 21, precision)
        y = packed_linear(x, codes, levels, bias, precision, backend="cpu")
        assert torch.equal(packed_linear(x, codes, levels, bias, precision, layout, "cpu"), y)
        half = packed_linear(x.half(), codes, levels, bias.half(), precision, layout, "cpu")
        assert torch.equal(half, packed_linear(x.half(), codes, levels, bias.half(), precision, None, "cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_strides_and_leading_dimensions(precision: str, backend: tuple[str, str]) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 12, 5, 21)
    # Eighths have exact sums, in whatever order a GEMM takes the terms for these strides and rows.
    x, levels, bias = ((tensor * 8).round() / 8 for tensor in (x, levels, bias))
    multiply = partial(run, backend, codes=codes, levels=levels, bias=bias, precision=precision)
    y = multiply(x=x)
    assert torch.equal(multiply(x=x.t().contiguous().t()), y)
    assert torch.equal(multiply(x=x.view(3, 4, 21)), y.view(3, 4, 5))
    torch.testing.assert_close(multiply(x=x[0]), y[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_batch(precision: str) -> None:
    _, codes, levels, bias, _ = make_case(3, "tensor", 1, 5, 21)
    assert packed_linear(torch.empty(0, 21), codes, levels, bias, precision).shape == (0, 5)
    assert packed_linear(torch.empty(2, 0, 21), codes, levels, bias, precision).shape == (2, 0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_activations_are_computed_in_float32(
    precision: str, dtype: torch.dtype, rows: int, backend: tuple[str, str]
) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", rows, 5, 21)
    x, bias = x.to(dtype), bias.to(dtype)
    y = run(backend, x, codes, levels, bias, precision)
    assert torch.equal(y, run(backend, x.float(), codes, levels, bias, precision).to(dtype))


def test_autocast_leaves_the_precision_alone() -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 12, 5, 21)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x, codes, levels, bias)
    assert torch.equal(y, packed_linear(x, codes, levels, bias))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(4, 21), (2, 3, 21), (21,), (0, 21)], ids=str)
def test_opcheck(precision: str, shape: tuple[int, ...]) -> None:
    _, codes, levels, bias, _ = make_case(3, "channel", 4, 5, 21)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.bqnn.packed_linear, (x, codes, levels, bias, precision))
    torch.library.opcheck(torch.ops.bqnn.packed_linear, (x, codes, levels, None, precision, None, "reference"))
    torch.library.opcheck(torch.ops.bqnn.packed_linear, (x, codes, levels, bias, precision), {"relu": True})


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    compiled = torch.compile(packed_linear, backend=compiler, fullgraph=True)
    y = packed_linear(x, codes, levels, bias)
    torch.testing.assert_close(compiled(x, codes, levels, bias), y)
    torch.testing.assert_close(compiled(x, codes, levels, bias, relu=True), y.relu())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_is_that_of_the_decoded_weight(precision: str) -> None:
    x, codes, levels, bias, weight = make_case(3, "tensor", 4, 5, 21)
    y = packed_linear(x.requires_grad_(), codes, levels, bias, precision=precision)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    exact = x.detach().double().requires_grad_()
    F.linear(exact, weight).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["levels", "bias"])
def test_other_gradients_are_refused(name: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    {"levels": levels, "bias": bias}[name].requires_grad_()
    y = packed_linear(x, codes, levels, bias)
    with pytest.raises(NotImplementedError, match="no gradient for levels and bias"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"x": torch.zeros(4, 21).int()}, TypeError, "x must be floating point", id="x-dtype"),
        pytest.param({"x": torch.zeros(4, 29)}, ValueError, "codes must have 6 bytes .* 29 weights .* got 5", id="x-K"),
        pytest.param({"x": torch.tensor(1.0)}, ValueError, "x must have the shape", id="x-scalar"),
        pytest.param({"x": torch.zeros(4, 0)}, ValueError, "must be 1 or more, got 0", id="x-no-columns"),
        pytest.param({"x": torch.zeros(4, 21, device="meta")}, ValueError, "x is on meta", id="device"),
        pytest.param({"codes": torch.zeros(5, 5)}, TypeError, "codes must be torch.uint8", id="codes-dtype"),
        pytest.param({"codes": torch.zeros(25).byte()}, ValueError, r"codes must .* got \[25\]", id="codes-1d"),
        pytest.param(
            {"levels": torch.zeros(1, 3).double()}, TypeError, "levels must be torch.float32", id="levels-dtype"
        ),
        pytest.param({"levels": torch.zeros(2, 3)}, ValueError, r"levels must .* got \[2, 3\]", id="levels-rows"),
        pytest.param({"levels": torch.zeros(1, 17)}, ValueError, r"levels must .* got \[1, 17\]", id="levels-17"),
        pytest.param({"levels": torch.zeros(3)}, ValueError, r"levels must .* got \[3\]", id="levels-1d"),
        pytest.param(
            {"bias": torch.zeros(4)}, ValueError, r"bias must have the shape \[5\], got \[4\]", id="bias-shape"
        ),
        pytest.param({"bias": torch.zeros(5).int()}, TypeError, "bias must be floating point", id="bias-dtype"),
        pytest.param({"precision": "fp16"}, ValueError, "precision must be .* got 'fp16'", id="precision"),
        pytest.param(
            {"x": torch.zeros(1, 1_200_000), "codes": torch.zeros(5, 600_000).byte(), "levels": torch.zeros(1, 16)}
            | {"precision": "int8"},
            ValueError,
            "precision must not be 'int8' for 16 levels and more than 1127288 weights .* got 1200000",
            id="int8-overflow",
        ),
        pytest.param({"backend": "tpu"}, BackendError, "no such backend", id="backend"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    arguments: dict[str, object] = {"x": x, "codes": codes, "levels": levels, "bias": bias}
    with pytest.raises(error, match=message):
        packed_linear(**(arguments | change))  # type: ignore[arg-type]
