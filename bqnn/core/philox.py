"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain PyTorch.

The key is the seed and the counter is the call number, so a number depends on the seed and on the *logical* index of
the element it is for: element i of a tensor is word i % 4 of call offset + i // 4. A kernel that follows the same rule
gives the same words whatever its threads, tiles and blocks are, and a backward pass makes the noise again from
(seed, offset) instead of storing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORDS = 1 << 32
"""How many words there are: a word is from 0 to one less."""
LOW_32 = WORDS - 1
CALLS_A_BLOCK = 1 << 14  # four int64 words of a block stay in a core's cache through the ten rounds
CALLS_A_GPU_BLOCK = 1 << 18  # words of so many calls, and what is made of them, take about 100 MB
_is_capturable: ContextVar[bool] = ContextVar("_is_capturable", default=False)


class Noise(NamedTuple):
    """Where a tensor's noise begins in the stream of random numbers."""

    seed: Tensor | None
    """int64 scalar tensor, the key; None where there is no noise. On the CPU, or on the GPU of the tensors, so that a
    CUDA graph does not keep its value."""
    offset: int
    """The call that holds the number of element 0."""

    def normal(self, like: Tensor) -> Tensor:
        """:func:`normal` in the shape and dtype of ``like``, and on its device."""
        assert self.seed is not None
        return normal(self.seed, self.offset, like.shape, like.device, like.dtype)

    def words(self, count: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The words of elements 0 to ``count`` in blocks: the elements of each, and their words, int64 [elements]."""
        assert self.seed is not None
        step = CALLS_A_BLOCK if device.type == "cpu" else CALLS_A_GPU_BLOCK
        for first, words in _blocks(self.seed, self.offset, -(-count // 4), step, device):
            elements = slice(4 * first, min(4 * (first + words.shape[1]), count))
            yield elements, words.t().flatten()[: elements.stop - elements.start]


def philox4x32(
    counter: Sequence[Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each call.

    Args:
        counter: four int64 tensors of one shape, values in [0, 2**32), least significant word first.
        key: two 32-bit words, least significant first; numbers, or int64 scalar tensors on the counter's device.

    Returns:
        four int64 tensors of the counter's shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A 32 x 32 bit product wraps in int64, but its bits are right. Its low half is c1 or c3 of the next round,
        # where only an exclusive or follows: the high half may stay on it until that is masked.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW_32)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW_32)
        c1, c3 = p1, p0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return c0, c1 & LOW_32, c2, c3 & LOW_32


def random_words(seed: int | Tensor, offset: int, first_call: int, calls: int, device: torch.device) -> Tensor:
    """The words of ``calls`` consecutive calls from ``offset + first_call``: int64 [4, calls], in [0, 2**32)."""
    call = torch.arange(calls, device=device) + (offset + first_call)
    zero = torch.zeros_like(call)
    counter = (call & LOW_32, (call >> 32) & LOW_32, zero, zero)
    return torch.stack(philox4x32(counter, (seed & LOW_32, (seed >> 32) & LOW_32)))


def _blocks(seed: Tensor, offset: int, calls: int, step: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The words of ``calls`` calls, ``step`` at a time: the first call of each block, and :func:`random_words`."""
    key = int(seed) if seed.device.type == "cpu" or seed.device != device else seed
    for first in range(0, calls, step):
        yield first, random_words(key, offset, first, min(step, calls - first), device)


def normals_from_words(words: Tensor) -> Tensor:
    """Box-Muller: int64 [4, n] words to float32 [n, 4] independent N(0, 1), in call order when flattened.

    24 bits of a word make a uniform number that float32 holds exactly: in (0, 1] for the radius, [0, 1) for the angle.
    """
    bits = (words >> 8).to(torch.float32)
    radius = bits[0::2].add(1.0).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = bits[1::2] * (2.0 * math.pi * 2.0**-24)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten(0, 1).t()


def normal(seed: Tensor, offset: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Independent N(0, 1) numbers, float32 before the cast to ``dtype``; element i is number ``4 * offset + i``.

    Args:
        seed: int64 scalar tensor, the key.
        offset: the call that holds element 0.
        shape: of the result, which is contiguous: i is the index in row-major order.
    """
    total = math.prod(shape)
    calls = -(-total // 4)
    out = torch.empty((calls, 4), device=device, dtype=dtype)
    step = CALLS_A_BLOCK if device.type == "cpu" else max(calls, 1)
    for first, words in _blocks(seed, offset, calls, step, device):
        out[first : first + words.shape[1]] = normals_from_words(words)
    return out.flatten()[:total].view(shape)


def fresh_seed(device: torch.device | None = None) -> Tensor:
    """A new seed: int64 scalar tensor.

    From the default CPU generator, which torch.manual_seed governs. But for tensors on ``device``, a GPU, inside
    :func:`capturable`, while a CUDA graph is captured, and in what torch.compile compiles, it is on that GPU and from
    its generator, whose state moves on in a graph: a seed on the CPU would be the same one in every replay.
    """
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=_place_of_seed(device))


def _place_of_seed(device: torch.device | None) -> torch.device | str:
    if device is None or device.type != "cuda":
        return "cpu"
    if torch.compiler.is_compiling() or _is_capturable.get() or torch.cuda.is_current_stream_capturing():
        return device
    return "cpu"


@contextmanager
def capturable() -> Iterator[None]:
    """Inside, Bayes layers on a GPU draw their seeds there, with its generator, which torch.cuda.manual_seed governs.

    A CUDA graph then has no number of the host's in it: each replay draws new noise, and after
    ``torch.cuda.manual_seed`` the same noise again. Capturing alone makes layers do so too, but kernels are loaded when
    they are first run, which must not be while a graph is captured: warm up inside, with
    torch.cuda.make_graphed_callables or a loop of one's own. Replays need it no more. Code that torch.compile has
    compiled draws on the GPU anyway, with any mode. It holds for the thread (or asyncio task) that is inside.

    Example:
        >>> with bqnn.capturable():  # doctest: +SKIP
        ...     step = torch.cuda.make_graphed_callables(net, (x,))
    """
    token = _is_capturable.set(True)
    try:
        yield
    finally:
        _is_capturable.reset(token)
