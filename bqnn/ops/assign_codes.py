"""assign_codes: the partition of a weight, as a code for each weight or as packed bytes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.check import check_flag, check_thresholds, check_weight
from bqnn.core.codes import pack_codes, packed_width
from bqnn.core.structure import Structure
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import serves
from bqnn.ops.backends.triton import kernels, other_dtype
from bqnn.ops.register import call, register_op


class AssignCall(NamedTuple):
    """The arguments of the op."""

    weight: Tensor
    thresholds: Tensor
    packed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        shape = tuple(self.weight.shape)
        if not self.packed:
            return shape
        return shape[0], packed_width(math.prod(shape[1:]), int(self.thresholds.shape[1]) + 1)


def assign_codes_reference(call: AssignCall) -> Tensor:
    codes = quantizer.assign(call.weight, call.thresholds)
    if not call.packed:
        return codes
    shape = codes.shape[0], math.prod(codes.shape[1:])
    return pack_codes(codes.reshape(shape), int(call.thresholds.shape[1]) + 1)


def _cpu(call: AssignCall) -> Tensor:
    codes = call.weight.new_empty(call.shape, dtype=torch.uint8)
    torch.ops.bqnn_cpu.assign_codes(call.weight.contiguous(), call.thresholds.contiguous(), call.packed, codes)
    return codes if call.packed else _laid_out_as(call.weight, codes)


def _triton(call: AssignCall) -> Tensor:
    if call.weight.numel() == 0:
        return call.weight.new_empty(call.shape, dtype=torch.uint8)
    codes = kernels("assign_codes").assign_codes(call.weight.contiguous(), call.thresholds.contiguous(), call.packed)
    return codes if call.packed else _laid_out_as(call.weight, codes)


def _laid_out_as(weight: Tensor, codes: Tensor) -> Tensor:
    """The contiguous ``codes`` with the weight's strides."""
    return codes if weight.is_contiguous() else torch.empty_like(weight, dtype=torch.uint8).copy_(codes)


def _fake(call: AssignCall) -> Tensor:
    if not call.packed:
        return torch.empty_like(call.weight, dtype=torch.uint8)
    return call.weight.new_empty(call.shape, dtype=torch.uint8)


register_op(
    "assign_codes",
    "(Tensor weight, Tensor thresholds, bool packed=False, str? backend=None) -> Tensor",
    Structure(AssignCall),
    assign_codes_reference,
    _fake,
)
dispatch.register("assign_codes", "triton", _triton, other_dtype)
dispatch.register("assign_codes", "cpu", _cpu, serves)


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
    check_flag("packed", packed)
    return call("assign_codes", AssignCall(weight, thresholds, packed), backend)
