"""mixture_kl against Python floats weight by weight, by numerical gradients, and as a bound of the true divergence."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bqnn import BackendError
from bqnn.ops import mixture_kl
from bqnn.ops.dispatch import status
from bqnn.ops.mixture_kl import through_narrowest_gap
from tests.support import formulas
from tests.support.helpers import (
    Case,
    channels_last,
    compiled_backends,
    digest,
    digests_of_threads,
    error,
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

RUNS_ON = usable_backends("mixture_kl")
# These are r and rho_0: narrow spikes leave weights between the levels to the slab, wide ones overlap.
MIXTURES = [
    pytest.param((0.05, 0.4), id="narrow"),
    pytest.param((0.25, 0.1), id="usual"),
    pytest.param((2.0, 0.01), id="wide"),
]
USUAL = (0.25, 0.1)
SLAB = 0.2  # S^2
GRADIENTS = ("weight", "log_sigma2", "levels")
Mixture = tuple[float, float]


def slab_of(case: Case) -> Tensor:
    return torch.tensor(SLAB, dtype=torch.float64).to(case.weight)


def run(case: Case, backend: str | None = None, mixture: Mixture = USUAL) -> Tensor:
    return mixture_kl(case.weight, case.log_sigma2, case.levels, slab_of(case), *mixture, backend)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_value(num_levels: int, granularity: str, mixture: Mixture, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, num_levels, granularity)
    expected = formulas.mixture_kl(case.weight, case.log_sigma2, case.levels, slab_of(case).item(), *mixture)
    found = run(case.to(device), backend, mixture)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
    exact = case.to(torch.float64)
    expected = formulas.mixture_kl(case.weight, case.log_sigma2, case.levels, SLAB, *mixture)
    assert run(exact, None, mixture).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), [*LINEAR_GRID[:15:2], *CONV2D_GRID[:15:2]])
def test_gradients_keep_their_precision(
    shape: LinearShape | Conv2dShape, num_levels: int, granularity: str, runs_on: tuple[str, str]
) -> None:
    assert_gradients(make_case(shape, num_levels, granularity), *runs_on)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_gradients_of_every_mixture(mixture: Mixture, runs_on: tuple[str, str]) -> None:
    assert_gradients(make_case(SMALL_LINEAR, 4, "channel"), *runs_on, mixture)


def assert_gradients(case: Case, device: str, backend: str, mixture: Mixture = USUAL) -> None:
    """The gradients of ``backend`` keep the distance rule, the reference in float32 being plain PyTorch."""
    exact, plain, here = case.to(torch.float64).leaves(), case.leaves(), case.to(device).leaves()
    run(exact, "reference", mixture).backward()
    run(plain, "reference", mixture).backward()
    (3.0 * run(here, backend, mixture)).backward()
    for name in GRADIENTS:
        expected = getattr(exact, name).grad
        found = getattr(here, name).grad / 3.0
        allowed = 2.0 * error(getattr(plain, name).grad, expected, "rms")
        assert error(found, expected, "rms") <= allowed + 1e-6 * float(expected.square().mean().sqrt())
        assert error(found, expected, "rms") <= 1e-4 * float(expected.square().mean().sqrt())


@pytest.mark.parametrize("device", triton_devices("mixture_kl"))
@pytest.mark.parametrize(
    ("elements", "channels", "columns"), [(32, 3, 140), (32, 21, 9), (32, 5, 96), (512, 3, 1100), (4096, 41, 27)]
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tiles_of_any_size(
    granularity: str, elements: int, channels: int, columns: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that take one tile, all of theirs and some, with rows that end in the middle of one or with it."""
    for name, value in {"MOST_ELEMENTS": elements, "MOST_TILES": 4, "PROGRAMS": 1}.items():
        monkeypatch.setattr(importlib.import_module("bqnn.kernels.weight_tiles"), name, value)
    case = make_case(LinearShape(1, channels, columns), 3, granularity)
    expected = run(case.to(torch.float64), "reference").item()
    assert run(case.to(device), "triton").item() == pytest.approx(expected, rel=1e-6)
    assert_gradients(case, device, "triton")


@pytest.mark.parametrize("device", triton_devices("mixture_kl"))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_half_precision_is_that_of_what_is_stored(granularity: str, device: str) -> None:
    case = make_case(LinearShape(1, 5, 129), 3, granularity)
    here = case.to(device, torch.float16).leaves()
    exact = here.to("cpu", torch.float64).leaves()
    slab = torch.tensor(SLAB)
    value = mixture_kl(here.weight, here.log_sigma2, here.levels, slab.to(device), *USUAL, "triton")
    expected = mixture_kl(exact.weight, exact.log_sigma2, exact.levels, slab.double(), *USUAL, "reference")
    value.backward()
    expected.backward()
    roundoff = torch.finfo(torch.float16).eps
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in GRADIENTS:
        found, of_exact = getattr(here, name).grad, getattr(exact, name).grad
        assert found.dtype == torch.float16
        assert error(found, of_exact, "rms") <= roundoff * float(of_exact.square().mean().sqrt())


