"""spike_slab_kl against Python floats weight by weight, by numerical gradients, and as an approximation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bqnn import BackendError
from bqnn.ops import spike_slab_kl
from bqnn.ops.dispatch import status
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

RUNS_ON = usable_backends("spike_slab_kl")
# These are tau in gaps: narrow windows leave most of the prior to the slab, wide ones overlap to more than 1.
WIDTHS = [pytest.param(0.15, id="narrow"), pytest.param(0.375, id="published"), pytest.param(1.5, id="wide")]
ZERO = [pytest.param(False, id="no-zero"), pytest.param(True, id="zero-level")]
GRADIENTS = ("weight", "log_sigma2", "levels")


def make_prior(
    shape: LinearShape | Conv2dShape, num_levels: int, granularity: str, width: float, zero: bool
) -> tuple[Case, Tensor]:
    """A case and the windows' widths; with ``zero`` the middle level of each codebook is 0, and no other one."""
    case = make_case(shape, num_levels, granularity)
    middle = num_levels // 2
    levels = case.levels - case.levels[:, middle : middle + 1] + (0.0 if zero else 0.0137)
    steps = torch.diff(levels, dim=1)
    gaps = torch.minimum(torch.cat([steps[:, :1], steps], 1), torch.cat([steps, steps[:, -1:]], 1))
    return replace(case, levels=levels), width * gaps


def run(case: Case, tau: Tensor, backend: str | None = None) -> Tensor:
    return spike_slab_kl(case.weight, case.log_sigma2, case.levels, tau, backend)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_value(num_levels: int, granularity: str, width: float, zero: bool, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case, tau = make_prior(SMALL_LINEAR, num_levels, granularity, width, zero)
    expected = formulas.spike_slab_kl(case.weight, case.log_sigma2, case.levels, tau)
    found = run(case.to(device), tau.to(device), backend)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
    exact = case.to(torch.float64)
    assert run(exact, tau.double()).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "num_levels"), [*LINEAR_GRID[:15:2], *CONV2D_GRID[:15:2]])
def test_gradients_keep_their_precision(
    shape: LinearShape | Conv2dShape, num_levels: int, granularity: str, runs_on: tuple[str, str]
) -> None:
    device, backend = runs_on
    assert_gradients(*make_prior(shape, num_levels, granularity, 0.375, zero=False), device, backend)


def assert_gradients(case: Case, tau: Tensor, device: str, backend: str) -> None:
    """The gradients of ``backend`` keep the distance rule, the reference in float32 being plain PyTorch."""
    exact, plain, here = case.to(torch.float64).leaves(), case.leaves(), case.to(device).leaves()
    run(exact, tau.double(), "reference").backward()
    run(plain, tau, "reference").backward()
    (3.0 * run(here, tau.to(device), backend)).backward()
    for name in GRADIENTS:
        expected = getattr(exact, name).grad
        found = getattr(here, name).grad / 3.0
        allowed = 2.0 * error(getattr(plain, name).grad, expected, "rms")
        assert error(found, expected, "rms") <= allowed + 1e-6 * float(expected.square().mean().sqrt())
        assert error(found, expected, "rms") <= 1e-4 * float(expected.square().mean().sqrt())


@pytest.mark.parametrize("device", triton_devices("spike_slab_kl"))
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
    case, tau = make_prior(LinearShape(1, channels, columns), 3, granularity, 0.375, zero=False)
    expected = run(case.to(torch.float64), tau.double(), "reference").item()
    assert run(case.to(device), tau.to(device), "triton").item() == pytest.approx(expected, rel=1e-6)
    assert_gradients(case, tau, device, "triton")


