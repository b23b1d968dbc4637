"""A backend that is asked for runs, or says why it can not; it never leaves the call to another one unsaid."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bqnn import BackendError
from bqnn.core.codes import pack_codes
from bqnn.ops import (
    assign_codes,
    dispatch,
    mixture_kl,
    moment_conv2d,
    moment_linear,
    packed_conv2d,
    packed_linear,
    sample_conv2d,
    sample_linear,
    spike_slab_kl,
)
from bqnn.ops.codebook_from_raw import codebook_from_raw
from tests.support.helpers import DEVICES
from tests.support.shapes import INTERPRETED

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROWS = [0, 1, 16, 17, 300]
SEED = torch.tensor(5)

Run = Callable[..., "Tensor | tuple[Tensor, ...]"]


def _tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LEVELS, THRESHOLDS = torch.tensor([[-0.5, 0.1, 0.6]]), torch.tensor([[-0.2, 0.3]])
CODES = pack_codes(torch.arange(5 * 18).view(5, 18).remainder(3).byte(), 3)
LINEAR, CONV2D = _tensor(5, 18), _tensor(5, 2, 3, 3)


def packed(x: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return x, CODES.to(x.device), LEVELS.to(x.device), None


def posterior(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [each.to(dtype) for each in (weight, torch.full_like(weight, -4.0), LEVELS, THRESHOLDS)]


# By the name of an op: what calls it with an input of so many rows (images, for a convolution), and with a backend.
OPS: dict[str, Callable[[int, torch.dtype], tuple[list[Tensor], Run]]] = {
    "sample_linear": lambda rows, dtype: (
        [_tensor(rows, 18).to(dtype), *posterior(LINEAR, dtype)],
        lambda backend, *tensors: sample_linear(*tensors, None, SEED, backend=backend),
    ),
    "sample_conv2d": lambda rows, dtype: (
        [_tensor(rows, 2, 4, 4).to(dtype), *posterior(CONV2D, dtype)],
        lambda backend, *tensors: sample_conv2d(*tensors, None, SEED, backend=backend),
    ),
    "moment_linear": lambda rows, dtype: (
        [_tensor(rows, 18).to(dtype), *posterior(LINEAR, dtype)],
        lambda backend, *tensors: moment_linear(*tensors, None, SEED, backend=backend),
    ),
    "moment_conv2d": lambda rows, dtype: (
        [_tensor(rows, 2, 4, 4).to(dtype), *posterior(CONV2D, dtype)],
        lambda backend, *tensors: moment_conv2d(*tensors, None, SEED, coarse_variance=True, backend=backend),
    ),
    "spike_slab_kl": lambda rows, dtype: (
        [*posterior(_tensor(rows + 1, 18), dtype)[:3], torch.full_like(LEVELS, 0.1).to(dtype)],
        lambda backend, *tensors: spike_slab_kl(*tensors, backend=backend),
    ),
    "mixture_kl": lambda rows, dtype: (
        [*posterior(_tensor(rows + 1, 18), dtype)[:3], torch.tensor(0.3, dtype=dtype)],
        lambda backend, *tensors: mixture_kl(*tensors, backend=backend),
    ),
    "assign_codes": lambda rows, dtype: (
        [_tensor(rows + 1, 18).to(dtype), THRESHOLDS.to(dtype)],
        lambda backend, *tensors: assign_codes(*tensors, backend=backend),
    ),
    "codebook_from_raw": lambda rows, dtype: (
        [_tensor(rows + 1, 3).to(dtype), torch.ones(rows + 1, 1, dtype=dtype)],
        lambda backend, *tensors: codebook_from_raw(*tensors, None, backend=backend),
    ),
    "packed_linear": lambda rows, dtype: (
        [_tensor(rows, 18).to(dtype)],
        lambda backend, x: packed_linear(*packed(x), backend=backend),
    ),
    "packed_conv2d": lambda rows, dtype: (
        [_tensor(rows, 2, 4, 4).to(dtype)],
        lambda backend, x: packed_conv2d(*packed(x), 3, backend=backend),
    ),
}

BACKENDS = [
    pytest.param(op, device, name, id=f"{op}-{device}-{name}")
    for op in OPS
    for device in DEVICES
    for name in (*dispatch.ORDER, *dispatch.BY_NAME_ONLY)
    if name in dispatch._backends[op] and dispatch.status(op, name, device).usable
]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """The ops that run, each with its backend."""
    done: list[tuple[str, str]] = []
    for op, backends in dispatch._backends.items():
        for name, before in backends.items():

            def run(call: object, op: str = op, before: dispatch.Backend = before) -> object:
                done.append((op, before.name))
                return before.run(call)

            monkeypatch.setitem(backends, name, before._replace(run=run))
    dispatch._candidates.cache_clear()
    yield done
    monkeypatch.undo()
    dispatch._candidates.cache_clear()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "device", "backend"), BACKENDS)
def test_it_runs_there_or_raises_with_a_reason(
    op: str, device: str, backend: str, dtype: torch.dtype, rows: int, ran: list[tuple[str, str]]
) -> None:
    if INTERPRETED and dtype == torch.bfloat16 and backend == "triton":
        pytest.skip("the interpreter has no bfloat16 of its own")
    tensors, run = OPS[op](rows, dtype)
    here = [tensor.to(device, copy=True).requires_grad_() for tensor in tensors]
    try:
        output = run(backend, *here)
    except BackendError as error:
        assert str(error).startswith(f"backend {backend!r} can not run bqnn::{op}: it takes ")
        assert ran == []
        assert dtype != torch.float32 or (backend == "cuda" and rows > 16)
        return
    first = output[0] if isinstance(output, tuple) else output
    if first.requires_grad:
        first.float().sum().backward()
        assert [name for name, _ in ran] == [op, f"{op}_backward"]
    # The gradient of a packed product is one of torch's products, which is the reference's, whoever made the output.
    forced = ran if not op.startswith("packed") else ran[:1]
    assert {name for _, name in forced} == {backend}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_automatic_choice_runs_whatever_comes(op: str, dtype: torch.dtype, rows: int) -> None:
    for device in DEVICES:
        tensors, run = OPS[op](rows, dtype)
        output = run(None, *(tensor.to(device) for tensor in tensors))
        exact = run("reference", *(tensor.double() for tensor in tensors))
        for found, expected in zip(
            output if isinstance(output, tuple) else (output,), exact if isinstance(exact, tuple) else (exact,)
        ):
            assert found.shape == expected.shape
            # A sample near a threshold may fall into another cell in another dtype; linear sums are near each other.
            if op.startswith("packed") and dtype != torch.float16:
                torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-2, atol=2e-2)
