"""The posterior of a packed weight: a table of the chances that a draw changes one code into another.

Where means have gathered at their levels and variances are alike, the chance of each code depends on the code of the
mean alone. So one table [M, M] stands for the means and variances of a whole layer, and no weight takes a bit more.
Elsewhere it has the right share of changes for each code, and says nothing of which weights they fall on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.core.check import check_data, check_device, check_tensor
from bqnn.core.philox import WORDS, Noise
from bqnn.core.quantizer import Posterior, cdf, column

ROW_TOLERANCE = 1e-5  # of the sum of a row: sixteen chances in float32 are a tenth of that off
_BLOCK = 1 << 18  # weights whose float64 numbers are in memory at a time


@torch.no_grad()
def chances_of(posterior: Posterior, codes: Tensor) -> Tensor:
    """Row m is the mean, over the weights with code m, of the chances pi_k = Phi((t_{k+1} - mu) / sigma) -
    Phi((t_k - mu) / sigma) that a draw from N(mu, sigma^2) has code k.

    Args:
        posterior: its ``log_sigma2`` is given, and at least one of its weights.
        codes: uint8 in the weight's shape, those of the means.

    Returns:
        float32 [M, M], of sums in float64 on the CPU, on the device of ``codes``; the row of the identity for a code
        that no weight has.
    """
    num_levels = posterior.levels.shape[1]
    counts = torch.zeros(num_levels, dtype=torch.float64)
    above = torch.zeros(num_levels + 1, num_levels, dtype=torch.float64)
    """[j, m]: the sum over the weights with code m of the chance that a draw has code j or a higher one."""
    rows = max(1, _BLOCK // codes[0].numel())
    for first in range(0, len(codes), rows):
        channels = slice(first, first + rows)
        weight, log_sigma2, _, thresholds = (
            None if tensor is None else tensor.double().cpu() for tensor in posterior.part(channels)
        )
        assert weight is not None and log_sigma2 is not None and thresholds is not None
        index, inv_sigma = codes[channels].flatten().long().cpu(), (-0.5 * log_sigma2).exp()
        counts += index.bincount(minlength=num_levels)
        for j in range(1, num_levels):
            higher = cdf((weight - column(thresholds, j - 1, weight)) * inv_sigma)
            above[j] += index.bincount(higher.flatten(), minlength=num_levels)
    above[0] = counts
    chances = (above[:-1] - above[1:]).clamp_(min=0.0).t() / counts[:, None]
    return torch.where(counts[:, None] > 0, chances, torch.eye(num_levels)).float().to(codes.device)


def draw_codes(codes: Tensor, chances: Tensor, noise: Noise) -> Tensor:
    """Codes drawn for ``codes``: of each the row of ``chances`` says how probable which is.

    Element i takes word i of the noise. It gets code k where the word lies between the sums of the chances before k and
    up to k, as integers of 32 bits: integers are compared, so that a seed gives the same codes on every device.

    Args:
        codes: uint8, below M.
        chances: float32 [M, M], as :func:`check_chances` wants it.
        noise: with a seed.

    Returns:
        uint8 in the shape of ``codes``, contiguous.
    """
    flat, bounds = codes.flatten(), _bounds(chances).to(codes.device)
    drawn = torch.zeros_like(flat)
    for block, words in noise.words(flat.numel(), flat.device):
        rows = flat[block].int()
        for bound in bounds:
            drawn[block] += words >= bound[rows]
    return drawn.view(codes.shape)


def check_chances(chances: Tensor, num_levels: int, codes: Tensor) -> None:
    """Raises TypeError or ValueError unless ``chances`` is a table for ``codes`` of ``num_levels`` levels."""
    check_tensor("chances", chances)
    if chances.dtype != torch.float32:
        raise TypeError(f"chances must be torch.float32, got {chances.dtype}")
    if chances.shape != (num_levels, num_levels):
        raise ValueError(f"chances must have the shape {[num_levels] * 2}, got {list(chances.shape)}")
    check_device("chances", chances, codes)
    check_data("chances", chances)
    sums = chances.double().sum(1)
    in_range = (chances >= 0.0).all() and (chances <= 1.0).all()  # NaN is in no range
    if not in_range or ((sums - 1.0).abs() > ROW_TOLERANCE).any():
        raise ValueError(f"chances must be from 0 to 1, with rows that sum to 1, got {chances.tolist()}")


def _bounds(chances: Tensor) -> Tensor:
    """int64 [M - 1, M]: at [k, m] how many of the words give a weight with code m the code k or a lower one.

    A share of exactly 1 is all words, so that a code whose chance is 0, and the last one too, is never drawn.
    """
    sums = chances.double().cpu().cumsum(1)
    return (sums[:, :-1] / sums[:, -1:] * WORDS).round().long().t().contiguous()