@pytest.mark.parametrize("device", triton_devices("spike_slab_kl"))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_half_precision_is_that_of_what_is_stored(granularity: str, device: str) -> None:
    case, tau = make_prior(LinearShape(1, 5, 129), 3, granularity, 0.375, zero=False)
    here, tau = case.to(device, torch.float16).leaves(), tau.half()
    exact = here.to("cpu", torch.float64).leaves()
    value, expected = run(here, tau.to(device), "triton"), run(exact, tau.double(), "reference")
    value.backward()
    expected.backward()
    roundoff = torch.finfo(torch.float16).eps
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in GRADIENTS:
        found, of_exact = getattr(here, name).grad, getattr(exact, name).grad
        assert found.dtype == torch.float16
        assert error(found, of_exact, "rms") <= roundoff * float(of_exact.square().mean().sqrt())


@pytest.mark.parametrize(("num_levels", "zero"), [(2, False), (3, False), (3, True), (16, False)])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck(num_levels: int, granularity: str, width: float, zero: bool) -> None:
    case, tau = make_prior(LinearShape(1, 3, 4), num_levels, granularity, width, zero)
    case, tau = case.to(torch.float64), tau.double()
    windows = (-0.5 * ((case.weight.unsqueeze(-1) - case.levels.unsqueeze(1)) / tau.unsqueeze(1)).square()).exp()
    overlap = windows.sum(-1) > 1.0
    if width == 1.5 and num_levels > 2:
        assert overlap.any(), "no weight has overlapping windows"
    if width == 0.15:
        assert not overlap.all(), "every weight has overlapping windows"
    inputs = [case.weight.requires_grad_(), case.log_sigma2.requires_grad_()]
    if not zero:  # a level that moves away from 0 moves the slab, a jump
        inputs.append(case.levels.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda weight, log_sigma2, levels=case.levels: spike_slab_kl(weight, log_sigma2, levels, tau),
        inputs,
        eps=1e-7,
        atol=1e-5,
        rtol=1e-5,
    )


def test_levels_have_a_gradient_where_one_is_zero() -> None:
    """With the slab held at the level 0 the levels' gradients are those of the distances to all levels."""
    case, tau = make_prior(SMALL_LINEAR, 3, "tensor", 0.375, zero=True)
    case, tau = case.to(torch.float64).leaves(), tau.double()
    run(case, tau).backward()
    # Weights and levels enter by their distances alone, so moving all of them together changes nothing.
    torch.testing.assert_close(case.levels.grad.sum(), -case.weight.grad.sum())


@pytest.mark.parametrize("log_alpha", [-8.0, -4.0, -1.0, 0.0, 1.0, 4.0, 8.0])
def test_spike_approximates_the_divergence_from_the_log_uniform_prior(log_alpha: float) -> None:
    """KL(N(d, sigma^2) || log-uniform) = E log|w| - log sigma + C by quadrature, C such that it goes to 0 with d."""
    sigma2, distance = 1.0, math.exp(-0.5 * log_alpha)
    # Midpoints of a fine grid pass the singularity of log|w|, which can be integrated.
    z = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 1e5 - 10.0
    density = (-0.5 * z * z).exp() / math.sqrt(2.0 * math.pi)
    expectation = float((density * (distance + z).abs().log()).sum() / 1e5)
    at_zero = -0.5 * (float(torch.tensor(2.0).log()) + 0.5772156649)
    exact = expectation - at_zero
    weight = torch.tensor([[distance]], dtype=torch.float64)
    levels = torch.tensor([[0.0, 1e6]], dtype=torch.float64)
    # A window as wide as all gives the spike alone.
    found = spike_slab_kl(
        weight, torch.full_like(weight, math.log(sigma2)), levels, torch.tensor([[1e9, 1.0]]).double()
    )
    assert found.item() == pytest.approx(exact, abs=0.015)


