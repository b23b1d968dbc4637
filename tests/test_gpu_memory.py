"""Memory of training ops on a GPU, and what they ask of its host, seen without one: kernels that do nothing, on CPU
tensors, and every op of torch looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bqnn import ops
from bqnn.core.philox import Noise
from bqnn.core.product import (
    ROWS_OF_A_PART,
    Conv2dProduct,
    LinearProduct,
    channels_last,
    sum_of_pixels,
    sum_of_rows,
)
from bqnn.core.quantizer import Posterior
from bqnn.ops import dispatch
from bqnn.ops.moment_product import MomentBackwardCall, MomentCall
from bqnn.ops.sampled_product import SampledBackwardCall, SampledCall
from tests.support.helpers import make_case
from tests.support.reads import NothingIsRead
from tests.support.shapes import INTERPRETED, Conv2dShape, LinearShape

pytest.importorskip("triton", reason="Triton is not installed")
from bqnn.kernels import conv2d, geometry, launch
from bqnn.kernels.launch import MAX_SPLITS
from tests.support.launches import PROCESSORS, gpu_stands_in

NUM_LEVELS = 3
FUSED, MADE_BEFORE = LinearShape(64, 64, 256), LinearShape(600, 64, 128)
WIDE, NARROW = (Conv2dShape(3, 32, channels, 16, 16, (3, 3), padding=(1, 1)) for channels in (64, 12))
SMALL_BYTES = 1 << 15
"""Of what goes with codebooks and biases."""


class Living(TorchDispatchMode):
    """The bytes of the storages that ops have made and that are still there, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._note(leaf, given)
        return results

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.bytes -= n_bytes


class Step:
    """Forward and backward op of a layer as a GPU's backend runs them, each on its own, in bfloat16."""

    def __init__(self, kind: str, shape: LinearShape | Conv2dShape) -> None:
        self.op = f"{kind}_{'linear' if isinstance(shape, LinearShape) else 'conv2d'}"
        case = make_case(shape, NUM_LEVELS, "tensor")
        x = channels_last(case.x.bfloat16())
        grad = channels_last(torch.zeros(case.output_shape, dtype=torch.bfloat16))
        posterior, noise = Posterior(*case.tensors()[1:5]), Noise(torch.tensor(7), 0)
        product = LinearProduct() if x.dim() == 2 else Conv2dProduct(**case.geometry)
        self.calls: tuple[Any, Any] = (
            SampledCall(x, posterior, case.bias, noise, product),
            SampledBackwardCall(grad, x, posterior, noise, True, product),
        )
        if kind == "moment":
            self.calls = (
                MomentCall(x, posterior, case.bias, noise, "categorical", True, product),
                MomentBackwardCall(grad, grad, x, posterior, noise, "categorical", True, product),
            )
        self.x_bytes, self.y_bytes, self.weights = x.nbytes, grad.nbytes, case.weight.numel()

    def peak_bytes(self) -> list[int]:
        """The most bytes that forward and backward take above what they are given."""
        found = []
        for name, call in zip((self.op, f"{self.op}_backward"), self.calls, strict=True):
            with Living() as living:
                dispatch.backend(name, "triton").run(call)
            found.append(living.most)
        return found


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
@pytest.mark.parametrize("kind", ["sample", "moment"])
@pytest.mark.parametrize("shape", [FUSED, MADE_BEFORE, WIDE, NARROW], ids=lambda shape: shape.id)
def test_nothing_but_the_seed_is_read(kind: str, shape: LinearShape | Conv2dShape) -> None:
    """The seed is on the CPU, where nobody waits for it."""
    step = Step(kind, shape)
    with gpu_stands_in():
        for name, call in zip((step.op, f"{step.op}_backward"), step.calls, strict=True):
            run = dispatch.backend(name, "triton").run
            with NothingIsRead(call.noise.seed) as watching:
                run(call)
            assert watching.seen.count("_local_scalar_dense.default") == 1
            with NothingIsRead(), pytest.raises(AssertionError, match="_local_scalar_dense.default waits for the GPU"):
                run(call)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
@pytest.mark.parametrize("op", ["spike_slab_kl", "mixture_kl"])
def test_a_divergence_reads_nothing(op: str) -> None:
    case = make_case(FUSED, NUM_LEVELS, "tensor").leaves()
    leaves = [case.weight, case.log_sigma2, case.levels]
    prior = {"spike_slab_kl": (torch.full_like(case.levels, 0.1),), "mixture_kl": (torch.full((), 0.25), 0.25, 0.1)}
    with gpu_stands_in() as launched, NothingIsRead() as watching:
        value = getattr(ops, op)(*leaves, *prior[op], backend="triton")
        torch.autograd.grad(value, leaves)
    assert watching.seen and launched == [f"{op}_fwd_kernel", f"{op}_bwd_kernel"]