@pytest.mark.parametrize("num_levels", [2, 3, 16])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck(num_levels: int, granularity: str, mixture: Mixture) -> None:
    case = make_case(LinearShape(1, 3, 4), num_levels, granularity).to(torch.float64).leaves()
    slab = slab_of(case)
    assert torch.autograd.gradcheck(
        lambda *leaves: mixture_kl(*leaves, slab, *mixture),
        [case.weight, case.log_sigma2, case.levels],
        eps=1e-7,
        atol=1e-5,
        rtol=1e-5,
    )


def autograd_of_levels(case: Case, levels: Tensor) -> Tensor:
    """The levels' gradient by plain autograd, whose amin gives an equal part to every narrowest gap."""
    levels = levels.clone().requires_grad_()
    sigma2 = (USUAL[0] * levels.diff(dim=1).amin(1)).square()
    variances = torch.cat([sigma2.expand(levels.shape[1]), torch.full((1,), SLAB, dtype=torch.float64)])
    centres = torch.cat([levels[0], torch.zeros(1, dtype=torch.float64)])
    shares = torch.tensor([0.9 / levels.shape[1]] * levels.shape[1] + [0.1], dtype=torch.float64)
    ratio = case.log_sigma2.exp().unsqueeze(-1) / variances
    square = (case.weight.unsqueeze(-1) - centres).square() / variances
    (-torch.logsumexp(shares.log() - 0.5 * (square + ratio - ratio.log() - 1.0), -1)).sum().backward()
    return levels.grad


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize(
    "levels", [[-0.5, 0.0, 0.5], [-0.5, 0.0, 0.5, 1.75], [-0.75, 0.0, 0.25, 1.0, 1.25]], ids=["all", "two", "apart"]
)
def test_narrowest_gaps_that_are_equal_share_the_gradient(levels: list[float], runs_on: tuple[str, str]) -> None:
    """These gaps are numbers of float32: equal ones are equal in any precision."""
    device, backend = runs_on
    exact = torch.tensor([levels], dtype=torch.float64)
    case = replace(make_case(SMALL_LINEAR, len(levels), "tensor"), levels=exact.float())
    here = case.to(device).leaves()
    run(here, backend).backward()
    expected = autograd_of_levels(case.to(torch.float64), exact)
    torch.testing.assert_close(here.levels.grad.cpu().double(), expected, rtol=1e-4, atol=1e-3)


