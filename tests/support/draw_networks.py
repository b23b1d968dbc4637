"""Networks of torch's own modules and functions drawn at random, packed, and held to what compile makes of them.

    python -m tests.support.draw_networks --count 1000            # on this machine's instruction set
    BQNN_CPU_ISA=avx2 python -m tests.support.draw_networks --count 1000

Where tests.support.draw_graphs draws what the engine runs, here is what a user writes: torch.export, the lowering, all
passes and quantization lie between. Of each network, in float32 the outputs are those of the packed network in float64,
and in 8 bits every step has the bits of the integer model.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.core.check import MAX_LEVELS, MIN_LEVELS
from bqnn.engine.partition import EnginePart, TorchPart
from tests.support.compiled import compiled, randomized
from tests.support.programs import check_quantized_nodes

MOST_PRODUCTS = 200_000  # of a layer and image
BATCH = 3
ROUNDINGS = 8.0
"""Of float32 that may add up, see check_outputs: some networks that are drawn cancel most of what they add."""

Step = Callable[[nn.Module, list[Tensor]], Tensor]
"""Takes the network, since a closure must not hold a part of it, and the values so far."""


class DrawnNetwork(nn.Module):
    """Steps in a row, each of which reads what the ones before it gave; returns the last values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.outputs: list[int] = [-1]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        return tuple(values[index] for index in self.outputs)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "clamp of one side": lambda x: x.clamp(max=1.5),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


