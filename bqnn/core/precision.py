"""Which dtype numbers are computed in: half precision holds activations and weights, not what is made of them.

float16 ends at 65504, which the square of 256 is beyond, and at 6e-8, which variances are below; bfloat16 has 8 bits,
and a difference of two entropies needs more. Squares, variances, codebooks, divergences and entropies are therefore
float32 at least, whatever comes in.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def is_half(tensor: Tensor) -> bool:
    """Whether ``tensor`` is float16 or bfloat16."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds all of them, float32 at least."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or float16 and bfloat16 numbers in float32."""
    return tensor.float() if is_half(tensor) else tensor


def narrowed(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the dtype of its parameter; what float16 has no number for becomes the largest that it has.

    Near a level the divergence of a weight is steep, 1 / distance, and with small weights the steps of all of them
    would be infinite. What is infinite or NaN already stays so.
    """
    if dtype == torch.float16 and gradient.dtype != dtype:
        limit = torch.finfo(dtype).max
        gradient = torch.where(gradient.isfinite(), gradient.clamp(-limit, limit), gradient)
    return gradient.to(dtype)


def refused_dtype(values: Iterable[Any], dtypes: tuple[torch.dtype, ...]) -> torch.dtype | None:
    """The first floating-point dtype among ``values``, tensors nested in tuples or not, that is none of ``dtypes``."""
    for value in values:
        if isinstance(value, Tensor):
            dtype = value.dtype
            if dtype not in dtypes and dtype.is_floating_point:
                return dtype
        elif isinstance(value, tuple):
            if (found := refused_dtype(value, dtypes)) is not None:
                return found
    return None


def is_autocasting(device_type: str) -> bool:
    """Whether autocast chooses the dtype of products on devices of this type; False for one that it does not know."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


@cache
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