def test_the_gradient_through_the_gap_sums_to_nothing() -> None:
    """It moves levels apart: of two narrowest gaps that have a level in common, this one stays."""
    found = through_narrowest_gap(torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([3.0]))
    assert found.tolist() == [[-3.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_it_is_a_bound_of_the_true_divergence(mixture: Mixture) -> None:
    """Above E log q - E log p by quadrature, and equal to it where one component has all of the posterior."""
    levels = [-0.5, 0.1, 0.9]
    components = formulas.mixture_components(levels, SLAB, *mixture)
    z = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 1e4 - 10.0
    density = (-0.5 * z * z).exp() / math.sqrt(2.0 * math.pi) / 1e4
    for mean in (-0.5, -0.2, 0.1, 0.45, 1.7):
        for sigma in (0.02, 0.15, 0.6):
            w = mean + sigma * z
            logs = [math.log(share / math.sqrt(v)) - (w - c).square() / (2.0 * v) for share, c, v in components]
            true = float((density * (-0.5 * z * z - math.log(sigma) - torch.logsumexp(torch.stack(logs), 0))).sum())
            weight = torch.tensor([[mean]], dtype=torch.float64)
            log_sigma2 = torch.full_like(weight, 2.0 * math.log(sigma))
            found = mixture_kl(
                weight, log_sigma2, torch.tensor([levels]).double(), torch.tensor(SLAB).double(), *mixture
            )
            assert found.item() >= max(true, 0.0) - 1e-6
            if sigma == 0.02 and mean == -0.5 and mixture == USUAL:
                assert found.item() == pytest.approx(true, abs=1e-3)


def test_the_deviation_of_a_weight_on_a_level_has_an_optimum() -> None:
    """It is about that of the spikes; log-uniform ones would leave the deviation at a tenth of a gap as it is."""
    levels, slab = torch.tensor([[-0.4, 0.0, 0.4]]).double(), torch.tensor(SLAB).double()
    log_sigma2 = torch.full((1, 1), 2.0 * math.log(0.1 * 0.4), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([log_sigma2], line_search_fn="strong_wolfe", max_iter=100)
    weight = torch.full((1, 1), 0.4, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = mixture_kl(weight, log_sigma2, levels, slab, *USUAL)
        value.backward()
        return value

    optimizer.step(closure)
    assert math.exp(0.5 * log_sigma2.item()) == pytest.approx(0.25 * 0.4, rel=0.05)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("log_sigma2", [-40.0, -10.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_parameters_give_finite_gradients(
    dtype: torch.dtype, log_sigma2: float, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    levels = torch.tensor([[-0.2, 0.0, 0.3]], dtype=dtype, device=device)
    weight = torch.tensor([[-0.2, 0.0, 0.3, -0.1, 0.15, 1e-20, 1e4, -1e4, 1e-6]], dtype=dtype, device=device)
    leaves = [tensor.requires_grad_() for tensor in (weight, torch.full_like(weight, log_sigma2), levels)]
    slab = torch.tensor(0.04, device=device, dtype=dtype)
    value = forced_or_automatic(lambda each: mixture_kl(*leaves, slab, *USUAL, each), backend)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter(granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 5, granularity).to(device)
    expected = case.leaves()
    run(expected, backend).backward()
    turned = replace(case, weight=case.weight.mT.contiguous().mT, log_sigma2=case.log_sigma2.mT.contiguous().mT)
    for variant in (channels_last(case, ["weight", "log_sigma2"]), channels_last(case, ["weight"]), turned):
        leaves = [getattr(variant, name).detach().requires_grad_() for name in GRADIENTS]
        mixture_kl(*leaves, slab_of(case), *USUAL, backend).backward()
        for name, leaf in zip(GRADIENTS, leaves, strict=True):
            torch.testing.assert_close(leaf.grad, getattr(expected, name).grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("argument", ["weight", "log_sigma2", "levels"])
@pytest.mark.parametrize("column", [0, 2])
def test_nan_is_not_hidden(column: int, argument: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(LinearShape(1, 3, 37), 3, "channel")
    getattr(case, argument)[1, column] = math.nan
    case = case.to(device).leaves()
    value = run(case, backend)
    value.backward()
    assert value.isnan()
    assert case.weight.grad[1, column].isnan() and case.log_sigma2.grad[1, column].isnan()
    assert case.weight.grad[0].isfinite().all() and case.weight.grad[2].isfinite().all()
    assert case.levels.grad[1].isnan().all() and case.levels.grad[::2].isfinite().all()


@pytest.mark.parametrize("runs_on", RUNS_ON)
def test_nan_of_the_slab_is_not_hidden(runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_LINEAR, 3, "tensor").to(device).leaves()
    slab = torch.tensor(math.nan, device=device)
    value = mixture_kl(case.weight, case.log_sigma2, case.levels, slab, *USUAL, backend)
    value.backward()
    assert value.isnan() and case.weight.grad.isnan().all()


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 3, 2, 2)], ids=str)
def test_no_weights(shape: tuple[int, ...], granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    groups = shape[0] if granularity == "channel" else 1
    levels = torch.linspace(-1.0, 1.0, 3, device=device).repeat(groups, 1).requires_grad_()
    weight, log_sigma2 = (torch.empty(shape, device=device).requires_grad_() for _ in range(2))
    value = mixture_kl(weight, log_sigma2, levels, torch.tensor(0.3, device=device), backend=backend)
    value.backward()
    assert value.item() == 0.0
    assert weight.grad.shape == shape and torch.equal(levels.grad, torch.zeros_like(levels))


def cpu_results() -> Iterator[Tensor]:
    """Value and gradients from the CPU kernels: rows longer than a block, shorter than a vector, and overlaps."""
    for shape in (LinearShape(1, 129, 341), LinearShape(1, 3, 4231), LinearShape(1, 7, 13), SMALL_CONV2D):
        for num_levels in (2, 3, 16):
            for granularity in GRANULARITIES:
                for mixture in ((0.05, 0.4), (0.25, 0.1), (2.0, 0.01)):
                    case = make_case(shape, num_levels, granularity).leaves()
                    value = run(case, "cpu", mixture)
                    value.backward()
                    yield from (value, *(getattr(case, name).grad for name in GRADIENTS))


def cpu_digest() -> str:
    return digest(cpu_results())


@pytest.mark.parametrize("isa", lower_isas())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_mixture_kl", "cpu_digest") == cpu_digest()


@pytest.mark.skipif(not status("mixture_kl", "cpu", "cpu").usable, reason="no CPU kernels")
def test_threads_do_not_change_a_bit() -> None:
    assert len(digests_of_threads(cpu_digest)) == 1


def test_upstream_gradient_scales_and_the_slab_gets_none() -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor")
    case, other = case.leaves(), case.leaves()
    slab = slab_of(case).requires_grad_()
    mixture_kl(case.weight, case.log_sigma2, case.levels, slab).backward()
    (-2.5 * run(other)).backward()
    assert slab.grad is None
    for name in GRADIENTS:
        torch.testing.assert_close(getattr(other, name).grad, -2.5 * getattr(case, name).grad)


@pytest.mark.parametrize("layout", [(), ("weight", "log_sigma2")], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity: str, layout: tuple[str, ...]) -> None:
    case = channels_last(make_case(SMALL_CONV2D, 3, granularity), layout)
    leaves = [getattr(case, name).detach().requires_grad_() for name in GRADIENTS]
    torch.library.opcheck(torch.ops.bqnn.mixture_kl.default, (*leaves, slab_of(case), *USUAL))
    tensors = [leaf.detach() for leaf in leaves]
    arguments = (torch.tensor(2.0), *tensors, slab_of(case), *USUAL)
    torch.library.opcheck(torch.ops.bqnn.mixture_kl_backward.default, arguments)


@pytest.mark.parametrize("runs_on", compiled_backends("mixture_kl"))
def test_compiles(runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case = make_case(SMALL_CONV2D, 3, "channel").to(device)
    eager, compiled = case.leaves(), case.leaves()
    expected = run(eager, backend)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled, backend)
    assert torch.equal(found, expected)
    expected.backward()
    found.backward()
    for name in GRADIENTS:
        assert torch.equal(getattr(compiled, name).grad, getattr(eager, name).grad)


@pytest.mark.parametrize("backend", ["cuda", "abacus"] if INTERPRETED else ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SMALL_LINEAR, 3, "tensor")
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::mixture_kl: \w+ .*\w"):
        run(case, backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::mixture_kl: \w+ .*\w"):
        run(case)


SMALL = make_case(SMALL_LINEAR, 3, "tensor")


@pytest.mark.parametrize(
    ("argument", "value", "error_type", "message"),
    [
        pytest.param("weight", SMALL.weight.int(), TypeError, "weight must be floating point.*int32", id="weight-int"),
        pytest.param("weight", None, TypeError, "weight must be a tensor, got NoneType", id="weight-none"),
        pytest.param("log_sigma2", SMALL.log_sigma2[0], ValueError, r"log_sigma2.*\[7, 13\], got \[13\]", id="sigma"),
        pytest.param("levels", SMALL.levels[0], ValueError, r"levels must have the shape.*\[3\]", id="levels-1d"),
        pytest.param(
            "levels", SMALL.levels.expand(2, 3), ValueError, r"levels .* 2 to 16\], got \[2, 3\]", id="groups"
        ),
        pytest.param("slab_sigma2", 0.2, TypeError, "slab_sigma2 must be a tensor, got float", id="slab-float"),
        pytest.param("slab_sigma2", torch.ones(1), ValueError, r"slab_sigma2 must be a scalar.*\[1\]", id="slab-1d"),
        pytest.param("slab_sigma2", torch.tensor(1), TypeError, "slab_sigma2 must be floating point", id="slab-int"),
        pytest.param("slab_sigma2", torch.ones((), device="meta"), ValueError, "slab_sigma2 is on meta", id="device"),
        pytest.param("spike_width", 0.0, ValueError, "spike_width must be from 0.001 to 1000.* got 0", id="width"),
        pytest.param("spike_width", math.nan, ValueError, "spike_width must be from 0.001.* got nan", id="width-nan"),
        pytest.param("spike_width", "1", TypeError, "spike_width must be a number, got str", id="width-text"),
        pytest.param("slab_share", 1.0, ValueError, "slab_share must be from 1e-06 to 0.999999, got 1", id="share"),
        pytest.param("slab_share", 0, ValueError, "slab_share must be from 1e-06 to 0.999999, got 0", id="no-share"),
    ],
)
def test_bad_input(argument: str, value: object, error_type: type[Exception], message: str) -> None:
    arguments = {name: getattr(SMALL, name) for name in GRADIENTS} | {"slab_sigma2": slab_of(SMALL)}
    with pytest.raises(error_type, match=message):
        mixture_kl(**arguments | {argument: value})  # type: ignore[arg-type]
