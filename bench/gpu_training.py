"""Training ops on a GPU: the kernels against plain PyTorch, compiled or not, and against ordinary layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu_rows import Asked, Row, measured
from bench.gpu_timing import Call, Meter
from bqnn import ops
from bqnn.bayes.options import SLAB_SHARE, SPIKE_WIDTH
from bqnn.core import quantizer
from bqnn.core.product import channels_last
from tests.support.helpers import Case, make_case
from tests.support.shapes import Conv2dShape, LinearShape

NUM_LEVELS, SEED = 3, 20261
LAYERS = {
    "linear-4096-4096-B256": LinearShape(256, 4096, 4096),
    "linear-4096-4096-B2048": LinearShape(2048, 4096, 4096),
    "conv2d-128-128-3x3-32x32-B128": Conv2dShape(128, 128, 128, 32, 32, (3, 3), padding=(1, 1)),
    "conv2d-160-12-3x3-32x32-B256": Conv2dShape(256, 160, 12, 32, 32, (3, 3), padding=(1, 1)),
}
ASKED = {
    "sample_linear-4096-4096-B256": [Asked("reference", 3.0, 3.0), Asked("compiled", 1.5)],
    # Outputs and gradients are 160 MiB, the gradient of the weight that is made before 32 more, the reference's 464.
    "sample_linear-4096-4096-B2048": [Asked("reference", 1.5, 2.4), Asked("compiled", 1.1)],
    "moment_linear": [Asked("reference", 2.5, 3.0), Asked("compiled", 1.3)],
    # Beside the images hardly anything takes memory, whoever multiplies.
    "sample_conv2d": [Asked("reference", 2.0, 1.0), Asked("compiled", 1.1)],
    "moment_conv2d": [Asked("reference", 2.0, 2.5), Asked("compiled", 1.1)],
    "spike_slab_kl": [Asked("reference", 10.0)],
}
"""What is asked of a case, by what its name begins with."""
ALLOWED = 2e-2
"""The relative root mean square error of outputs and gradients, which are bfloat16, beyond which there is no figure."""
KINDS = ("sample", "moment")
DIVERGENCES = ("spike_slab_kl", "mixture_kl")


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


class LayerStep:
    """Forward and backward pass of a layer in bfloat16, with each of several inputs and weights that take turns."""

    def __init__(self, kind: str, shape: LinearShape | Conv2dShape, meter: Meter) -> None:
        op = "linear" if isinstance(shape, LinearShape) else "conv2d"
        self._function = getattr(ops, f"{kind}_{op}")
        self._options = {"coarse_variance": True} if kind == "moment" else {}
        self._plain = meter.compiled(PLAIN[kind])
        first = make_case(shape, NUM_LEVELS, "tensor").to(meter.device)
        n_bytes = 2 * first.x.nbytes + 4 * first.weight.nbytes  # x and its gradient in bfloat16, parameters and theirs
        self._cases = [first.leaves() for _ in range(meter.copies(n_bytes))]
        self._seed = torch.tensor(SEED)
        self._inputs = [channels_last(case.x.detach().bfloat16()).requires_grad_() for case in self._cases]
        self._grad = channels_last(torch.randn(first.output_shape, device=meter.device).bfloat16())

    def by(self, backend: str) -> list[Call]:
        """The op, on this backend."""

        def run(case: Case, x: Tensor) -> Tensor:
            posterior = (x, case.weight, case.log_sigma2, case.levels, case.thresholds, case.bias, self._seed)
            return self._function(*posterior, **self._options, **case.geometry, backend=backend)

        return [self._step(run, case, x) for case, x in zip(self._cases, self._inputs)]

    def compiled(self) -> list[Call]:
        """What a user would write, compiled."""
        return [self._step(self._plain, case, x) for case, x in zip(self._cases, self._inputs)]

    def ordinary(self) -> list[Call]:
        """nn.Linear or nn.Conv2d of the same size."""

        def step(case: Case, x: Tensor) -> Call:
            leaves = [x, *(each.detach().bfloat16().requires_grad_() for each in (case.weight, case.bias))]
            return lambda: (y := case.product(*leaves), *torch.autograd.grad(y, leaves, self._grad))

        return [step(case, x) for case, x in zip(self._cases, self._inputs)]

    def _step(self, forward: Callable[[Case, Tensor], Tensor], case: Case, x: Tensor) -> Call:
        leaves = [x, case.weight, case.log_sigma2, case.levels, case.bias]
        return lambda: (y := forward(case, x), *torch.autograd.grad(y, leaves, self._grad))


def layer_rows(kind: str, name: str, shape: LinearShape | Conv2dShape, ours: str, meter: Meter) -> Iterator[Row]:
    """One layer by one estimator: the kernels, plain PyTorch, the same compiled, and the ordinary layer."""
    step = LayerStep(kind, shape, meter)
    calls = {ours: step.by(ours), "reference": step.by("reference")}
    errors = {ours: meter.distance(calls[ours][0](), calls["reference"][0]())}
    calls |= {"compiled": step.compiled(), "ordinary layer": step.ordinary()}
    for variant, cost in meter.costs(calls).items():
        yield measured(f"{kind}_{name}", variant, cost, errors.get(variant))


def divergence_rows(op: str, weights: int, ours: str, meter: Meter) -> Iterator[Row]:
    """Value and gradients of a divergence."""
    case = make_case(LinearShape(1, 4096, weights // 4096), NUM_LEVELS, "tensor").to(meter.device)
    function = getattr(ops, op)
    if op == "spike_slab_kl":
        prior: tuple[Any, ...] = (torch.full_like(case.levels, 0.1),)
    else:
        prior = torch.full((), 0.25, device=meter.device), SPIKE_WIDTH, SLAB_SHARE
    leaves = [case.leaves() for _ in range(meter.copies(4 * case.weight.nbytes))]

    def step(backend: str, case: Case) -> Call:
        leaves = [case.weight, case.log_sigma2, case.levels]

        def run() -> tuple[Tensor, ...]:
            value = function(*leaves, *prior, backend)
            return value, *torch.autograd.grad(value, leaves)

        return run

    calls = {backend: [step(backend, case) for case in leaves] for backend in (ours, "reference")}
    errors = {ours: meter.distance(calls[ours][0](), calls["reference"][0]())}
    for variant, cost in meter.costs(calls).items():
        yield measured(f"{op}-{weights >> 20}M", variant, cost, errors.get(variant))
