"""Ways to break an argument: what a caller may hand over in the place of a valid value, by the kind of that value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.draws import Draw

INTEGERS = [0, 1, 2, 3, 7, 16, 17, -1, -2, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**31), -(2**63)]
BEYOND = [2**63, 2**64 + 1, -(2**63) - 1, 10**30]
WORDS = ["", "fp32", "bf16", "int8", "FP32", "int4", "categorical", "gaussian", "x" * 100_000, "a\0b", "\ud800", "\n"]
WORDS += ["cpu", "reference", "dense", "triton", "cuda", "auto", "packed"]
VALUES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, 1e30, -1.0, 200.0]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.uint8, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
HUGE = 2**50


class Plain(Tensor):
    """A tensor of another class."""


def other_dtype(draw: Draw, tensor: Tensor) -> Any:
    return tensor.to(draw.choice(DTYPES))


def other_rank(draw: Draw, tensor: Tensor) -> Any:
    flat = tensor.reshape(-1)
    ways: list[Callable[[], Any]] = [
        lambda: tensor.unsqueeze(0),
        lambda: tensor.unsqueeze(-1),
        lambda: flat,
        lambda: tensor.flatten(1) if tensor.dim() > 1 else flat,
        lambda: tensor[0] if tensor.dim() and len(tensor) else flat,
        lambda: tensor.reshape(*[1] * (64 - tensor.dim()), *tensor.shape),
        lambda: flat.reshape(-1, 1),
        lambda: tensor.squeeze(),
        lambda: torch.zeros((), dtype=tensor.dtype),
    ]
    return draw.choice(ways)()


def other_size(draw: Draw, tensor: Tensor) -> Any:
    """A dimension of none, one less, one more, or many more."""
    if tensor.dim() == 0:
        return tensor.expand(draw.choice((0, 1, 2))).clone()
    d = draw.randrange(tensor.dim())
    size = tensor.shape[d]
    new = draw.choice((0, size - 1, size + 1, 2 * size, 18 * size, 1))
    index = torch.arange(max(new, 0)) % max(size, 1)
    if size == 0:
        return tensor.new_zeros([*tensor.shape[:d], new if new > 0 else 1, *tensor.shape[d + 1 :]])
    return tensor.index_select(d, index)


def transposed_sizes(draw: Draw, tensor: Tensor) -> Any:
    order = list(range(tensor.dim()))
    draw.shuffle(order)
    moved = tensor.permute(order)
    return moved.contiguous() if draw.random() < 0.5 else moved


def strided(draw: Draw, tensor: Tensor) -> Any:
    """The same values, apart in memory or in another order."""
    ways: list[Callable[[], Tensor]] = [
        lambda: torch.stack([tensor, tensor], -1)[..., 0],
        lambda: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor,
        lambda: torch.cat([tensor, tensor])[: len(tensor)] if tensor.dim() else tensor,
        lambda: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] if tensor.dim() else tensor,
        lambda: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor,
    ]
    return draw.choice(ways)()


def expanded(draw: Draw, tensor: Tensor) -> Any:
    """Numbers that share memory with each other."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    d = draw.randrange(tensor.dim())
    if draw.random() < 0.5:
        return tensor.narrow(d, 0, 1).expand(tensor.shape)
    strides = list(tensor.stride())
    strides[d] = draw.choice((0, 1))
    return tensor.as_strided(tensor.shape, strides)


def huge(draw: Draw, tensor: Tensor) -> Any:
    """More elements than there is memory for, or none in a shape of huge sizes."""
    if tensor.dim() == 0:
        return tensor.expand(HUGE)
    d = draw.randrange(tensor.dim())
    shape = list(tensor.shape)
    if draw.random() < 0.5 and tensor.numel():
        shape[d] = HUGE
        return tensor.narrow(d, 0, 1).expand(shape)
    shape[d] = draw.choice((HUGE, 2**62))
    shape[draw.randrange(tensor.dim())] = 0
    if draw.random() < 0.5:
        shape = [0, *[2**62] * (tensor.dim() - 1)]
    return tensor.new_empty(0).as_strided(shape, [0] * len(shape))


def moved(draw: Draw, tensor: Tensor) -> Any:
    """From another place in a storage, aligned or not."""
    tensor = tensor.contiguous()
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return tensor
    offset = draw.choice((1, 2, 3, 4, 8, tensor.element_size()))
    memory = bytearray(tensor.nbytes + offset)
    found = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)
    found.copy_(tensor)
    return found


