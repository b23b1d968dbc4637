"""Inputs, the distance rule, and the list of backends that a test runs on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core import native
from bqnn.ops import dispatch
from tests.support import formulas
from tests.support.shapes import Conv2dShape, LinearShape

SEED = 0x1234_5678_9ABC_DEF0
"""Both halves of the key are in use."""
ROUNDINGS = 8
"""So many directions are tried in which inputs may have been rounded."""
MARGIN = 1e-3
"""No sampled weight is nearer to a threshold, so that rounding does not choose its cell."""

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def usable_backends(op: str) -> list[Any]:
    """(device, backend) of everything that can run ``op`` here, as pytest parameters."""
    return [
        pytest.param((device, backend), id=f"{device}-{backend}")
        for device in DEVICES
        for backend in dispatch.ORDER
        if dispatch.status(op, backend, device).usable
    ]


def forced_or_automatic(run: Callable[[str | None], Tensor], backend: str | None) -> Tensor:
    """What ``run`` returns with the backend; or with the automatic choice, where the backend says that it does not take
    such tensors. That it says so and runs nothing else is what test_forced_backends is about."""
    try:
        return run(backend)
    except dispatch.BackendError as error:
        assert "it takes" in str(error)
        return run(None)


def served(run: Callable[..., Tensor], backend: str | None) -> Callable[[Case], Tensor]:
    """``run`` with the backend, or with the automatic choice for a case that the backend does not serve."""
    return lambda case: forced_or_automatic(lambda each: run(case, backend=each), backend)


def compiled_backends(op: str) -> list[Any]:
    """What torch.compile is tried with: the automatic choice on the CPU, and the backend "triton" where it can run."""
    automatic = pytest.param(("cpu", None), id="cpu-automatic")
    return [automatic, *(runs_on for runs_on in usable_backends(op) if runs_on.values[0][1] == "triton")]


def triton_devices(op: str) -> list[Any]:
    """The devices on which the backend "triton" can run ``op`` here, as pytest parameters."""
    return [
        pytest.param(device, id=f"{device}-triton")
        for device in DEVICES
        if dispatch.status(op, "triton", device).usable
    ]


def digest(tensors: Iterable[Tensor]) -> str:
    """A checksum of the tensors' values, bit by bit but for the sign of zero."""
    checksum = hashlib.sha256()
    for tensor in tensors:
        checksum.update((tensor.detach() + 0).contiguous().numpy().tobytes())
    return checksum.hexdigest()


def digests_of_threads(make: Callable[[], str]) -> set[str]:
    """What ``make`` gives with one, two and three threads."""
    before, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(make())
    finally:
        torch.set_num_threads(before)
    return found


def lower_isas() -> list[str]:
    """The instruction sets below the best one that kernels can be made to use here; none without the extension."""
    best = native.cpu_isa()
    return [] if best == "none" else list(native.ISAS[: native.ISAS.index(best)])


def run_on_isa(isa: str, module: str, function: str) -> str:
    """What ``module.function()`` returns, a word, in a process whose kernels use ``isa``."""
    return run_with({"BQNN_CPU_ISA": isa}, module, function, f"import bqnn; assert bqnn.cpu_isa() == {isa!r}")


def run_with(environment: dict[str, str], module: str, function: str, before: str = "") -> str:
    """What ``module.function()`` returns, a word, in a process with these variables, where ``before`` runs first."""
    script = f"{before}\nimport {module} as m; print(m.{function}())"
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, **environment, "PYTHONPATH": root}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return output.stdout.split()[-1]


@dataclass
class Case:
    """The tensors of a layer, on the CPU; ``geometry`` is empty for a linear layer."""

    x: Tensor
    weight: Tensor
    log_sigma2: Tensor
    levels: Tensor
    thresholds: Tensor
    bias: Tensor
    geometry: dict[str, Any] = field(default_factory=dict)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dim() == 4:
            return F.conv2d(x, weight, bias, **self.geometry)
        return F.linear(x, weight, bias)

    @property
    def output_shape(self) -> torch.Size:
        return self.product(self.x.to(self.weight.dtype), self.weight).shape

    def to(self, *args: Any, x: torch.dtype | None = None) -> Case:
        """The case on another device or in another dtype; ``x`` is a dtype for the input alone."""
        names = ("x", "weight", "log_sigma2", "levels", "thresholds", "bias")
        case = replace(self, **{name: getattr(self, name).to(*args) for name in names})
        return case if x is None else replace(case, x=case.x.to(x))

    def tensors(self) -> tuple[Tensor, ...]:
        """x, weight, log_sigma2, levels, thresholds, bias: the first arguments of an op."""
        return self.x, self.weight, self.log_sigma2, self.levels, self.thresholds, self.bias

    def leaves(self) -> Case:
        """A copy of it whose tensors require gradients."""
        names = ("x", "weight", "log_sigma2", "levels", "thresholds", "bias")
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in names})


