"""No op reads a value back while it runs: that would wait for the GPU, and no CUDA graph could hold it.

The backends run as they would on a GPU, on CPU tensors, with launches that do nothing; every op of torch is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bqnn.core.check import PRECISIONS
from bqnn.core.geometry import Conv2dGeometry, LinearGeometry
from bqnn.ops import dispatch
from bqnn.ops.backends import cuda_packed
from bqnn.ops.backends.gpu_layout import make_gpu_layout
from bqnn.ops.packed_product import PackedCall
from tests.support.packed_products import conv2d_case, linear_case
from tests.support.reads import NothingIsRead

triton = pytest.importorskip("triton", reason="Triton is not installed")
from tests.support.launches import launches_stand_in  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that would have been launched."""
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter has no launches")
    with launches_stand_in() as done:
        monkeypatch.setattr(cuda_packed, "_launch", lambda *arguments: done.append("packed_linear"))
        monkeypatch.setattr(cuda_packed, "_round_rows", lambda *arguments: done.append("round_rows"))
        yield done


def watched(call: Callable[[], Tensor]) -> Tensor:
    with NothingIsRead() as mode:
        y = call()
    assert mode.seen
    return y


def test_a_read_is_noticed() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense.default waits for the GPU"):
        watched(lambda: torch.ones(2) * float(torch.ones(())))
    with pytest.raises(AssertionError, match="nonzero.default waits for the GPU"):
        watched(lambda: (torch.ones(2) > 0).nonzero())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_packed_linear(rows: int, granularity: str, precision: str, dtype: torch.dtype, launches: list[str]) -> None:
    x, codes, levels, bias, _ = linear_case(3, granularity, rows, 9, 300)
    layout = make_gpu_layout(codes, levels, 300, precision)
    call = PackedCall(x.to(dtype), codes, levels, bias, LinearGeometry(), precision, layout, True)
    y = watched(lambda: dispatch.backend("packed_linear", "triton").run(call))
    assert (y.shape, y.dtype) == ((rows, 9), dtype)
    assert ("quantize_rows_kernel" in launches) == (precision == "int8")
    launches.clear()
    if rows <= cuda_packed.MAX_ROWS:
        y = watched(lambda: dispatch.backend("packed_linear", "cuda").run(call))
        assert (y.shape, y.dtype) == ((rows, 9), dtype)
        assert launches == (["round_rows"] if precision == "int8" else []) + ["packed_linear"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)], ids=str)
def test_packed_conv2d(kernel: tuple[int, int], precision: str, dtype: torch.dtype, launches: list[str]) -> None:
    x, codes, levels, bias, _ = conv2d_case(3, "channel", (3, 9, 70), kernel)
    taps = kernel[0] * kernel[1]
    layout = make_gpu_layout(codes, levels, 70 * taps, precision, taps)
    geometry = Conv2dGeometry(kernel, (1, 1), (0, 0), (1, 1), 1)
    call = PackedCall(x.to(dtype), codes, levels, bias, geometry, precision, layout, True)
    y = watched(lambda: dispatch.backend("packed_conv2d", "triton").run(call))
    assert y.dtype == dtype
    assert f"packed_{'linear' if kernel == (1, 1) else 'conv2d'}_fwd_kernel" in launches