def emptied(draw: Draw, tensor: Tensor) -> Any:
    """A tensor whose storage somebody has made smaller."""
    found = tensor.clone()
    found.untyped_storage().resize_(draw.choice((0, found.untyped_storage().nbytes() // 2)))
    return found


def elsewhere(draw: Draw, tensor: Tensor) -> Any:
    """Sparse, without data, or of another class."""
    ways: list[Callable[[], Any]] = [
        lambda: tensor.to_sparse(),
        lambda: tensor.to_sparse_csr() if tensor.dim() == 2 else tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: tensor.float().to_mkldnn(),
        lambda: tensor.as_subclass(Plain),
    ]
    return draw.choice(ways)()


def watched(draw: Draw, tensor: Tensor) -> Any:
    """With a gradient, in inference mode, or with a bit that stands for an operation."""

    def inference() -> Tensor:
        with torch.inference_mode():
            return tensor.clone()

    ways: list[Callable[[], Any]] = [
        lambda: tensor.clone().requires_grad_(tensor.is_floating_point()),
        lambda: nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
        inference,
        lambda: torch._neg_view(-tensor) if tensor.is_floating_point() else tensor,
        lambda: torch.complex(tensor.float(), tensor.float()).conj().imag.to(tensor.dtype),
        lambda: torch.complex(tensor.float(), tensor.float()).conj(),
    ]
    return draw.choice(ways)()


def other_values(draw: Draw, tensor: Tensor) -> Any:
    found = tensor.clone()
    flat = found.reshape(-1) if found.is_contiguous() else found.flatten()
    for _ in range(min(len(flat), draw.choice((1, 1, 2, 10)))):
        place = draw.randrange(len(flat))
        if found.is_floating_point():
            flat[place] = draw.choice(VALUES)
        elif found.dtype != torch.bool:
            limits = torch.iinfo(found.dtype)
            flat[place] = draw.choice((0, 1, limits.min, limits.max, draw.randint(limits.min, limits.max)))
    return flat.view(tensor.shape)


def all_of_one_value(draw: Draw, tensor: Tensor) -> Any:
    if tensor.is_floating_point():
        return torch.full_like(tensor, draw.choice(VALUES))
    return torch.full_like(tensor, draw.choice((0, 1)))


def no_tensor(draw: Draw, tensor: Tensor) -> Any:
    return draw.choice((None, 0, 1.5, "x", [], [1.0, 2.0], tensor.detach().flatten()[:1].tolist(), nn.Identity()))


def other_bytes(draw: Draw, tensor: Tensor) -> Any:
    """Of what is bytes: some of them, or a number of 32 or 64 bits, changed near the beginning; cut off or added to."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() < 16:
        return other_values(draw, tensor)
    found = tensor.clone()
    way = draw.random()
    if way < 0.7:
        width = draw.choice((4, 8))
        offset = draw.randrange(min(400, len(found)) // width) * width
        kind = torch.int32 if width == 4 else torch.int64
        limits = torch.iinfo(kind)
        old = int(found[offset : offset + width].view(kind))
        near = [each for each in (old - 1, old + 1, 2 * old, old // 2) if limits.min <= each <= limits.max]
        value = draw.choice([0, 1, -1, 2, 3, 17, 64, limits.max, limits.min, *near])
        found[offset : offset + width].view(kind).fill_(value)
    elif way < 0.8:
        found = found[: draw.randrange(len(found))].clone()
    elif way < 0.9:
        found = torch.cat([found, found[: draw.randrange(1, len(found))]])
    else:
        found[400:] = draw.integers(256, max(len(found) - 400, 0)).to(torch.uint8)
    return found


TENSOR = [other_dtype, other_rank, other_size, transposed_sizes, strided, expanded, huge, moved, emptied, elsewhere]
TENSOR += [watched, other_values, all_of_one_value, no_tensor, other_bytes]
FATAL_TO_TORCH = (emptied,)
"""What torch itself does not survive, not even where it prints the arguments of a call."""


def broken(draw: Draw, value: Any, others: list[Any], alone: bool) -> Any:
    """Something in the place of ``value``.

    Args:
        others: the call's other arguments.
        alone: whether nothing is wrong with these, and the extension looks at the value before torch does.
    """
    if draw.random() < 0.08 and others:
        return draw.choice(others)
    if isinstance(value, Tensor) and value.layout == torch.strided and not isinstance(value, Plain):
        ways = TENSOR if alone else [each for each in TENSOR if each not in FATAL_TO_TORCH]
        way = draw.choice(ways)
        try:
            return way(draw, value)
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            return None  # torch has no such tensor of this dtype or shape
    if draw.random() < 0.1:
        return draw.choice((None, [], (), {}, "x", 1.5, b"x", torch.zeros(2), nn.Identity(), object()))
    if isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
        return broken_list(draw, list(value))
    if isinstance(value, bool):
        return draw.choice((True, False, 2, -1, 0.5, None, "yes", torch.tensor(True)))
    if isinstance(value, int):
        if draw.random() < 0.1:
            return draw.choice((1.0, 1.5, math.nan, True, "1", torch.tensor(1), torch.zeros(2), *BEYOND))
        return draw.choice((*INTEGERS, value + 1, value - 1, 2 * value, -value))
    if isinstance(value, float):
        return draw.choice((0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 5e-324, 1, None, "1"))
    if isinstance(value, str):
        return draw.choice(WORDS)
    if value is None:
        return draw.choice((0, 1.5, "x", [], torch.zeros(0), torch.zeros(1), torch.zeros(3), torch.ones(2, 3).int()))
    if isinstance(value, nn.Module):
        return draw.choice((None, "net", torch.zeros(3), nn.Sequential(), nn.Linear, nn.Identity(), lambda x: x))
    return value


def broken_list(draw: Draw, value: list[int]) -> Any:
    way = draw.randrange(7)
    if way < 3 and value:
        value[draw.randrange(len(value))] = draw.choice(INTEGERS)
        return value
    return draw.choice(
        (
            [],
            value[:1],
            [*value, 1],
            tuple(value),
            [1] * 1000,
            [1.5] * len(value),
            [None] * 2,
            [value, value],
            ["1", "1"],
        )
        if way < 6
        else (1, 0, "same", "valid", [*value[:1], 2**63], [draw.choice(INTEGERS)] * 2, torch.ones(2, dtype=torch.int64))
    )
