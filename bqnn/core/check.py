"""Argument checks that the public functions of the ops share; each error names argument, value and need."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.core.sharded import is_sharded
from bqnn.core.text import shown

MOST_CALLS = 2**62  # of Philox, that an offset leaves out: what follows it can be counted in 63 bits
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_NUMBERS = 2**45  # that an address space holds
MIN_LEVELS, MAX_LEVELS = 2, 16
_WEIGHT_SHAPES = {None: "[channels, ...]", 2: "[out, in]", 4: "[out, in / groups, height, width]"}


def check_num_levels(num_levels: int) -> None:
    """Raises ValueError unless 2 <= num_levels <= 16, TypeError unless it is an int."""
    check_int("num_levels", num_levels, MIN_LEVELS, MAX_LEVELS)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is a dense tensor: not a sparse one, nor in a format of some library, nor
    shared out among processes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    if is_sharded(tensor):
        raise TypeError(
            f"{name} must have all of its numbers in this process, got a DTensor, which processes share; "
            "tensor.full_tensor() gathers them"
        )


def check_data(name: str, tensor: Tensor) -> None:
    """Raises ValueError where ``tensor`` is on the device meta, and has no numbers."""
    if tensor.is_meta:
        raise ValueError(f"{name} must have numbers, got a tensor on the device meta")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is a dense floating-point tensor, of 16 to 64 bits."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        bits = " of 16 to 64 bits" if tensor.is_floating_point() else ""
        raise TypeError(f"{name} must be floating point{bits}, got {tensor.dtype}")


def check_flag(name: str, value: bool) -> None:
    """Raises TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer of Python or NumPy, and no bool."""
    return not isinstance(value, bool) and isinstance(value, (int, Integral))


def check_integer(name: str, value: int) -> None:
    """Raises TypeError unless ``value`` is an integer."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_int(name: str, value: int, least: int, most: int) -> None:
    """Raises TypeError unless ``value`` is an int, ValueError unless it is from ``least`` to ``most``."""
    check_integer(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {value}")


def check_number(name: str, value: float) -> None:
    """Raises TypeError unless ``value`` is a number of Python or NumPy, ValueError where it is an integer of more than
    64 bits, of which torch makes no factor."""
    if not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if is_integer(value) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a float or an integer of 64 bits, got {named(value)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError where ``value`` of the argument ``name`` is none of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {named(value)}")


def check_module(name: str, net: nn.Module) -> None:
    """Raises TypeError unless ``net`` is a module."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {named(net)}")


def named(value: Any) -> str:
    """``value`` in a message: a number, a string or a sequence of them as it is, of all else the type."""
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple))
    return shown(repr(value), 80) if plain else type(value).__name__


def check_weight(weight: Tensor, dimensions: int | None = None) -> None:
    """Raises unless ``weight`` is floating point, with ``dimensions`` dimensions (None: at least one)."""
    check_floating("weight", weight)
    if weight.dim() == 0 or dimensions not in (None, weight.dim()):
        raise ValueError(f"weight must have the shape {_WEIGHT_SHAPES[dimensions]}, got {list(weight.shape)}")


def check_levels(name: str, levels: Tensor, weight: Tensor) -> None:
    """Raises unless ``levels``, or what goes with each level, is floating point [1 or N, M], on the weight's device."""
    _check_codebook(name, levels, weight, MIN_LEVELS, MAX_LEVELS)


def check_thresholds(thresholds: Tensor, weight: Tensor, levels: Tensor | None = None) -> None:
    """Raises unless ``thresholds`` is floating point [1 or N, M - 1], with the M of ``levels`` if given."""
    between = (MIN_LEVELS, MAX_LEVELS) if levels is None else (levels.shape[1], levels.shape[1])
    _check_codebook("thresholds", thresholds, weight, *(m - 1 for m in between))


def _check_codebook(name: str, codebook: Tensor, weight: Tensor, least: int, most: int) -> None:
    check_floating(name, codebook)
    channels = weight.shape[0]
    if codebook.dim() != 2 or codebook.shape[0] not in (1, channels) or not least <= codebook.shape[1] <= most:
        columns = f"{least} to {most}" if least < most else f"{least}"
        raise ValueError(f"{name} must have the shape [1 or {channels}, {columns}], got {list(codebook.shape)}")
    check_device(name, codebook, weight)


def check_seed(seed: Tensor) -> None:
    """Raises unless ``seed`` is an int64 scalar tensor."""
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be an int64 scalar tensor, got {type(seed).__name__}")
    check_tensor("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 scalar tensor, got {seed.dtype}")
    if seed.dim() != 0:
        raise ValueError(f"seed must be an int64 scalar tensor, got the shape {list(seed.shape)}")


def check_noise(seed: Tensor, offset: int, weight: Tensor) -> None:
    """Raises unless ``seed`` is an int64 scalar tensor that has a number where the weight has some, and ``offset`` is a
    number of calls."""
    check_seed(seed)
    if not weight.is_meta:
        check_data("seed", seed)
    check_int("offset", offset, 0, MOST_CALLS)


def check_same_shape(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Raises unless ``tensor`` is floating point, of the weight's shape and on its device."""
    check_floating(name, tensor)
    if tensor.shape != weight.shape:
        raise ValueError(f"{name} must have the weight's shape {list(weight.shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, weight)


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {other.device}; they must share one")


def check_bias(bias: Tensor | None, channels: int, x: Tensor) -> None:
    """Raises unless ``bias`` is None or a floating-point [channels] tensor on x's device."""
    if bias is None:
        return
    check_floating("bias", bias)
    if bias.shape != (channels,):
        raise ValueError(f"bias must have the shape [{channels}], got {list(bias.shape)}")
    check_device("bias", bias, x)


def check_linear_input(x: Tensor, in_features: int) -> None:
    """Raises unless ``x`` is a floating-point [..., in_features] tensor."""
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have the shape [..., {in_features}], got {list(x.shape)}")


def check_conv2d_input(x: Tensor, in_channels: int, out_channels: int, groups: int) -> None:
    """:func:`check_convolution_input` over images."""
    check_convolution_input(x, in_channels, out_channels, groups, 2)


_DIMENSIONS = {1: "length", 2: "height, width"}


def check_convolution_input(x: Tensor, in_channels: int, out_channels: int, groups: int, dimensions: int) -> None:
    """Raises unless ``x`` is floating point, [B, in_channels, L] or [B, in_channels, H, W] as ``dimensions`` says, of
    one position or more, and groups divides both channel counts."""
    check_floating("x", x)
    check_integer("groups", groups)
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups must divide in_channels and out_channels, got {groups} for {in_channels} and {out_channels}"
        )
    if x.dim() != 2 + dimensions or x.shape[1] != in_channels or min(x.shape[2:]) < 1:
        needed = f"[batch, {in_channels}, {_DIMENSIONS[dimensions]}]"
        raise ValueError(f"x must have the shape {needed}, got {list(x.shape)}")


def check_indices(indices: Tensor) -> None:
    """Raises TypeError unless ``indices`` is a tensor of int32 or int64."""
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be torch.int32 or torch.int64, got {indices.dtype}")


PRECISIONS = ("fp32", "bf16", "int8")


def check_precision(precision: str) -> None:
    """Raises ValueError where ``precision`` is not one of :data:`PRECISIONS`."""
    check_choice("precision", precision, PRECISIONS)
