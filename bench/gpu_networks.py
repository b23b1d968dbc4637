"""Whole networks on a GPU: a training step, and inference from packed layers, against the full-precision network."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bench.gpu_rows import Row, measured
from bench.gpu_timing import Call, Meter
from bqnn.models import build

NUM_LEVELS, SEED, CLASSES = 3, 20261, 10
DATASET_SIZE = 60_000
ESTIMATORS = ("sample", "moment")
FPNN = "FPNN"
ENGINE = "engine bf16"


class Network(NamedTuple):
    """A network with ten classes, and the inputs that it is trained with and asked."""

    make: Callable[[], nn.Module]
    image: tuple[int, int, int]
    training: int
    """Images of a step."""
    inference: tuple[int, ...]
    """Images of a call, each of these."""


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def _built(name: str) -> Callable[[], nn.Module]:
    return lambda: build(name)


NETWORKS = {
    "lenet5": Network(_built("lenet5"), (1, 28, 28), 128, (1, 256)),
    "resnet20": Network(_built("resnet20"), (3, 32, 32), 128, (1, 256)),
    "vgg7": Network(_built("vgg7"), (3, 32, 32), 128, (1, 256)),
    "densenet40": Network(_built("densenet"), (3, 32, 32), 64, (1, 256)),
    "resnet18": Network(_resnet18, (3, 224, 224), 64, (1, 64)),
}


def training_rows(name: str, network: Network, ours: str, meter: Meter, references: bool) -> Iterator[Row]:
    """A training step (forward, loss with the divergence, backward), in bfloat16 autocast.

    ``references``: also with every op on the reference, plain PyTorch.
    """
    x = torch.randn(network.training, *network.image, device=meter.device)
    target = torch.randint(CLASSES, (len(x),), device=meter.device)
    calls: dict[str, list[Call]] = {FPNN: [_step(network, None, x, target)]}
    for estimator in ESTIMATORS:
        for backend in (ours, "reference") if references else (ours,):
            calls[f"{backend} {estimator}"] = [_forced(_step(network, estimator, x, target), backend)]
    for variant, cost in meter.costs(calls).items():
        yield measured(f"step-{name}-B{len(x)}", variant, cost)


def _step(network: Network, estimator: str | None, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    torch.manual_seed(SEED)
    net = network.make()
    if estimator is not None:
        net = bqnn.convert(net, NUM_LEVELS, estimator=estimator)
    net = net.to(x.device).train()
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def run() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            output = net(x).float()
        if estimator is None:
            loss = F.cross_entropy(output, target)
        else:
            loss = bqnn.elbo(output, target, net, DATASET_SIZE).loss
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return run


def _forced(call: Call, backend: str) -> Call:
    def run() -> object:
        with patch.dict(os.environ, {"BQNN_BACKEND": backend}):
            return call()

    return run


@torch.inference_mode()
def inference_rows(name: str, network: Network, images: int, meter: Meter) -> Iterator[Row]:
    """Logits for so many images: the full-precision network in bfloat16, channels-last and compiled, and the packed one
    in both precisions, and compiled by the engine, for bfloat16 images."""
    torch.manual_seed(SEED)
    net = network.make().eval()
    quantized = bqnn.convert(net, NUM_LEVELS).eval()
    x = torch.randn(images, *network.image, device=meter.device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    dense = copy.deepcopy(net).to(meter.device, torch.bfloat16, memory_format=torch.channels_last)
    calls = {FPNN: [lambda: dense(x)], f"{FPNN} compiled": [_bound(meter.compiled(dense), x)]}
    weight_bytes = {FPNN: sum(parameter.nbytes for parameter in dense.parameters())}
    errors = {}
    for precision in ("bf16", "int8"):
        packed = bqnn.pack(quantized, precision=precision)
        variant, exact = f"packed {precision}", bqnn.dequantize(packed).to(meter.device)
        packed = packed.to(meter.device, torch.bfloat16)  # but for levels, which stay as they are
        errors[variant] = meter.distance([packed(x).float()], [exact(x.float())])
        calls[variant] = [_bound(packed, x)]
        weight_bytes[variant] = sum(buffer.nbytes for buffer in packed.buffers())
        if precision == "bf16":
            fast = bqnn.compile(packed, x, precision=precision)
            errors[ENGINE] = meter.distance([fast(x).float()], [exact(x.float())])
            calls[ENGINE], weight_bytes[ENGINE] = [_bound(fast, x)], weight_bytes[variant]
    for variant, cost in meter.costs(calls).items():
        case = f"inference-{name}-B{images}"
        yield measured(case, variant, cost, errors.get(variant), weight_bytes.get(variant))


def _bound(function: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return lambda: function(x)
