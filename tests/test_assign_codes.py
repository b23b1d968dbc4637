"""assign_codes against bisection: exact codes for every M, shape, layout and backend."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bqnn import BackendError
from bqnn.core.codes import pack_codes, packed_width, unpack_codes
from bqnn.ops import assign_codes
from bqnn.ops.dispatch import status
from tests.support import formulas
from tests.support.helpers import (
    compiled_backends,
    digest,
    digests_of_threads,
    forced_or_automatic,
    lower_isas,
    make_case,
    run_on_isa,
    triton_devices,
    usable_backends,
)
from tests.support.shapes import (
    CONV2D_GRID,
    EVERY_M,
    GRANULARITIES,
    INTERPRETED,
    LINEAR_GRID,
    SMALL_CONV2D,
    SMALL_LINEAR,
    Conv2dShape,
    LinearShape,
)

RUNS_ON = usable_backends("assign_codes")


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), [*LINEAR_GRID, *CONV2D_GRID])
def test_codes(shape: LinearShape | Conv2dShape, num_levels: int, granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(shape, num_levels, granularity)
    weight, thresholds = case.weight.to(device), case.thresholds.to(device)
    expected = formulas.codes_of(case.weight, case.thresholds).to(torch.uint8)
    codes = assign_codes(weight, thresholds, backend=backend)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.cpu(), expected)
    packed = assign_codes(weight, thresholds, packed=True, backend=backend)
    assert torch.equal(packed.cpu(), pack_codes(expected.flatten(1), num_levels))
    assert torch.equal(unpack_codes(packed.cpu(), num_levels, expected[0].numel()), expected.flatten(1))


@pytest.mark.parametrize("device", triton_devices("assign_codes"))
@pytest.mark.parametrize("elements", [64, 8192])
@pytest.mark.parametrize("num_levels", [2, 3, 6, 16])
def test_tiles_of_any_size(num_levels: int, elements: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bqnn.kernels.assign_codes"), "MATRIX_BLOCK", elements)
    for shape in (LinearShape(1, 3, 131), LinearShape(1, 21, 9)):
        case = make_case(shape, num_levels, "channel").to(device)
        for packed in (False, True):
            expected = assign_codes(case.weight, case.thresholds, packed, "reference")
            assert torch.equal(assign_codes(case.weight, case.thresholds, packed, "triton"), expected)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_a_weight_on_a_threshold_is_below_it(num_levels: int, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, num_levels, "tensor")
    on = case.thresholds
    above = torch.nextafter(on, torch.tensor(torch.inf))
    for weight, first in ((on, 0), (above, 1)):
        codes = assign_codes(weight.to(device), on.to(device), backend=backend)
        assert codes.tolist() == [list(range(first, first + num_levels - 1))]


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 5, "channel").to(dtype)
    here = case.weight.to(device), case.thresholds.to(device)
    codes = forced_or_automatic(lambda each: assign_codes(*here, backend=each), backend)
    expected = formulas.codes_of(case.weight.double(), case.thresholds.double())
    assert torch.equal(codes.cpu(), expected.to(torch.uint8))


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("packed", [False, True], ids=["codes", "packed"])
def test_strides_do_not_matter(packed: bool, granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, granularity)
    thresholds = case.thresholds.to(device)
    expected = assign_codes(case.weight.to(device), thresholds, packed, backend)
    channels_last = case.weight.to(device, memory_format=torch.channels_last)
    assert torch.equal(assign_codes(channels_last, thresholds, packed, backend), expected)
    wide = torch.full((*case.weight.shape[:-1], 2 * case.weight.shape[-1]), 9.0)
    wide[..., ::2] = case.weight
    sliced = wide.to(device)[..., ::2]
    assert not sliced.is_contiguous()
    assert torch.equal(assign_codes(sliced, thresholds, packed, backend), expected)
    transposed = case.weight.to(device).flatten(1).t().contiguous().t()
    matrix = assign_codes(transposed, thresholds.t().contiguous().t(), packed, backend)
    assert torch.equal(matrix.flatten(1), expected.flatten(1))


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 3, 2, 2)], ids=str)
def test_no_weights(shape: tuple[int, ...], granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    groups = shape[0] if granularity == "channel" else 1
    weight, thresholds = torch.empty(shape, device=device), torch.zeros(groups, 1, device=device)
    assert assign_codes(weight, thresholds, False, backend).shape == shape
    packed = assign_codes(weight, thresholds, True, backend)
    assert packed.shape == (shape[0], packed_width(math.prod(shape[1:]), 2))


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_the_ends_of_the_number_line(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    weight = torch.tensor([[math.nan, -math.inf, -0.0, 0.0, 1e-45, math.inf]], device=device)
    codes = assign_codes(weight, torch.zeros(1, 1, device=device), False, backend)
    assert codes.tolist() == [[0, 0, 0, 0, 1, 1]]


def cpu_results() -> Iterator[Tensor]:
    """Codes and bytes from the CPU kernels: rows longer than what is packed at a time, and shorter than a vector."""
    for shape in (LinearShape(1, 129, 341), LinearShape(1, 20, 4231), LinearShape(1, 7, 13), SMALL_CONV2D):
        for num_levels in range(2, 17):
            for granularity in GRANULARITIES:
                case = make_case(shape, num_levels, granularity)
                for packed in (False, True):
                    yield assign_codes(case.weight, case.thresholds, packed, "cpu")


def cpu_digest() -> str:
    return digest(cpu_results())


@pytest.mark.parametrize("isa", lower_isas())
def test_every_instruction_set_gives_the_same_codes(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_assign_codes", "cpu_digest") == cpu_digest()


@pytest.mark.skipif(not status("assign_codes", "cpu", "cpu").usable, reason="no CPU kernels")
def test_threads_do_not_change_a_code() -> None:
    assert len(digests_of_threads(cpu_digest)) == 1


def test_no_gradient_is_recorded() -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor").leaves()
    assert not assign_codes(case.weight, case.thresholds).requires_grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("packed", [False, True], ids=["codes", "packed"])
def test_opcheck(packed: bool, granularity: str, layout: torch.memory_format) -> None:
    case = make_case(SMALL_CONV2D, 3, granularity)
    weight = case.weight.to(memory_format=layout)
    torch.library.opcheck(torch.ops.bqnn.assign_codes.default, (weight, case.thresholds, packed))


@pytest.mark.parametrize("runs_on", compiled_backends("assign_codes"))
@pytest.mark.parametrize("packed", [False, True], ids=["codes", "packed"])
def test_compiles(packed: bool, runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, "channel").to(device)
    compiled = torch.compile(assign_codes, backend="aot_eager", fullgraph=True)
    expected = assign_codes(case.weight, case.thresholds, packed, backend)
    assert torch.equal(compiled(case.weight, case.thresholds, packed, backend), expected)


@pytest.mark.parametrize("backend", ["cuda", "abacus"] if INTERPRETED else ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor")
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::assign_codes: \w+ .*\w"):
        assign_codes(case.weight, case.thresholds, backend=backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::assign_codes: \w+ .*\w"):
        assign_codes(case.weight, case.thresholds)
    expected = formulas.codes_of(case.weight, case.thresholds).to(torch.uint8)
    assert torch.equal(assign_codes(case.weight, case.thresholds, backend="reference"), expected)


WEIGHT, THRESHOLDS = torch.zeros(7, 13), torch.tensor([[-0.5, 0.5]])


@pytest.mark.parametrize(
    ("weight", "thresholds", "error", "message"),
    [
        pytest.param(WEIGHT.int(), THRESHOLDS, TypeError, "weight must be floating point.*int32", id="int-weight"),
        pytest.param(None, THRESHOLDS, TypeError, "weight must be a tensor.*NoneType", id="no-weight"),
        pytest.param(WEIGHT[0, 0], THRESHOLDS, ValueError, "weight must", id="scalar-weight"),
        pytest.param(WEIGHT, THRESHOLDS.int(), TypeError, "thresholds must be floating point.*int32", id="int"),
        pytest.param(WEIGHT, [[0.5]], TypeError, "thresholds must be a tensor.*list", id="list"),
        pytest.param(WEIGHT, THRESHOLDS[0], ValueError, r"thresholds must have the shape.*\[2\]", id="vector"),
        pytest.param(WEIGHT, THRESHOLDS[0, 0], ValueError, r"thresholds must have the shape", id="scalar"),
        pytest.param(
            WEIGHT,
            THRESHOLDS.expand(2, 2),
            ValueError,
            r"thresholds must have the shape \[1 or 7, 1 to 15\], got \[2, 2\]",
            id="groups",
        ),
        pytest.param(WEIGHT, THRESHOLDS[:, :0], ValueError, r"thresholds .* 1 to 15\], got \[1, 0\]", id="M1"),
        pytest.param(WEIGHT, torch.arange(16.0)[None], ValueError, r"thresholds .*15\], got \[1, 16\]", id="M17"),
        pytest.param(WEIGHT, THRESHOLDS.to("meta"), ValueError, "thresholds is on meta.*cpu", id="device"),
    ],
)
def test_bad_input(weight: object, thresholds: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        assign_codes(weight, thresholds)  # type: ignore[arg-type]