def test_weights_are_drawn_to_the_levels() -> None:
    levels, tau = torch.tensor([[-0.2, 0.0, 0.2]]), torch.full((1, 3), 0.075)
    weight = torch.linspace(-0.2, 0.2, 41).view(1, -1)
    kl = torch.stack([spike_slab_kl(w.view(1, 1), torch.full((1, 1), -7.0), levels, tau) for w in weight[0]])
    on_levels, between = kl[[0, 20, 40]], kl[[10, 30]]
    assert on_levels.max() < 0.2 * between.min()


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
    tau = torch.full_like(levels, 0.075)
    value = forced_or_automatic(lambda each: spike_slab_kl(*leaves, tau, each), backend)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_do_not_matter(granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case, tau = make_prior(SMALL_CONV2D, 5, granularity, 0.375, zero=False)
    case, tau = case.to(device), tau.to(device)
    expected = case.leaves()
    run(expected, tau, backend).backward()
    turned = replace(case, weight=case.weight.mT.contiguous().mT, log_sigma2=case.log_sigma2.mT.contiguous().mT)
    for variant in (channels_last(case, ["weight", "log_sigma2"]), channels_last(case, ["weight"]), turned):
        leaves = [getattr(variant, name).detach().requires_grad_() for name in GRADIENTS]
        spike_slab_kl(*leaves, tau, backend).backward()
        for name, leaf in zip(GRADIENTS, leaves, strict=True):
            torch.testing.assert_close(leaf.grad, getattr(expected, name).grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("argument", ["weight", "log_sigma2", "levels"])
@pytest.mark.parametrize("zero", ZERO)
def test_nan_is_not_hidden(zero: bool, argument: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    case, tau = make_prior(LinearShape(1, 3, 37), 3, "channel", 0.375, zero)
    getattr(case, argument)[1, 2] = math.nan
    case = case.to(device).leaves()
    value = run(case, tau.to(device), backend)
    value.backward()
    assert value.isnan()
    assert case.weight.grad[1, 2].isnan() and case.log_sigma2.grad[1, 2].isnan()
    assert case.weight.grad[0].isfinite().all() and case.weight.grad[2].isfinite().all()


@pytest.mark.parametrize("runs_on", RUNS_ON)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 3, 2, 2)], ids=str)
def test_no_weights(shape: tuple[int, ...], granularity: str, runs_on: tuple[str, str]) -> None:
    device, backend = runs_on
    groups = shape[0] if granularity == "channel" else 1
    levels = torch.linspace(-1.0, 1.0, 3, device=device).repeat(groups, 1).requires_grad_()
    weight, log_sigma2 = (torch.empty(shape, device=device).requires_grad_() for _ in range(2))
    value = spike_slab_kl(weight, log_sigma2, levels, torch.full_like(levels, 0.3), backend)
    value.backward()
    assert value.item() == 0.0
    assert weight.grad.shape == shape and torch.equal(levels.grad, torch.zeros_like(levels))


def cpu_results() -> Iterator[Tensor]:
    """Value and gradients from the CPU kernels: rows longer than a block, shorter than a vector, and overlaps."""
    for shape in (LinearShape(1, 129, 341), LinearShape(1, 3, 4231), LinearShape(1, 7, 13), SMALL_CONV2D):
        for num_levels in (2, 3, 16):
            for granularity in GRANULARITIES:
                for width in (0.15, 0.375, 1.5):
                    case, tau = make_prior(shape, num_levels, granularity, width, zero=width == 0.375)
                    case = case.leaves()
                    value = run(case, tau, "cpu")
                    value.backward()
                    yield from (value, *(getattr(case, name).grad for name in GRADIENTS))


def cpu_digest() -> str:
    return digest(cpu_results())


@pytest.mark.parametrize("isa", lower_isas())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    assert run_on_isa(isa, "tests.test_spike_slab_kl", "cpu_digest") == cpu_digest()


@pytest.mark.skipif(not status("spike_slab_kl", "cpu", "cpu").usable, reason="no CPU kernels")
def test_threads_do_not_change_a_bit() -> None:
    assert len(digests_of_threads(cpu_digest)) == 1


def test_upstream_gradient_scales_and_tau_gets_none() -> None:
    case, tau = make_prior(SMALL_LINEAR, 3, "tensor", 0.375, zero=False)
    case, other = case.leaves(), case.leaves()
    tau.requires_grad_()
    run(case, tau).backward()
    (-2.5 * run(other, tau)).backward()
    assert tau.grad is None
    for name in GRADIENTS:
        torch.testing.assert_close(getattr(other, name).grad, -2.5 * getattr(case, name).grad)


