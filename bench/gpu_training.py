"""Training ops and steps on a GPU: the kernels against plain PyTorch, compiled or not, and against ordinary layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import bqnn
from bench.gpu_timing import ROUNDS, costs
from bqnn import ops
from bqnn.core import quantizer
from bqnn.core.product import channels_last
from bqnn.models import build
from tests.support.helpers import Case, make_case
from tests.support.shapes import Conv2dShape, LinearShape

NUM_LEVELS, SEED = 3, 20261
DATASET_SIZE = 60_000


class Row(NamedTuple):
    """One variant of one case; ``error``: distance from the reference; ``weight_bytes``, where they count."""

    case: str
    variant: str
    seconds: float
    peak_bytes: int
    error: float | None = None
    weight_bytes: int | None = None


class Asked(NamedTuple):
    """How many times faster, and smaller in peak memory, than a variant the kernels shall be."""

    rival: str
    faster: float
    smaller: float | None = None


LAYERS = {
    "linear-4096-4096-B256": LinearShape(256, 4096, 4096),
    "linear-4096-4096-B2048": LinearShape(2048, 4096, 4096),
    "conv2d-128-128-3x3-32x32-B128": Conv2dShape(128, 128, 128, 32, 32, (3, 3), padding=(1, 1)),
    "conv2d-160-12-3x3-32x32-B256": Conv2dShape(256, 160, 12, 32, 32, (3, 3), padding=(1, 1)),
}
ASKED = {
    "sample_linear-4096-4096-B256": [Asked("reference", 3.0, 3.0), Asked("compiled", 1.5)],
    "sample_linear-4096-4096-B2048": [Asked("reference", 1.5, 3.0), Asked("compiled", 1.1)],
    "moment_linear": [Asked("reference", 2.5, 3.0), Asked("compiled", 1.3)],
    "sample_conv2d": [Asked("reference", 2.0, 2.5), Asked("compiled", 1.1)],
    "moment_conv2d": [Asked("reference", 2.0, 2.5), Asked("compiled", 1.1)],
    "spike_slab_kl": [Asked("reference", 10.0)],
}
"""What is asked of a case, by what its name begins with."""
NETWORKS = {"lenet5": (128, 1, 28, 28), "densenet": (64, 3, 32, 32)}
ALLOWED = 2e-2
"""The relative root mean square error of outputs and gradients, which are bfloat16, beyond which there is no figure."""
KINDS = ("sample", "moment")


def plain_sample(case: Case, x: Tensor) -> Tensor:
    """What a user would write, and torch.compile take apart: straight-through autograd, noise by torch.randn."""
    w = case.weight + (0.5 * case.log_sigma2).exp() * torch.randn_like(case.weight)
    quantized = case.levels[0, 0].expand_as(w)
    for j in range(NUM_LEVELS - 1):
        quantized = torch.where(w > case.thresholds[0, j], case.levels[0, j + 1], quantized)
    return case.product(x, (quantized + (w - w.detach())).to(x.dtype), case.bias.to(x.dtype))


def plain_moment(case: Case, x: Tensor) -> Tensor:
    """As :func:`plain_sample`, the moment-matched product."""
    mean, variance = quantizer.moments(case.weight, case.log_sigma2, case.levels, case.thresholds)
    y = case.product(x, mean.to(x.dtype), case.bias.to(x.dtype))
    return y + case.product(x * x, variance.to(x.dtype)).clamp(min=1e-12).sqrt() * torch.randn_like(y)


PLAIN = {"sample": plain_sample, "moment": plain_moment}


def layer_rows(
    kind: str, name: str, shape: LinearShape | Conv2dShape, device: torch.device, ours: str, rounds: int = ROUNDS
) -> Iterator[Row]:
    """Forward and backward pass of one layer by one estimator, and of the ordinary layer, in bfloat16."""
    op = "linear" if isinstance(shape, LinearShape) else "conv2d"
    function = getattr(ops, f"{kind}_{op}")
    options = {"coarse_variance": True} if kind == "moment" else {}
    case, seed = make_case(shape, NUM_LEVELS, "tensor").to(device).leaves(), torch.tensor(SEED)
    parameters = [case.weight, case.log_sigma2, case.levels, case.bias]
    x, grad = case.x.detach().bfloat16(), torch.randn(case.output_shape, device=device).bfloat16()
    x, grad = channels_last(x).requires_grad_(), channels_last(grad)
    weight, bias = case.weight.detach().bfloat16().requires_grad_(), case.bias.detach().bfloat16().requires_grad_()

    def run(backend: str) -> Tensor:
        posterior = (x, case.weight, case.log_sigma2, case.levels, case.thresholds, case.bias, seed)
        return function(*posterior, **options, **case.geometry, backend=backend)

    def step(forward: Callable[..., Tensor], leaves: list[Tensor], *arguments: Any) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (y := forward(*arguments), *torch.autograd.grad(y, leaves, grad))

    calls = {backend: step(run, [x, *parameters], backend) for backend in (ours, "reference")}
    expected = calls["reference"]()
    errors = {ours: max(map(_distance, calls[ours](), expected))}
    calls["compiled"] = step(torch.compile(PLAIN[kind]), [x, *parameters], case, x)
    calls["ordinary layer"] = step(case.product, [x, weight, bias], x, weight, bias)
    for variant, cost in costs(calls, device, rounds).items():
        yield Row(f"{kind}_{name}", variant, *cost, errors.get(variant))


def kl_rows(weights: int, device: torch.device, ours: str, rounds: int = ROUNDS) -> Iterator[Row]:
    """Value and gradients of spike_slab_kl."""
    case = make_case(LinearShape(1, 4096, weights // 4096), NUM_LEVELS, "tensor").to(device).leaves()
    leaves = [case.weight, case.log_sigma2, case.levels]
    tau = torch.full_like(case.levels, 0.1)

    def step(backend: str) -> tuple[Tensor, ...]:
        value = ops.spike_slab_kl(*leaves, tau, backend)
        return value, *torch.autograd.grad(value, leaves)

    calls = {ours: lambda: step(ours), "reference": lambda: step("reference")}
    expected = step("reference")
    errors = {variant: max(map(_distance, call(), expected)) for variant, call in calls.items()}
    for variant, cost in costs(calls, device, rounds).items():
        yield Row(f"spike_slab_kl-{weights >> 20}M", variant, *cost, errors[variant])


def network_rows(
    model: str, shape: tuple[int, ...], device: torch.device, ours: str, rounds: int = ROUNDS
) -> Iterator[Row]:
    """A training step (forward, loss with the divergence, backward) of a network, bfloat16 autocast."""
    x = torch.randn(shape, device=device)
    target = torch.randint(10, (x.shape[0],), device=device)

    def step(estimator: str | None) -> Callable[[], Tensor]:
        torch.manual_seed(SEED)
        net = build(model, {})
        if estimator is not None:
            net = bqnn.convert(net, NUM_LEVELS, estimator=estimator)
        net = net.to(device).train()

        def run() -> Tensor:
            torch.manual_seed(SEED)
            net.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                output = net(x).float()
            if estimator is None:
                loss = F.cross_entropy(output, target)
            else:
                loss = bqnn.elbo(output, target, net, DATASET_SIZE).loss
            loss.backward()
            return loss.detach()

        return run

    calls: dict[str, Callable[[], object]] = {"FPNN": step(None)}
    for estimator in KINDS:
        for backend in (ours, "reference"):
            calls[f"{backend} {estimator}"] = _forced(step(estimator), backend)
    for variant, cost in costs(calls, device, rounds).items():
        yield Row(f"step-{model}-B{x.shape[0]}", variant, *cost)


def _forced(call: Callable[[], Any], backend: str) -> Callable[[], Any]:
    def run() -> Any:
        with patch.dict(os.environ, {"BQNN_BACKEND": backend}):
            return call()

    return run


def _distance(found: Tensor, expected: Tensor) -> float:
    """The root mean square difference, relative to the expected one's."""
    scale = expected.double().square().mean().sqrt().clamp(min=1e-30)
    return float(((found.double() - expected.double()).square().mean().sqrt() / scale).detach())