def test_memory_is_counted() -> None:
    with Living() as living:
        a = torch.zeros(1000)
        b = a.view(10, 100).t() + 1.0
        del a
        c = torch.zeros(500, dtype=torch.float64)
        del b, c
        torch.zeros(1)
    assert (living.most, living.bytes) == (4000 + 4000, 0)


# Of x, of y and of the weight's elements: a contraction is cut into at most eight parts of float32, which are summed in
# one more; parts of the weight's gradient are no more than there are processors. In the ops that torch multiplies for,
# the weight, or its two moments, are bfloat16, and so are their gradients; those of the parameters are float32.
PARTS = 2 * (MAX_SPLITS + 1)
BOUNDS: list[Any] = [
    pytest.param("sample", FUSED, lambda x, y, w: (y + PARTS * y, x + max(PARTS * x, 8 * w)), id="sample-fused"),
    pytest.param("sample", MADE_BEFORE, lambda x, y, w: (y + 2 * w, x + 2 * w + 8 * w), id="sample-made-before"),
    pytest.param("sample", WIDE, lambda x, y, w: (y + 2 * w, x + 2 * w + 8 * w), id="sample-wide"),
    pytest.param(
        "sample",
        NARROW,
        lambda x, y, w: (y + 2 * w + PARTS * y, x + max(2 * w + PARTS * x, 4 * PROCESSORS * w + 8 * w)),
        id="sample-narrow",
    ),
    pytest.param(
        "moment", FUSED, lambda x, y, w: (2 * y + 2 * PARTS * y, x + max(PARTS * x, 8 * w)), id="moment-fused"
    ),
    pytest.param(
        "moment", MADE_BEFORE, lambda x, y, w: (3 * y + x + 4 * w, 3 * x + y + 8 * w), id="moment-made-before"
    ),
    pytest.param(
        "moment",
        NARROW,
        lambda x, y, w: (2 * y + 4 * w + 2 * PARTS * y, x + max(4 * w + PARTS * x, 8 * PROCESSORS * w + 8 * w)),
        id="moment-narrow",
    ),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
@pytest.mark.parametrize(("kind", "shape", "bound"), BOUNDS)
def test_what_an_op_takes_has_a_bound(
    kind: str, shape: LinearShape | Conv2dShape, bound: Callable[[int, int, int], tuple[int, int]]
) -> None:
    step = Step(kind, shape)
    with gpu_stands_in() as launched:
        found = step.peak_bytes()
    assert launched
    for peak, most in zip(found, bound(step.x_bytes, step.y_bytes, step.weights), strict=True):
        assert 0 < peak <= most + SMALL_BYTES


@pytest.mark.parametrize("rows", [0, 1, ROWS_OF_A_PART - 1, ROWS_OF_A_PART, 3 * ROWS_OF_A_PART + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_sum_of_rows_in_parts(rows: int, dtype: torch.dtype) -> None:
    """To a rounding of the sum of the sizes; of bfloat16 that is far better than a running sum would be."""
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, exact, size = sum_of_rows(x), x.double().sum(0), x.double().abs().sum(0)
    assert (found.dtype, found.shape) == (dtype, (5,))
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert ((found.double() - exact).abs() <= 4 * wide * size + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_sum_of_pixels(memory_format: torch.memory_format) -> None:
    images = torch.randn(3, 5, 17, 19, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=memory_format
    )
    torch.testing.assert_close(sum_of_pixels(images), images.sum((0, 2, 3)))
    assert sum_of_pixels(images.bfloat16()).dtype == torch.bfloat16
    with Living() as living:
        sum_of_pixels(images)
    assert living.most < images.nbytes / 10


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
@pytest.mark.parametrize("kind", ["sample", "moment"])
@pytest.mark.parametrize("shape", [FUSED, MADE_BEFORE, WIDE, NARROW], ids=lambda shape: shape.id)
def test_a_second_call_plans_nothing(kind: str, shape: LinearShape | Conv2dShape) -> None:
    """What depends on shapes alone is found once for each."""
    step = Step(kind, shape)
    with gpu_stands_in():
        step.peak_bytes()
        before = plans_made()
        step.peak_bytes()
        assert plans_made() == before > 0


def plans_made() -> int:
    """How often a launch had to be planned, over all modules of kernels."""
    modules = (conv2d, geometry, launch)
    planned = [value for module in modules for value in vars(module).values() if hasattr(value, "cache_info")]
    return sum(each.cache_info().misses for each in {id(each): each for each in planned}.values())