def make_codebook(
    num_levels: int, granularity: str, channels: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random levels, 0.1 to 0.6 apart and centred at about 0, and thresholds anywhere between them, not half-way."""
    groups = channels if granularity == "channel" else 1
    steps = 0.1 + 0.5 * torch.rand(groups, num_levels - 1, generator=generator)
    levels = F.pad(steps.cumsum(1), (1, 0)) - 0.5 * steps.sum(1, keepdim=True)
    levels += 0.1 * torch.randn(groups, 1, generator=generator)
    share = 0.2 + 0.6 * torch.rand(groups, num_levels - 1, generator=generator)
    return levels, levels[:, :-1] + share * steps


def make_case(
    shape: LinearShape | Conv2dShape,
    num_levels: int,
    granularity: str,
    noise: tuple[int, int] | None = None,
) -> Case:
    """A random float32 case, means spread over all cells; no mean, or with noise (seed, offset) no sample, is near a
    threshold."""
    generator = torch.Generator().manual_seed(1000 * num_levels + sum(shape[:3]))
    if isinstance(shape, Conv2dShape):
        x_shape: tuple[int, ...] = (shape.batch, shape.inputs, shape.height, shape.width)
        weight_shape: tuple[int, ...] = (shape.channels, shape.inputs // shape.groups, *shape.kernel)
        geometry = shape.geometry
    else:
        x_shape, weight_shape, geometry = (shape.batch, shape.columns), (shape.channels, shape.columns), {}
    levels, thresholds = make_codebook(num_levels, granularity, shape.channels, generator)
    x = torch.randn(x_shape, generator=generator)
    weight = levels.std() * 1.2 * torch.randn(weight_shape, generator=generator)
    log_sigma2 = 2.0 * (0.03 + 0.2 * torch.rand(weight_shape, generator=generator)).log()
    case = Case(x, weight, log_sigma2, levels, thresholds, torch.randn(shape.channels, generator=generator), geometry)
    shift = torch.zeros(weight_shape, dtype=torch.float64)
    if noise is not None:
        shift = formulas.noise(*noise, weight_shape) * (0.5 * log_sigma2.double()).exp()
    return replace(case, weight=_away_from_thresholds(weight, shift, thresholds))


def _away_from_thresholds(weight: Tensor, shift: Tensor, thresholds: Tensor) -> Tensor:
    sample = (weight.double() + shift).flatten(1).unsqueeze(-1) - thresholds.unsqueeze(1)
    near = (sample.abs() < MARGIN).any(-1).view(weight.shape)
    return torch.where(near, weight + 2.0 * MARGIN, weight)


def error(actual: Tensor, exact: Tensor, norm: str) -> float:
    """The largest ("max") or the root mean square ("rms") deviation."""
    difference = actual.detach().cpu().double() - exact.detach().double()
    return float(difference.abs().max() if norm == "max" else difference.square().mean().sqrt())


def assert_distance(
    name: str,
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    norm: str,
    roundings: float,
    scale: float = 0.0,
    allowance: float = 0.0,
) -> None:
    """The distance rule: the error of ``actual`` against the float64 ``exact`` is at most twice the error of the same
    computation in PyTorch in the same dtype, ``plain``, plus so many roundings of the result, or of ``scale``, the
    size of the terms where they can cancel, plus an ``allowance``."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    floor = roundings * torch.finfo(plain.dtype).eps * max(scale, error(torch.zeros_like(exact), exact, norm))
    found, allowed = error(actual, exact, norm), 2.0 * error(plain, exact, norm) + floor + allowance
    assert found <= allowed, f"{name}: {norm} error {found:.3g} of {allowed:.3g} allowed"


def sampled_product(case: Case, noise: Tensor | None) -> Tensor:
    """x * Q(mu + sigma * noise) + bias in plain autograd, straight-through in mu and log_sigma2; no noise: Q(mu)."""
    weight = case.weight
    if noise is not None:
        weight = weight + (0.5 * case.log_sigma2).exp() * noise.to(weight.dtype)
    quantized = formulas.quantize(weight, case.levels, case.thresholds)
    return case.product(case.x, quantized.to(case.x.dtype), case.bias.to(case.x.dtype))


def moment_product(case: Case, noise: Tensor, mode: str) -> Tensor:
    """x * E + sqrt(x^2 * V) noise + bias in plain autograd."""
    tensors = (case.weight, case.log_sigma2, case.levels, case.thresholds)
    mean, variance = (moment.to(case.x.dtype) for moment in formulas.weight_moments(*tensors, mode))
    std = case.product(case.x * case.x, variance).clamp(min=torch.finfo(case.x.dtype).tiny).sqrt()
    return case.product(case.x, mean, case.bias.to(case.x.dtype)) + std * noise.to(case.x.dtype)


def assert_matches(
    run: Callable[[Case], Tensor],
    formula: Callable[[Case], Tensor],
    case: Case,
    device: str,
    gradients: Sequence[str],
) -> None:
    """Output and gradients of ``run`` on ``device`` keep the distance rule, ``formula`` being plain PyTorch."""
    exact, plain, here = case.to(torch.float64).leaves(), case.leaves(), case.to(device).leaves()
    outputs = formula(exact), formula(plain), run(here)
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    for y in outputs:
        y.backward(upstream.to(y))
    moved = rounded_inputs(case, formula, upstream)

    def allowance(norm: str, result: Callable[[Case, Tensor], Tensor]) -> float:
        return max((error(result(*each), result(exact, outputs[0]), norm) for each in moved), default=0.0)

    tolerance = allowance("max", lambda _, y: y)
    assert_distance("y", outputs[2], outputs[1], outputs[0], "max", 4.0, scale=1.0, allowance=tolerance)
    for name in gradients:
        tensors = (getattr(owner, name).grad for owner in (here, plain, exact))
        # A parameter's gradient is a long sum, with a chance order and cancellation.
        roundings = 4.0 if name == "x" else 16.0
        tolerance = allowance("rms", lambda moved, _, name=name: getattr(moved, name).grad)
        assert_distance(f"gradient of {name}", *tensors, "rms", roundings, allowance=tolerance)


def rounded_inputs(case: Case, formula: Callable[[Case], Tensor], upstream: Tensor) -> list[tuple[Case, Tensor]]:
    """For a case of a single weight: float64 leaves that half a rounding of float32 away from the case's are, in a few
    directions, and the results with them, whose gradients are there. PyTorch's one error is no measure of the others
    then, which a rounding of an input may make several times as large."""
    if case.weight.numel() > 1:
        return []
    moved, generator = [], torch.Generator().manual_seed(0)
    for _ in range(ROUNDINGS):
        leaves = case.to(torch.float64)
        for name in ("x", "weight", "log_sigma2", "levels", "thresholds", "bias"):
            tensor = getattr(leaves, name)
            direction = torch.randint(2, tensor.shape, generator=generator) * 2 - 1
            leaves = replace(leaves, **{name: tensor * (1.0 + direction * 0.5 * torch.finfo(torch.float32).eps)})
        leaves = leaves.leaves()
        y = formula(leaves)
        y.backward(upstream.to(y))
        moved.append((leaves, y))
    return moved


def compare_layouts(run: Callable[[Case], Tensor], case: Case, *others: Case) -> None:
    """Output and gradients are the same whatever the strides of the input tensors are."""
    results = []
    for variant in (case, *others):
        leaves = [tensor.detach().requires_grad_() for tensor in variant.tensors()]
        y = run(Case(*leaves, variant.geometry))
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def channels_last(case: Case, names: Sequence[str]) -> Case:
    """The case with the named 4-D tensors in the memory format channels-last."""
    return replace(case, **{name: getattr(case, name).to(memory_format=torch.channels_last) for name in names})


def geometry_arguments(case: Case) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups as an op's schema takes them."""
    return tuple(list(value) if isinstance(value, tuple) else value for value in case.geometry.values())
