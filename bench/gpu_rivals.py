"""Rivals on a GPU that are packages: linear layers with affine integer weights, for bfloat16 activations.

Each makes layers and the dense weight that they stand for: integers and scales drawn at random, so that every one of
its weights is exact. A package that is not installed is :class:`Absent`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GROUP = 128
"""The number of weights that share a scale and a zero: the default of both packages."""


class Absent(RuntimeError):
    """A package is not installed, or not as it is known here; the message says so."""


def find(package: str) -> Any:
    """The module of this name; raises Absent where it can not be imported."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # a package that is there may fail to load beside this torch, in many ways
        raise Absent(f"{package} can not be imported ({type(error).__name__}: {error})") from error


def _draw(size: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Integers uint8 [size, size], scales bfloat16 [size, size / GROUP, 1], the dense weight: (q - middle) scale."""
    generator = torch.Generator(device).manual_seed(bits)
    q = torch.randint(2**bits, (size, size), generator=generator, device=device, dtype=torch.uint8)
    q[:, 0::GROUP], q[:, 1::GROUP] = 0, 2**bits - 1  # a package may find its scale again from the ends
    scale = torch.rand(size, size // GROUP, 1, generator=generator, device=device).add_(0.5).bfloat16()
    dense = (q.view(size, -1, GROUP).float() - 2.0 ** (bits - 1)).mul_(scale.float())
    return q, scale, dense.view(size, size)


def gemlite_2bit(size: int, copies: int, device: torch.device) -> tuple[list[nn.Module], Tensor]:
    """gemlite (github.com/dropbox/gemlite, 0.6): GemLiteLinear of 2 bits, w = (q - zero) scale for each group."""
    gemlite = find("gemlite")
    q, scale, dense = _draw(size, 2, device)
    layers = []
    for _ in range(copies):
        dtype = gemlite.DType.BF16
        layer = gemlite.GemLiteLinear(2, GROUP, size, size, input_dtype=dtype, output_dtype=dtype)
        layer.pack(q, scale, torch.full_like(scale, 2.0))
        layers.append(layer)
    return layers, dense


def torchao_int4(size: int, copies: int, device: torch.device) -> tuple[list[nn.Module], Tensor]:
    """torchao (0.18): Int4WeightOnlyConfig in the packing of PyTorch's own product, its smallest weight of one."""
    quantization = find("torchao.quantization")
    _, _, dense = _draw(size, 4, device)
    config = quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    layers = []
    for _ in range(copies):
        layer = nn.Linear(size, size, bias=False, device="meta")
        layer.weight = nn.Parameter(dense.bfloat16(), requires_grad=False)
        net = nn.Sequential(layer)
        quantization.quantize_(net, config)
        layers.append(net)
    return layers, dense


class Rival(NamedTuple):
    """A package, bits of a weight, and what makes so many square layers of a size and their dense weight."""

    package: str
    bits: int
    make: Callable[[int, int, torch.device], tuple[list[nn.Module], Tensor]]


RIVALS = {
    "gemlite 2 bits": Rival("gemlite", 2, gemlite_2bit),
    "torchao 4 bits": Rival("torchao.quantization", 4, torchao_int4),
}
