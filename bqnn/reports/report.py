"""report: what became of the weights and codebooks of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.left import LeftModule, left_modules, table
from bqnn.core import codebook
from bqnn.core.codes import packed_width, unpack_codes
from bqnn.core.precision import wide
from bqnn.core.quantizer import look_up
from bqnn.packed.weight import PackedWeight

NEAR = 0.1  # "near a level": within this share of the level's gap


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer; the last four are None for a packed layer, which has no means any more."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the weight
    num_levels: int
    levels: list[list[float]]  # a row for each codebook
    occupancy: list[int]  # weights with each code
    dead_levels: int  # levels without a weight, over all codebooks
    bits: float  # a weight, as packed
    nbytes: int  # packed: codes, levels and bias
    near_share: float | None = None  # of the means: within a tenth of the gap of their level
    quantization_loss: float | None = None  # sum (mu - Q(mu))^2 / sum mu^2
    squared_error: float | None = None  # sum (mu - Q(mu))^2
    squared_norm: float | None = None  # sum mu^2

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Report:
    """Every quantized layer of a network, and every module with parameters at full precision; printed as tables."""

    layers: list[LayerReport]
    left: list[LeftModule] = field(default_factory=list)

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Packed bytes of all quantized layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits(self) -> float:
        """Bits a weight as packed, over all quantized layers; codebooks are not counted."""
        return sum(layer.bits * layer.weights for layer in self.layers) / max(self.weights, 1)

    @property
    def near_share(self) -> float | None:
        """The share of all means within a tenth of the gap of their level; None without Bayes layers."""
        known = [layer for layer in self.layers if layer.near_share is not None]
        near = sum(layer.near_share * layer.weights for layer in known if layer.near_share is not None)
        return near / sum(layer.weights for layer in known) if known else None

    @property
    def quantization_loss(self) -> float | None:
        """sum (mu - Q(mu))^2 / sum mu^2 over all weights, 0 where all are 0; None without Bayes layers."""
        error = [layer.squared_error for layer in self.layers if layer.squared_error is not None]
        norm = [layer.squared_norm for layer in self.layers if layer.squared_norm is not None]
        if not error:
            return None
        return sum(error) / sum(norm) if any(norm) else 0.0

    def __str__(self) -> str:
        width = max(20, *(len(layer.name) + 2 for layer in self.layers))
        head = f"{'layer':<{width}}{'M':>3}{'weights':>10}{'bits':>6}{'bytes':>9}{'near':>8}{'loss':>9}{'dead':>6}"
        rows = [head + "  levels (share of weights)"]
        for layer in self.layers:
            near = "-" if layer.near_share is None else f"{100 * layer.near_share:.1f} %"
            loss = "-" if layer.quantization_loss is None else f"{layer.quantization_loss:.5f}"
            rows.append(
                f"{layer.name:<{width}}{layer.num_levels:>3}{layer.weights:>10}{layer.bits:>6.2f}{layer.nbytes:>9}"
                f"{near:>8}{loss:>9}{layer.dead_levels:>6}  {_levels(layer)}"
            )
        if self.left:
            rows += ["", table(self.left)]
        return "\n".join(rows)


def _levels(layer: LayerReport) -> str:
    if len(layer.levels) > 1:
        return f"{len(layer.levels)} codebooks"
    shares = [count / max(layer.weights, 1) for count in layer.occupancy]
    pairs = zip(layer.levels[0], shares, strict=True)
    return "  ".join(f"{level:+.4f} ({100 * share:.0f} %)" for level, share in pairs)


@torch.no_grad()
def report(net: nn.Module) -> Report:
    """Level values, occupancy, dead levels, nearness, quantization loss, bits and bytes of every quantized layer;
    and of what is at full precision the names, and why it is.

    Raises:
        ValueError: the network has no Bayes and no packed layer, or a parameter is not finite.
    """
    found = [(name, m) for name, m in net.named_modules() if isinstance(m, (BayesLayer, PackedWeight))]
    if not found:
        raise ValueError("net has no Bayes layer and no packed layer to report on")
    layers = [_bayes(name, m) if isinstance(m, BayesLayer) else _packed(name, m) for name, m in found]
    return Report(layers, left_modules(net))


def _occupancy(codes: Tensor, levels: Tensor) -> tuple[list[int], int]:
    """Weights with each code, and the number of levels that no weight has."""
    rows = codes.flatten(1) if levels.shape[0] > 1 else codes.reshape(1, -1)
    counts = torch.stack([(rows == m).sum(1) for m in range(levels.shape[1])], dim=1)
    return counts.sum(0).tolist(), int((counts == 0).sum())


def _bayes(name: str, layer: BayesLayer) -> LayerReport:
    codes, levels, weight = layer.codes(), layer._codebook()[0], wide(layer.mean)
    occupancy, dead = _occupancy(codes, levels)
    distance = (weight - look_up(levels, codes)).abs()
    near = (distance <= NEAR * look_up(codebook.gaps(levels), codes)).double().mean().item()
    error, norm = distance.double().square().sum().item(), weight.double().square().sum().item()
    # Of means that are all 0 nothing is left to lose but rounding, which is to be seen against the codebook's own size.
    smallest = (codebook.MIN_GAP * levels.double()).square().mean().item() * weight.numel()
    channels, columns = weight.shape[0], weight[0].numel()
    code_bytes = channels * packed_width(columns, layer.num_levels)
    others = 4 * levels.numel() + (0 if layer.bias is None else layer.bias.nbytes)
    return LayerReport(
        name,
        type(layer).__name__,
        tuple(weight.shape),
        layer.num_levels,
        levels.tolist(),
        occupancy,
        dead,
        8.0 * code_bytes / weight.numel(),
        code_bytes + others,
        near,
        error / max(norm, smallest),
        error,
        norm,
    )


def _packed(name: str, layer: PackedWeight) -> LayerReport:
    columns = math.prod(layer.shape[1:])
    codes = unpack_codes(layer.codes, layer.num_levels, columns).view(layer.shape)
    occupancy, dead = _occupancy(codes, layer.levels)
    return LayerReport(
        name,
        type(layer).__name__,
        tuple(codes.shape),
        layer.num_levels,
        layer.levels.tolist(),
        occupancy,
        dead,
        8.0 * layer.codes.numel() / codes.numel(),
        layer.nbytes,
    )
