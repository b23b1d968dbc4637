"""assign_codes: the partition of a weight, as a code for each weight or as packed bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.check import check_thresholds, check_weight
from bqnn.core.codes import pack_codes, packed_width
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import all_float32
from bqnn.ops.backends.triton import kernels, serves
from bqnn.ops.register import register_op


def assign_codes_reference(weight: Tensor, thresholds: Tensor, packed: bool) -> Tensor:
    codes = quantizer.assign(weight, thresholds)
    return pack_codes(codes.flatten(1), int(thresholds.shape[1]) + 1) if packed else codes


def assign_codes_cpu(weight: Tensor, thresholds: Tensor, packed: bool) -> Tensor:
    if not all_float32(weight, thresholds):
        return assign_codes_reference(weight, thresholds, packed)
    shape = tuple(weight.shape)
    if packed:
        shape = (shape[0], packed_width(math.prod(shape[1:]), int(thresholds.shape[1]) + 1))
    codes = weight.new_empty(shape, dtype=torch.uint8)
    torch.ops.bqnn_cpu.assign_codes(weight.contiguous(), thresholds.contiguous(), packed, codes)
    return codes if packed else _laid_out_as(weight, codes)


def assign_codes_triton(weight: Tensor, thresholds: Tensor, packed: bool) -> Tensor:
    if not serves(weight, thresholds):
        return assign_codes_reference(weight, thresholds, packed)
    codes = kernels("assign_codes").assign_codes(weight.contiguous(), thresholds.contiguous(), packed)
    return codes if packed else _laid_out_as(weight, codes)


def _laid_out_as(weight: Tensor, codes: Tensor) -> Tensor:
    """The contiguous ``codes`` with the weight's strides."""
    return codes if weight.is_contiguous() else torch.empty_like(weight, dtype=torch.uint8).copy_(codes)


def _fake(weight: Tensor, thresholds: Tensor, packed: bool = False, backend: str | None = None) -> Tensor:
    if not packed:
        return torch.empty_like(weight, dtype=torch.uint8)
    columns = weight[0].numel()
    return weight.new_empty((weight.shape[0], packed_width(columns, int(thresholds.shape[1]) + 1)), dtype=torch.uint8)


register_op(
    "assign_codes",
    "(Tensor weight, Tensor thresholds, bool packed=False, str? backend=None) -> Tensor",
    assign_codes_reference,
    _fake,
)
dispatch.register("assign_codes", "triton", assign_codes_triton)
dispatch.register("assign_codes", "cpu", assign_codes_cpu)


def assign_codes(weight: Tensor, thresholds: Tensor, packed: bool = False, backend: str | None = None) -> Tensor:
    """The code #{j : w > t_j} of every weight (the partition of Chien and Chang 2023).

    Args:
        weight: floating point [N, ...].
        thresholds: [1 or N, M - 1], increasing in each row.
        packed: whether to pack the codes of an output channel into bytes, as :func:`bqnn.core.codes.pack_codes` does.

    Returns:
        uint8, the weight's shape; packed: [N, packed_width].

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    check_weight(weight)
    check_thresholds(thresholds, weight)
    return torch.ops.bqnn.assign_codes(weight, thresholds, packed, backend)