class _Drawing:
    """A network as it grows. Each step runs as it is drawn, on a few images, so that later ones know shapes."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.net = DrawnNetwork()
        pick = self.pick
        if pick.random() < 0.9:
            shape = (pick.choice((1, 2, 3, 5, 8, 16)), pick.randint(3, 14), pick.randint(3, 14))
        else:
            shape = (pick.randint(2, 60),)
        self.values = [torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))]

    def network(self) -> DrawnNetwork:
        images = (self.conv2d,) * 5 + (self.conv_norm_act,) * 4 + (self.pool, self.gate, self.pad, self.residual)
        both = (self.linear, self.norm, self.activation, self.add, self.cat, self.part, self.number, self.constant)
        for _ in range(self.pick.randint(2, 9)):
            self.pick.choice(images + both if self.last.dim() == 4 else both + (self.linear,))()
        if self.pick.random() < 0.7:
            self.tail()
        self.net.outputs = [-1]
        if self.pick.random() < 0.2:
            self.net.outputs.append(self.pick.randrange(1, len(self.values)))
        return self.net

    @property
    def last(self) -> Tensor:
        return self.values[-1]

    @torch.no_grad()
    def step(self, step: Step) -> None:
        self.values.append(step(self.net, self.values))
        self.net.steps.append(step)

    def layer(self, layer: nn.Module) -> None:
        """A module of torch as a step; convert and pack replace what stands in the list."""
        index = len(self.net.layers)
        self.net.layers.append(layer.eval())
        self.step(lambda net, values: net.layers[index](values[-1]))

    def like(self, x: Tensor) -> int:
        """One of the values with the shape of ``x``, the last one where there is no other."""
        same = [index for index, value in enumerate(self.values[:-1]) if value.shape == x.shape]
        return self.pick.choice(same) if same else -1

    # ---- what a step may append ----

    def conv2d(self) -> None:
        pick, channels = self.pick, self.last.shape[1]
        kernel = pick.choice((1, 3, 3, 5, (1, 3), (2, 2), (3, 2)))
        dilation, stride = pick.choice((1, 1, 1, 2, (2, 1))), pick.choice((1, 1, 1, 2, (1, 2), 3))
        padding: Any = pick.choice(("same", "valid", 0, 1, (1, 0), 2))
        if padding == "same":
            stride = 1
        groups = pick.choice([g for g in range(1, channels + 1) if channels % g == 0] + [1, 1, channels])
        outputs = (
            channels if pick.random() < 0.4 and channels % groups == 0 else groups * pick.randint(1, 24 // groups + 1)
        )
        mode = pick.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        bias = pick.random() < 0.6
        layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias, mode)
        try:
            with torch.no_grad():
                y = layer(self.last)
        except RuntimeError:  # the window is larger than the image, or a reflection than it has pixels
            return
        if min(y.shape) > 0 and y[0].numel() * layer.weight[0].numel() <= MOST_PRODUCTS:
            self.layer(layer)

    def conv_norm_act(self) -> None:
        self.conv2d()
        self.norm()
        self.activation()

    def linear(self) -> None:
        if self.last.dim() == 4:
            if self.last[0].numel() > 2000:
                return
            flat: tuple[Step, ...] = (
                lambda _, v: v[-1].flatten(1),
                lambda _, v: v[-1].reshape(v[-1].shape[0], -1),
                lambda _, v: torch.flatten(v[-1], 1),
            )
            self.step(self.pick.choice(flat))
        self.layer(nn.Linear(self.last.shape[1], self.pick.choice((1, 7, 10, 16, 33)), bias=self.pick.random() < 0.7))

    def norm(self) -> None:
        channels, affine = self.last.shape[1], self.pick.random() < 0.8
        self.layer((nn.BatchNorm2d if self.last.dim() == 4 else nn.BatchNorm1d)(channels, affine=affine))

    def activation(self) -> None:
        function = ACTIVATIONS[self.pick.choice(list(ACTIVATIONS))]
        self.step(lambda net, values: function(values[-1]))

    def pool(self) -> None:
        pick, size = self.pick, self.last.shape[2:]
        kernel = pick.choice((2, 3, (1, 2)))
        if min(size) < 3:
            return
        padding, ceil = pick.choice((0, 0, 1)) if kernel != (1, 2) else 0, pick.random() < 0.3
        stride = pick.choice((1, 2, None))
        kinds: tuple[nn.Module, ...] = (
            nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil),
            nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil, count_include_pad=pick.random() < 0.5),
            nn.AdaptiveAvgPool2d(pick.choice((1, 2, (2, 1), (None, 1)))),
            nn.AdaptiveMaxPool2d(1),
        )
        self.layer(pick.choice(kinds))

    def gate(self) -> None:
        """Squeeze and excitation."""
        x, channels, few = len(self.values) - 1, self.last.shape[1], self.pick.randint(1, 6)
        self.step(lambda net, values: values[x].mean((2, 3), keepdim=True))
        self.layer(nn.Conv2d(channels, few, 1))
        self.step(lambda net, values: F.relu(values[-1]))
        self.layer(nn.Conv2d(few, channels, 1))
        gate = self.pick.choice((torch.sigmoid, F.hardsigmoid))
        self.step(lambda net, values: values[x] * gate(values[-1]))

    def residual(self) -> None:
        """A block of two convolutions and what it read, in either order, before or after the activation."""
        x, channels = len(self.values) - 1, self.last.shape[1]
        if self.last[0].numel() * channels * 9 > MOST_PRODUCTS:
            return
        if self.pick.random() < 0.3:
            self.norm()
            self.activation()
        self.layer(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.norm()
        self.activation()
        self.layer(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.norm()
        self.step(
            self.pick.choice((lambda _, v: v[x] + v[-1], lambda _, v: v[-1] + v[x], lambda _, v: F.relu(v[-1] + v[x])))
        )

    def add(self) -> None:
        other = self.like(self.last)
        sums: tuple[Step, ...] = (
            lambda _, v: v[-1] + v[other],
            lambda _, v: v[other] - v[-1],
            lambda _, v: v[-1] * v[other],
            lambda _, v: torch.add(v[-1], v[other], alpha=0.5),
        )
        self.step(self.pick.choice(sums))

    def cat(self) -> None:
        shape = self.last.shape
        fits = [i for i, value in enumerate(self.values) if value.dim() == len(shape) and value.shape[2:] == shape[2:]]
        chosen = [self.pick.choice(fits) for _ in range(self.pick.randint(1, 2))]
        if sum(self.values[i].shape[1] for i in chosen) + shape[1] <= 64:
            self.step(lambda net, values: torch.cat([values[-1], *(values[i] for i in chosen)], 1))

    def pad(self) -> None:
        low, high = self.pick.randint(0, 2), self.pick.randint(0, 2)
        value = self.pick.choice((0.0, 0.5))
        self.step(lambda net, values: F.pad(values[-1], (low, high, high, low), value=value))

    def part(self) -> None:
        channels = self.last.shape[1]
        if channels > 1:
            start, stride = self.pick.randrange(channels), self.pick.choice((1, 1, 2))
            self.step(lambda net, values: values[-1][:, start::stride])

    def number(self) -> None:
        scale, shift = self.pick.uniform(0.5, 2.0), self.pick.uniform(-1.0, 1.0)
        forms: tuple[Step, ...] = (
            lambda _, v: v[-1] * scale + shift,
            lambda _, v: shift - v[-1],
            lambda _, v: v[-1] / scale,
            lambda _, v: -v[-1],
        )
        self.step(self.pick.choice(forms))

    def constant(self) -> None:
        """A number a channel."""
        shape = (self.last.shape[1],) + (1,) * (self.last.dim() - 2)
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(self.pick.randrange(1 << 30)))
        name = f"constant{len(self.values)}"
        self.net.register_buffer(name, numbers)
        forms: tuple[Step, ...] = (
            lambda net, values: values[-1] * getattr(net, name),
            lambda net, values: values[-1] + getattr(net, name),
        )
        self.step(self.pick.choice(forms))

    def tail(self) -> None:
        """A classifier."""
        if self.last.dim() == 4 and self.pick.random() < 0.7:
            means: tuple[Step, ...] = (
                lambda _, v: v[-1].mean((2, 3)),
                lambda _, v: F.adaptive_avg_pool2d(v[-1], 1).flatten(1),
            )
            self.step(self.pick.choice(means))
        self.linear()
        if self.last.dim() == 2 and self.pick.random() < 0.4:
            self.step(self.pick.choice((lambda _, v: v[-1].softmax(1), lambda _, v: F.log_softmax(v[-1], 1))))


def draw_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A packed network of drawn levels, granularities and layers left alone, and images; the same for the same seed."""
    torch.manual_seed(seed)
    drawing = _Drawing(seed)
    net, pick = randomized(drawing.network(), seed), drawing.pick
    layers = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    skip = [name for name in layers if pick.random() < 0.15]
    choices = {
        name: {
            "num_levels": pick.choice((2, 3, 3, 4, pick.randint(MIN_LEVELS, MAX_LEVELS))),
            "granularity": pick.choice(("channel", "tensor")),
        }
        for name in layers
        if name not in skip
    }
    if not choices:
        return net, drawing.values[0]
    return bqnn.pack(bqnn.convert(net, skip=skip, overrides=choices)), drawing.values[0]


def check_network(seed: int) -> list[str]:
    """Raises AssertionError unless the compiled network is right in both precisions; gives the calls left to torch."""
    net, x = draw_network(seed)
    fast = compiled(net, x, roundings=ROUNDINGS)
    integers = bqnn.compile(net, x, precision="int8", calibration=[x])
    values = integers.values((x,))
    for part in integers.parts:
        if isinstance(part, EnginePart):
            check_quantized_nodes(part.graph, tuple(values[name] for name in part.inputs))
    calls = [call for part in fast.parts if isinstance(part, TorchPart) for call in part.calls]
    return [f"{call.op}: {call.reason}" for call in calls]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    chosen = parser.parse_args(arguments)
    wrong, left = 0, Counter[str]()
    for seed in range(chosen.first, chosen.first + chosen.count):
        try:
            left.update(check_network(seed))
        except Exception as error:
            wrong += 1
            print(f"network {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{bqnn.cpu_isa()}: {chosen.count} networks, {wrong} wrong; torch runs")
    for call, count in left.most_common():
        print(f"  {count:>5} {call}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
