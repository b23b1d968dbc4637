"""``python -m bench.networks --net lenet5 --batch 1 64 256``: a whole network, ours against the fastest rivals.

Every variant is checked, then all are timed in turns. Ours is the network at M = 3 with every layer packed, a rival
runs the full-precision one. A row a variant is printed and written to a file, as soon as a batch is done. The networks
have random weights, and the images are random too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import bqnn
from bench.interleaved import Pace, Race
from bench.machine import cpu_name
from bench.network_rivals import CHANNELS_LAST, COMPILED, RIVALS, Call, Rivals
from bench.packed import PRECISIONS
from bench.save import describe
from bench.summary import fastest, times_faster
from bqnn.core.machine import describe_cpu
from bqnn.models import airbench, densenet, lenet5, resnet20, vgg7
from bqnn.packed.base import PackedLayer
from tests.support.packed_products import relative_error

NUM_LEVELS = 3
BUDGET = 4.0
PACE = Pace(pause=0.030, warm=2)
"""The pause is long: threads of ONNX Runtime and OpenVINO spin after a call, and would slow the next library's."""

ENGINE = "bqnn compiled"
OURS = tuple(f"{library} {precision}" for library in ("bqnn", ENGINE) for precision in PRECISIONS)
ALLOWED = {"fp32": 1e-4, "bf16": 0.2}
"""Relative errors of logits in floating point; weights are random, and nothing in such a network forgives rounding."""
ALLOWED_INT8 = 0.5
"""The same for ours; a rival's is reported, as the tool that quantized it decides it."""


def mlp() -> nn.Module:
    """784 - 4096 - 4096 - 10 with ReLU."""
    hidden = (nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(4096, 10))


