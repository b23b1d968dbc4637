"""What travels together: NamedTuples that launchers take, and most of which kernels take as one argument.

Triton passes the fields of a tuple one by one. Whether a field is None or 1, or a multiple of 16, is known when the
kernel is compiled, just as of an argument by itself, so that ``posterior.log_sigma2 is not None`` costs nothing there.
But numbers in a tuple are always looked at in this way, whatever ``do_not_specialize`` says, and get 32 or 64 bits by
their value. A kernel would be compiled again for one seed in sixteen, so seed and offset reach it by themselves, and
are a :class:`Noise` from its first line on. And no argument is a tuple of tuples: inside a loop and after it Triton 3.6
takes what is 1 in the inner one for None.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bqnn.core.quantizer import Posterior


class Noise(NamedTuple):
    """:class:`bqnn.core.philox.Noise` with the seed as a number, 0 where there is no noise, or as a tensor in the GPU's
    memory."""

    seed: int
    offset: int


class PackedWeight(NamedTuple):
    """A weight of codes; see bqnn.ops.backends.gpu_layout."""

    words: Tensor
    """int32 [N, W], contiguous."""
    block_words: int
    """Words of a block."""
    num_levels: int
    """M."""
    levels: Tensor
    """float32 [1 or N, M]; for "int8" integers, int8 [1 or N, M or more]."""
    scale: Tensor | None
    """For "int8" what the integers are multiplied by, float32 [1 or N]."""


class Gradients(NamedTuple):
    """What a kernel writes of a posterior's gradients."""

    weight: Tensor
    """The weight's shape and dtype."""
    log_sigma2: Tensor | None
    """Likewise; None where the weight is deterministic."""
    sums: Tensor
    """float32 [blocks, N, S]: what each block adds to S sums of each row, which make the codebook's gradients."""


def gradients_of(posterior: Posterior, blocks: int, sums: int) -> Gradients:
    """Memory for the gradients of a posterior, whose sums come in so many blocks and are so many for each row."""
    weight, log_sigma2, _, _ = posterior
    by_log_sigma2 = None if log_sigma2 is None else torch.empty_like(weight)
    parts = torch.empty((blocks, weight.shape[0], sums), device=weight.device)
    return Gradients(torch.empty_like(weight), by_log_sigma2, parts)


def as_matrix(posterior: Posterior) -> Posterior:
    """The posterior of a weight [N, ...] as one of a matrix [N, K], in the same memory."""
    weight, log_sigma2, levels, thresholds = posterior
    return Posterior(weight.flatten(1), None if log_sigma2 is None else log_sigma2.flatten(1), levels, thresholds)
