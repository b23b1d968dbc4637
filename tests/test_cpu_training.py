"""The CPU kernels of the training ops: bits that depend on nothing but the arguments, layouts, and coarse variances."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bqnn.core import native, quantizer
from bqnn.core.codebook import lloyd_max, raw_from_levels
from bqnn.core.philox import normal, random_words
from bqnn.core.quantizer import MODES, Posterior
from bqnn.ops import dispatch, moment_conv2d, moment_linear, sample_conv2d, sample_linear
from bqnn.ops.backends import cpu_moment, cpu_products
from bqnn.ops.codebook_from_raw import codebook_from_raw
from tests.support.helpers import SEED, Case, channels_last, digest, lower_isas, make_case, run_on_isa
from tests.support.shapes import GRANULARITIES, SMALL_CONV2D, Conv2dShape, LinearShape

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING)

OFFSET = 2**32 - 2
CPU = torch.device("cpu")
# These have more weights than one block, and no multiple of a vector or a tile.
WIDE_LINEAR = LinearShape(9, 63, 129)
WIDE_CONV2D = Conv2dShape(2, 19, 35, 13, 11, (3, 3), padding=(1, 1))


def kernels() -> list[Tensor]:
    """What every kernel of the training ops makes of some tensors."""
    ops = torch.ops.bqnn_cpu
    seed, results = torch.tensor(SEED), []
    for granularity in GRANULARITIES:
        _, weight, log_sigma2, levels, thresholds, _ = make_case(WIDE_LINEAR, 5, granularity).tensors()
        posterior = (weight, log_sigma2, levels, thresholds)
        grad, other = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(2))
        new = [torch.empty_like(tensor) for tensor in (weight, *posterior, *posterior)]
        ops.sample(*posterior, seed, OFFSET, new[0])
        ops.sample_backward(grad, *posterior, seed, OFFSET, new[2], new[3])
        results += [new[0], new[2], new[3]]
        for mode in range(len(MODES)):
            mean, variance = torch.zeros_like(weight), torch.empty_like(weight)
            gradients = [grad.clone(), *(torch.zeros_like(tensor) for tensor in posterior[1:])]
            ops.moments(*posterior, mode, mean, variance)
            ops.moments_backward(gradients[0], other, *posterior, mode, *gradients[1:])
            results += [mean, variance, *gradients]
    for shape in ((3, 19, 7, 11), (2, 6, 28, 28), (5, 341)):
        y, variance = torch.randn(shape, generator=torch.Generator().manual_seed(3)), torch.rand(shape)
        variance = torch.rand(shape, generator=torch.Generator().manual_seed(4))
        for order in (torch.contiguous_format, torch.channels_last)[: len(shape) - 1]:
            if len(shape) == 2 and order is torch.channels_last:
                continue
            coarse = variance.to(torch.bfloat16).contiguous(memory_format=order)
            out, noisy, square = torch.empty_like(coarse), y.clone(), torch.empty_like(coarse)
            ops.noise_gradient(y, coarse, seed, OFFSET, out)
            ops.add_noise(noisy, coarse, seed, OFFSET, True)
            ops.square(y, square)
            ops.add_square_gradient(noisy, y, coarse)
            results += [tensor.float() for tensor in (out, noisy, square, coarse)]
    return results


def cpu_digest() -> str:
    return digest(kernels())


@pytest.mark.parametrize("isa", lower_isas())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_cpu_training", "cpu_digest") == cpu_digest()


def test_the_number_of_threads_does_not_matter() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = cpu_digest()
        torch.set_num_threads(3)
        assert cpu_digest() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("offset", [0, 1, 2**32 - 2, 2**62])
@pytest.mark.parametrize("calls", [1, 15, 16, 341])
def test_words_are_those_of_the_reference(calls: int, offset: int) -> None:
    for seed in (0, 1, SEED, 2**63 - 1):
        words = torch.empty((calls, 4), dtype=torch.int32)
        torch.ops.bqnn_cpu.random_words(seed, offset, words)
        assert torch.equal(words.long() & 0xFFFFFFFF, random_words(seed, offset, 0, calls, CPU).t())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 19, 7, 11), (2, 6, 28, 28), (2, 40, 3, 43), (2, 1, 5, 7)], ids=str)
def test_noise_counts_the_outputs_in_their_logical_order(shape: tuple[int, ...], order: torch.memory_format) -> None:
    y, seed = torch.zeros(shape).contiguous(memory_format=order), torch.tensor(SEED)
    torch.ops.bqnn_cpu.add_noise(y, torch.ones(shape).contiguous(memory_format=order), seed, OFFSET, False)
    torch.testing.assert_close(y, normal(seed, OFFSET, shape, CPU, torch.float32), rtol=2e-6, atol=2e-6)


def moment(case: Case, mode: str, coarse: bool, backend: str) -> Tensor:
    op = moment_conv2d if case.x.dim() == 4 else moment_linear
    return op(
        *case.tensors(), torch.tensor(SEED), OFFSET, mode, coarse_variance=coarse, backend=backend, **case.geometry
    )


def gradients(function: Callable[[Case], Tensor], case: Case) -> dict[str, Tensor]:
    leaves = case.leaves()
    y = function(leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    names = ("x", "weight", "log_sigma2", "levels", "thresholds")
    found = {name: getattr(leaves, name).grad for name in names}
    return {"y": y.detach(), **{name: gradient for name, gradient in found.items() if gradient is not None}}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [LinearShape(9, 600, 500), WIDE_CONV2D, SMALL_CONV2D], ids=lambda shape: shape.id)
@pytest.mark.parametrize("turned", [(), ("x",)], ids=["", "channels-last"])
def test_a_coarse_variance_changes_values_and_gradients_by_its_rounding(
    turned: tuple[str, ...], shape: LinearShape | Conv2dShape, mode: str, backend: str
) -> None:
    case = make_case(shape, 3, "tensor")
    if isinstance(shape, LinearShape) and turned:
        pytest.skip("no image")
    case = channels_last(case, turned)
    exact = gradients(partial(moment, mode=mode, coarse=False, backend="reference"), case)
    coarse = gradients(partial(moment, mode=mode, coarse=True, backend=backend), case)
    for name, expected in exact.items():
        difference = (coarse[name] - expected).square().mean().sqrt()
        assert difference <= 2.0**-7 * expected.square().mean().sqrt(), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("op", ["sample", *MODES])
def test_a_linear_weight_is_made_some_channels_at_a_time(
    op: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(WIDE_LINEAR, 5, granularity, (SEED, OFFSET))

    def layer(case: Case, coarse: bool = False) -> Tensor:
        if op == "sample":
            return sample_linear(*case.tensors(), torch.tensor(SEED), OFFSET, backend="cpu")
        return moment(case, op, coarse, "cpu")

    whole = [gradients(partial(layer, coarse=coarse), case) for coarse in (False, True)]
    blocks, part = [], Posterior.part
    monkeypatch.setattr(cpu_products, "WEIGHTS", 5000)
    monkeypatch.setattr(cpu_products, "CHANNELS", 16)
    monkeypatch.setattr(Posterior, "part", lambda self, channels: blocks.append(channels) or part(self, channels))
    monkeypatch.setattr(cpu_moment, "LARGE_LINEAR", 1)  # so the product is in bfloat16 where the processor has it
    for coarse, expected in zip((False, True), whole):
        found = gradients(partial(layer, coarse=coarse), case)
        for name, one in expected.items():
            difference = (found[name] - one).square().mean().sqrt()
            assert difference <= (2.0**-7 if coarse else 1e-6) * one.square().mean().sqrt(), name
    assert {(some.start, some.stop) for some in blocks} == {(0, 32), (32, 63)}


@pytest.mark.parametrize("partition", ["nearest", "learned"])
@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_codebooks_are_the_reference_s(num_levels: int, partition: str) -> None:
    generator = torch.Generator().manual_seed(num_levels)
    levels = lloyd_max(torch.randn(5, 200, generator=generator), num_levels)
    scale = levels.std(1, keepdim=True)
    raw = [raw_from_levels(levels, scale), torch.randn(5, num_levels - 1, generator=generator)]
    upstream = [torch.randn(shape, generator=generator) for shape in (levels.shape, raw[1].shape)]
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in raw]
        outputs = codebook_from_raw(leaves[0], scale.to(dtype), leaves[1] if partition == "learned" else None, backend)
        torch.autograd.backward(outputs[:2], [tensor.to(dtype) for tensor in upstream])
        results.append([*(tensor.detach().float() for tensor in outputs), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("partition", ["nearest", "learned"])
def test_codebook_gradients(partition: str) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.rand(2, 1, generator=generator, dtype=torch.float64)
    cuts = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = (raw, scale, cuts if partition == "learned" else None)
    assert torch.autograd.gradcheck(lambda *tensors: codebook_from_raw(*tensors)[:2], inputs)
    torch.library.opcheck(torch.ops.bqnn.codebook_from_raw.default, inputs)


def test_ops_are_seen_by_what_looks_on() -> None:
    """The shortcut around the dispatcher is taken in plain eager execution alone."""
    case, seed = make_case(SMALL_CONV2D, 3, "tensor"), torch.tensor(SEED)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in case.tensors()]
        y = sample_conv2d(*fakes, mode.from_tensor(seed), **case.geometry)
    assert type(y).__name__ == "FakeTensor" and y.shape == case.output_shape
    on_meta = case.to("meta")
    assert sample_conv2d(*on_meta.tensors(), seed, **case.geometry).is_meta


def test_a_second_derivative_is_refused() -> None:
    case = make_case(LinearShape(3, 5, 7), 3, "tensor").leaves()
    y = sample_linear(*case.tensors(), torch.tensor(SEED))
    (gradient,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="sample_linear_backward has no gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    assert dispatch.available("moment_linear", CPU) == "cpu"
    case = make_case(LinearShape(3, 5, 7), 3, "tensor").to(dtype)
    found, expected = (moment(case, "categorical", False, backend) for backend in (None, "reference"))
    assert torch.equal(found, expected)


def test_moments_keep_the_tails() -> None:
    """A variance of 1e-15 is no difference of two larger numbers."""
    weight = torch.linspace(-2.0, 2.0, 129).view(1, -1)
    log_sigma2 = torch.full_like(weight, -4.0)
    levels, thresholds = torch.tensor([[-1.0, 0.2, 1.0]]), torch.tensor([[-0.4, 0.6]])
    mean, variance = torch.empty_like(weight), torch.empty_like(weight)
    torch.ops.bqnn_cpu.moments(weight, log_sigma2, levels, thresholds, 0, mean, variance)
    exact = quantizer.moments(*(tensor.double() for tensor in (weight, log_sigma2, levels, thresholds)))
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact[1], rtol=3e-5, atol=0.0)
