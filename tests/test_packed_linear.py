"""packed_linear against a dense float64 product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn import BackendError
from bqnn.ops._packed import PRECISIONS, decode, quantize_rows
from bqnn.ops.packed_linear import packed_linear
from bqnn.packing import pack_codes

EVERY_M = [pytest.param(m, id=f"M{m}") for m in range(2, 17)]
GRANULARITIES = ["tensor", "channel"]
SHAPES = [
    pytest.param(rows, channels, columns, id=f"B{rows}-N{channels}-K{columns}")
    for rows, channels, columns in [(1, 1, 1), (1, 129, 341), (63, 7, 63), (5, 341, 129)]
]


def make_case(
    num_levels: int, granularity: str, rows: int, channels: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, codes (packed), levels, bias and the dense float64 weight of those codes."""
    generator = torch.Generator().manual_seed(num_levels * 10_000 + rows + channels + columns)
    codes = torch.randint(num_levels, (channels, columns), generator=generator, dtype=torch.uint8)
    codebooks = channels if granularity == "channel" else 1
    levels = torch.randn(codebooks, num_levels, generator=generator).sort(1).values
    weight = torch.stack([levels[n % codebooks][codes[n].long()] for n in range(channels)]).double()
    x = torch.randn(rows, columns, generator=generator)
    return x, pack_codes(codes, num_levels), levels, torch.randn(channels, generator=generator), weight


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
@pytest.mark.parametrize(("rows", "channels", "columns"), SHAPES)
def test_fp32(num_levels: int, granularity: str, rows: int, channels: int, columns: int) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, granularity, rows, channels, columns)
    y = packed_linear(x, codes, levels, bias)
    assert y.dtype == torch.float32
    assert relative_error(y, F.linear(x.double(), weight, bias.double())) <= 1e-5
    assert relative_error(packed_linear(x.double(), codes, levels), F.linear(x.double(), weight)) <= 1e-12


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_identity_gives_the_levels_bit_for_bit(num_levels: int, granularity: str) -> None:
    _, codes, levels, _, weight = make_case(num_levels, granularity, 1, 13, 31)
    assert torch.equal(decode(codes, levels, 31), weight.float())
    assert torch.equal(packed_linear(torch.eye(31), codes, levels), weight.float().t())
    bf16 = packed_linear(torch.eye(31), codes, levels, precision="bf16")
    assert torch.equal(bf16, weight.float().bfloat16().float().t())
    # 127 integers of the scale 1/127: only the two roundings of the scale remain.
    int8 = packed_linear(torch.eye(31), codes, levels, precision="int8")
    torch.testing.assert_close(int8, weight.float().t(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_bf16_rounds_the_operands_only(num_levels: int) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, "channel", 17, 33, 129)
    exact = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert relative_error(packed_linear(x, codes, levels, bias, "bf16"), exact) <= 1e-6
    assert 1e-4 < relative_error(exact, F.linear(x.double(), weight, bias.double())) < 1e-2


@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_int8_rounds_the_activations_only(num_levels: int) -> None:
    x, codes, levels, bias, weight = make_case(num_levels, "tensor", 17, 33, 129)
    x *= torch.logspace(-6, 6, 17)[:, None]
    scale = x.abs().amax(1, keepdim=True) / 127
    exact = F.linear((x / scale).round().double(), weight) * scale.double() + bias.double()
    y = packed_linear(x, codes, levels, bias, "int8")
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_int8_of_extreme_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [2e-43, -1e-43], [3e38, 1e38], [float("nan"), 1.0], [float("inf"), 1.0]])
    q, scale = quantize_rows(x)
    assert q.abs().amax(1)[:3].tolist() == [0, 127, 127]
    assert scale[0] == 0
    codes, levels = pack_codes(torch.tensor([[0, 1]], dtype=torch.uint8), 2), torch.tensor([[-1.0, 1.0]])
    y = packed_linear(x, codes, levels, precision="int8").flatten()
    assert y[0] == 0
    assert y[:3].isfinite().all()
    assert y[3:].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_strides_and_leading_dimensions(precision: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 12, 5, 21)
    y = packed_linear(x, codes, levels, bias, precision)
    assert torch.equal(packed_linear(x.t().contiguous().t(), codes, levels, bias, precision), y)
    assert torch.equal(packed_linear(x.view(3, 4, 21), codes, levels, bias, precision), y.view(3, 4, 5))
    torch.testing.assert_close(packed_linear(x[0], codes, levels, bias, precision), y[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_batch(precision: str) -> None:
    _, codes, levels, bias, _ = make_case(3, "tensor", 1, 5, 21)
    assert packed_linear(torch.empty(0, 21), codes, levels, bias, precision).shape == (0, 5)
    assert packed_linear(torch.empty(2, 0, 21), codes, levels, bias, precision).shape == (2, 0, 5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_activations_are_computed_in_float32(precision: str, dtype: torch.dtype) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 12, 5, 21)
    x = x.to(dtype)
    y = packed_linear(x, codes, levels, bias.to(dtype), precision)
    assert torch.equal(y, packed_linear(x.float(), codes, levels, bias.to(dtype), precision).to(dtype))


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
    torch.library.opcheck(torch.ops.bqnn.packed_linear, (x, codes, levels, None, precision, "reference"))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    compiled = torch.compile(packed_linear, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(x, codes, levels, bias), packed_linear(x, codes, levels, bias))


def test_backward_is_refused() -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    y = packed_linear(x.requires_grad_(), codes, levels, bias)
    with pytest.raises(NotImplementedError, match="no gradient"):
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
        pytest.param({"backend": "tpu"}, BackendError, "no such backend", id="backend"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    x, codes, levels, bias, _ = make_case(3, "tensor", 4, 5, 21)
    arguments: dict[str, object] = {"x": x, "codes": codes, "levels": levels, "bias": bias}
    with pytest.raises(error, match=message):
        packed_linear(**(arguments | change))  # type: ignore[arg-type]