class Network(NamedTuple):
    """A full-precision network, the shape of one input, and the batches that it is timed at."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: tuple[int, ...] = (1, 64, 256)


NETWORKS = {
    "lenet5": Network("LeNet-5", lenet5, (1, 28, 28)),
    "resnet20": Network("ResNet-20", resnet20, (3, 32, 32)),
    "vgg7": Network("VGG-7", vgg7, (3, 32, 32)),
    "densenet40": Network("DenseNet-40", densenet, (3, 32, 32)),
    "airbench": Network("airbench", airbench, (3, 32, 32), (1, 64)),
    "mlp": Network("MLP 784-4096-4096-10", mlp, (784,)),
    "resnet18": Network("resnet18, 224x224", torchvision.models.resnet18, (3, 224, 224), (1, 16)),
    "mobilenet_v3_small": Network(
        "mobilenet_v3_small, 224x224", torchvision.models.mobilenet_v3_small, (3, 224, 224), (1, 16)
    ),
}


def rivals_of(net: str, compiled: bool = True) -> list[str]:
    """The names of what can run the full-precision network."""
    is_image = len(NETWORKS[net].shape) == 3
    return [name for name in RIVALS if (is_image or name not in CHANNELS_LAST) and (compiled or name not in COMPILED)]


def group_name(net: str, batch: int) -> str:
    return f"network {net}, batch {batch}"


def images(net: str, batch: int, seed: int) -> Tensor:
    """Random inputs, float32: coarse patterns and noise, since images of noise alone are all the same to a network."""
    shape = NETWORKS[net].shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *shape, generator=generator)
    if len(shape) == 1:
        return noise
    coarse = torch.randn(batch, shape[0], 4, 4, generator=generator)
    return F.interpolate(coarse, shape[1:], mode="bilinear") + 0.5 * noise


@lru_cache(maxsize=1)
def calibration(net: str) -> list[Tensor]:
    """A few batches, for BatchNorm and for what quantizes; other images than those that are timed."""
    return [images(net, 16, seed) for seed in range(1, 5)]


@lru_cache(maxsize=1)
def fpnn(net: str) -> nn.Module:
    torch.manual_seed(0)
    return _normalized(NETWORKS[net].make(), net)


@lru_cache(maxsize=1)
def quantized(net: str) -> nn.Module:
    return _normalized(bqnn.convert(fpnn(net), NUM_LEVELS), net)


@lru_cache(maxsize=1)
def rivals(net: str) -> Rivals:
    return Rivals(fpnn(net), calibration(net))


def forget() -> None:
    """Lets go of the networks and of what was made of them."""
    for cached in (calibration, fpnn, quantized, rivals):
        cached.cache_clear()


def _normalized(net: nn.Module, name: str) -> nn.Module:
    """``net`` in evaluation mode, with the statistics that BatchNorm finds in one batch."""
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        net(calibration(name)[0])
    return net.eval()


def _decoded(net: str) -> nn.Module:
    """The packed network as an ordinary one, in float64."""
    packed = bqnn.pack(quantized(net))
    plain = copy.deepcopy(fpnn(net)).double()
    plain.load_state_dict(packed.state_dict(), strict=False)  # biases and BatchNorm; there are no codes in it
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if isinstance(layer, PackedLayer):
                plain.get_submodule(name).weight.copy_(layer.weight)
    return plain


def compiled(net: str, x: Tensor, precision: str) -> nn.Module:
    """The network, packed, for the engine."""
    if not hasattr(bqnn, "compile"):
        pytest.skip("this bqnn has no compile")
    batches = calibration(net) if precision == "int8" else None
    return bqnn.compile(bqnn.pack(quantized(net)), x, precision=precision, calibration=batches)


class NetworkGroup:
    """One network at one batch."""

    pace = PACE

    def __init__(self, net: str, batch: int, budget: float = BUDGET) -> None:
        self.name, self.budget = group_name(net, batch), budget
        self._net, self._x = net, images(net, batch, 0)
        torch._dynamo.reset()

    def call(self, variant: str) -> Call:
        library, precision = variant.rsplit(" ", 1)
        if library == ENGINE:
            fast = compiled(self._net, self._x, precision)
            return lambda: fast(self._x)
        if library == "bqnn":
            packed = bqnn.pack(quantized(self._net), precision=precision)
            return lambda: packed(self._x)
        return rivals(self._net).call(variant, self._x)

    def check(self, variant: str, output: Tensor) -> dict[str, Any]:
        """The relative error of the logits, and the share of images whose largest logit is the right one."""
        expected = self._expected_of_packed if variant in OURS else self._expected_of_fpnn
        distance = relative_error(output, expected)
        precision = next(name for name in PRECISIONS if name in variant.split())
        allowed = ALLOWED.get(precision, ALLOWED_INT8 if variant in OURS else float("inf"))
        assert distance <= allowed, f"{variant}: relative error {distance:.2g}"
        agree = (output.argmax(1) == expected.argmax(1)).double().mean()
        return {"distance": distance, "top1": float(agree)}

    @cached_property
    def _expected_of_fpnn(self) -> Tensor:
        return self._expect(copy.deepcopy(fpnn(self._net)).double())

    @cached_property
    def _expected_of_packed(self) -> Tensor:
        return self._expect(_decoded(self._net))

    @torch.no_grad()
    def _expect(self, net: nn.Module) -> Tensor:
        """In parts, since activations in float64 are large."""
        return torch.cat([net(part.double()) for part in self._x.split(16)])


def _table(race: Race) -> Iterator[str]:
    yield f"{race.name:<40}{'ms':>10}{'error':>10}{'top-1':>8}"
    medians = {variant: statistics.median(seconds) for variant, seconds in race.seconds.items()}
    for variant, seconds in medians.items():
        info = race.infos[variant]
        yield f"  {variant:<38}{1e3 * seconds:>10.4g}{info['distance']:>10.2g}{info['top1']:>8.0%}"
    for variant, failure in race.failures.items():
        yield f"  {variant:<38}not timed, {type(failure).__name__}: {str(failure).strip().splitlines()[0]}"
    ratio = times_faster(medians, OURS, RIVALS)
    if ratio is not None:
        yield f"  {fastest(medians, RIVALS)} takes {ratio:.2f} times as long as {fastest(medians, OURS)}"


def _rows(race: Race, net: str, batch: int) -> Iterator[dict[str, Any]]:
    group = describe(race, "networks")
    rows = group.pop("rows")
    for variant, row in rows.items():
        yield {"network": net, "batch": batch, "variant": variant, **row, "machine": cpu_name(describe_cpu()), **group}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--batch", nargs="+", type=int, help="default: the batches of `make bench`")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--variants", nargs="+", choices=[*RIVALS, *OURS], help="default: all that the network has")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/networks.jsonl"), help="rows of JSON are added to it")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 2:
        parser.error("--rounds must be 2 or more, since quartiles are kept")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    for net in chosen.net:
        variants = chosen.variants or [*rivals_of(net, chosen.compiled), *OURS]
        for batch in chosen.batch or NETWORKS[net].batches:
            race = Race(NetworkGroup(net, batch, 0.0), variants, timed=True, least_rounds=chosen.rounds)
            print("\n".join(_table(race)), flush=True)
            with chosen.out.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in _rows(race, net, batch))


if __name__ == "__main__":
    main()
