"""What the ops compute, written in another way: explicit cells, NumPy integers, Python floats, autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def philox_words(seed: int, call: np.ndarray) -> np.ndarray:
    """Philox4x32-10 in NumPy's wrapping uint64: calls [n] to words [n, 4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [call & low, call >> np.uint64(32), np.zeros_like(call), np.zeros_like(call)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, axis=1)


def noise(seed: int, offset: int, shape: Sequence[int]) -> Tensor:
    """The N(0, 1) number of every element, float64: Box-Muller of the upper 24 bits of its call's words."""
    total = math.prod(shape)
    words = philox_words(seed, np.arange(-(-total // 4), dtype=np.uint64) + np.uint64(offset))
    bits = (words >> np.uint64(8)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((bits[:, 0::2] + 1.0) / 2**24))
    angle = 2.0 * np.pi * bits[:, 1::2] / 2**24
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)  # [calls, 2 pairs, 2]
    return torch.from_numpy(normals.reshape(-1)[:total].reshape(tuple(shape)))


def codes_of(weight: Tensor, thresholds: Tensor) -> Tensor:
    """int64, in the weight's shape: by bisection, w in (t_code, t_code+1]."""
    rows = weight.detach().flatten(1).contiguous()
    cuts = thresholds.detach().expand(rows.shape[0], -1).contiguous()
    return torch.searchsorted(cuts, rows, right=False).view(weight.shape)


def one_hot_cells(codes: Tensor, levels: Tensor) -> Tensor:
    """1 in the cell of each weight: [N, K, M] in the dtype of ``levels``."""
    return F.one_hot(codes.flatten(1), levels.shape[1]).to(levels.dtype)


def quantize(weight: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Q(w), differentiable in the levels and straight-through in the weight."""
    cells = one_hot_cells(codes_of(weight, thresholds), levels)
    looked_up = (cells * levels.unsqueeze(1)).sum(-1).view(weight.shape)
    return looked_up + (weight - weight.detach())


def cell_moments(weight: Tensor, log_sigma2: Tensor, levels: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """E[Q] and Var[Q] by sums over the M cells with their probabilities pi_m; differentiable in all arguments."""
    mean, sigma = weight.flatten(1).unsqueeze(-1), log_sigma2.flatten(1).unsqueeze(-1).exp().sqrt()
    below = torch.special.ndtr((thresholds.unsqueeze(1) - mean) / sigma)  # [N, K, M - 1]
    pi = torch.diff(F.pad(F.pad(below, (1, 0)), (0, 1), value=1.0), dim=-1)
    levels = levels.unsqueeze(1)
    expectation = (pi * levels).sum(-1, keepdim=True)
    variance = (pi * (levels - expectation) ** 2).sum(-1)
    return expectation.view(weight.shape), variance.view(weight.shape)


def weight_moments(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, thresholds: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """E and V of a moment op's mode."""
    if mode == "categorical":
        return cell_moments(weight, log_sigma2, levels, thresholds)
    return (weight if mode == "gaussian" else quantize(weight, levels, thresholds)), log_sigma2.exp()


def log_uniform_kl(distance: float, log_sigma2: float) -> float:
    """F of Molchanov et al. 2017, eq. 14, with log alpha in [-10, 10]."""
    log_alpha = log_sigma2 - math.log(max(distance * distance, 1e-30))
    log_alpha = min(10.0, max(-10.0, log_alpha))
    gate = 1.0 / (1.0 + math.exp(-(1.87320 + 1.48695 * log_alpha)))
    return 0.63576 * (1.0 - gate) + 0.5 * math.log(1.0 + math.exp(-log_alpha))


def spike_slab_kl(weight: Tensor, log_sigma2: Tensor, levels: Tensor, tau: Tensor) -> float:
    """The divergence, weight by weight, in Python floats."""
    total = 0.0
    groups = levels.shape[0]
    for n, (means, variances) in enumerate(zip(weight.flatten(1).tolist(), log_sigma2.flatten(1).tolist())):
        codebook, widths = levels[n % groups].tolist(), tau[n % groups].tolist()
        for mean, variance in zip(means, variances):
            windows = [math.exp(-((mean - c) ** 2) / (2.0 * width**2)) for c, width in zip(codebook, widths)]
            scale = max(1.0, sum(windows))
            spikes = sum(w / scale * log_uniform_kl(mean - c, variance) for w, c in zip(windows, codebook))
            centre = 0.0 if 0.0 in codebook else min(codebook, key=lambda c: abs(mean - c))
            total += spikes + (1.0 - sum(windows) / scale) * log_uniform_kl(mean - centre, variance)
    return total


def mixture_components(
    levels: Sequence[float], slab_sigma2: float, spike_width: float, slab_share: float
) -> list[tuple[float, float, float]]:
    """Share, mean and variance of each component of the mixture of a codebook; the last one is the slab."""
    deviation = spike_width * min(b - a for a, b in pairwise(levels))
    spikes = [((1.0 - slab_share) / len(levels), level, deviation**2) for level in levels]
    return [*spikes, (slab_share, 0.0, slab_sigma2)]


def mixture_kl(
    weight: Tensor, log_sigma2: Tensor, levels: Tensor, slab_sigma2: float, spike_width: float, slab_share: float
) -> float:
    """The bound of the divergence, weight by weight, in Python floats."""
    total = 0.0
    groups = levels.shape[0]
    for n, (means, variances) in enumerate(zip(weight.flatten(1).tolist(), log_sigma2.flatten(1).tolist())):
        components = mixture_components(levels[n % groups].tolist(), slab_sigma2, spike_width, slab_share)
        for mean, variance in zip(means, variances):
            ratios = [((mean - c) ** 2 / v, math.exp(variance) / v) for _, c, v in components]
            divergences = [0.5 * (square + ratio - math.log(ratio) - 1.0) for square, ratio in ratios]
            least = min(divergences)
            pairs = zip(components, divergences)
            total += least - math.log(sum(share * math.exp(least - each) for (share, _, _), each in pairs))
    return total


def int8_codebook(levels: Sequence[float], limit: int) -> tuple[list[int], np.float32]:
    """The integers and the scale of one codebook that "int8" states: every candidate, in Python floats."""
    largest = max(abs(level) for level in levels)
    best: tuple[float, list[int], np.float32] = (math.inf, [], np.float32(0))
    for q in range(limit, (limit + 1) // 2 - 1, -1):
        scale = np.float32(largest / q)
        integers = [round(level / float(scale)) for level in levels]
        error = max(abs(level - n * float(scale)) for level, n in zip(levels, integers))
        if error < best[0]:
            best = (error, integers, scale)
    return best[1], best[2]


def int8_product(
    x: np.ndarray, integers: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, dtype: type = np.float32
) -> np.ndarray:
    """What "int8" states for finite rows x [B, K], integers [N, K], scale [1 or N], bias [N]: sums in int64, every
    other operation rounded to ``dtype``."""
    largest = np.abs(x).max(1, keepdims=True)
    factor = np.where(largest < 2.0**-64, dtype(2.0**64), dtype(1))
    with np.errstate(all="ignore"):
        q = np.rint((x * factor) * (dtype(127) / (largest * factor)))
    total = np.where(largest > 0, q, 0).astype(np.int64) @ integers.astype(np.int64).T
    y = (total.astype(dtype) * scale.astype(dtype)) * (largest / dtype(127))
    assert y.dtype == dtype
    return y if bias is None else y + bias.astype(dtype)