@pytest.mark.parametrize("layout", [(), ("weight", "log_sigma2")], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity: str, layout: tuple[str, ...]) -> None:
    case, tau = make_prior(SMALL_CONV2D, 3, granularity, 0.375, zero=False)
    case = channels_last(case, layout)
    leaves = [getattr(case, name).detach().requires_grad_() for name in GRADIENTS]
    torch.library.opcheck(torch.ops.bqnn.spike_slab_kl.default, (*leaves, tau))
    tensors = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(torch.ops.bqnn.spike_slab_kl_backward.default, (torch.tensor(2.0), *tensors, tau))


@pytest.mark.parametrize("runs_on", compiled_backends("spike_slab_kl"))
def test_compiles(runs_on: tuple[str, str | None]) -> None:
    device, backend = runs_on
    case, tau = make_prior(SMALL_CONV2D, 3, "channel", 0.375, zero=False)
    case, tau = case.to(device), tau.to(device)
    eager, compiled = case.leaves(), case.leaves()
    expected = run(eager, tau, backend)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled, tau, backend)
    assert torch.equal(found, expected)
    expected.backward()
    found.backward()
    for name in GRADIENTS:
        assert torch.equal(getattr(compiled, name).grad, getattr(eager, name).grad)


@pytest.mark.parametrize("backend", ["cuda", "abacus"] if INTERPRETED else ["triton", "cuda", "abacus"])
def test_a_forced_backend_that_can_not_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tau = make_prior(SMALL_LINEAR, 3, "tensor", 0.375, zero=False)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::spike_slab_kl: \w+ .*\w"):
        run(case, tau, backend)
    monkeypatch.setenv("BQNN_BACKEND", backend)
    with pytest.raises(BackendError, match=rf"'{backend}' can not run bqnn::spike_slab_kl: \w+ .*\w"):
        run(case, tau)


SMALL, TAU = make_prior(SMALL_LINEAR, 3, "tensor", 0.375, zero=False)


@pytest.mark.parametrize(
    ("argument", "value", "error_type", "message"),
    [
        pytest.param("weight", SMALL.weight.int(), TypeError, "weight must be floating point.*int32", id="weight-int"),
        pytest.param("weight", None, TypeError, "weight must be a tensor, got NoneType", id="weight-none"),
        pytest.param("log_sigma2", SMALL.log_sigma2[0], ValueError, r"log_sigma2.*\[7, 13\], got \[13\]", id="sigma"),
        pytest.param("levels", SMALL.levels[0], ValueError, r"levels must have the shape.*\[3\]", id="levels-1d"),
        pytest.param("levels", torch.tensor(1.0), ValueError, "levels must have the shape", id="levels-scalar"),
        pytest.param(
            "levels",
            SMALL.levels.expand(2, 3),
            ValueError,
            r"levels .* 2 to 16\], got \[2, 3\]",
            id="groups",
        ),
        pytest.param("tau", TAU[:, :2], ValueError, r"tau .* of levels \[1, 3\], got \[1, 2\]", id="tau"),
        pytest.param(
            "tau", TAU.expand(7, 3), ValueError, r"tau must have the shape of levels.*\[7, 3\]", id="tau-rows"
        ),
        pytest.param("tau", 0.075, TypeError, "tau must be a tensor, got float", id="tau-float"),
        pytest.param("tau", TAU.to("meta"), ValueError, "tau is on meta", id="device"),
    ],
)
def test_bad_input(argument: str, value: object, error_type: type[Exception], message: str) -> None:
    arguments = {name: getattr(SMALL, name) for name in GRADIENTS} | {"tau": TAU}
    with pytest.raises(error_type, match=message):
        spike_slab_kl(**arguments | {argument: value})  # type: ignore[arg-type]
