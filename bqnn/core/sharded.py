"""Parameters that processes share out among each other, as torch's fully_shard (FSDP2) leaves them between calls of a
module: each holds some rows of every tensor. In a call of the module they are whole, and plain tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor."""
    # Where nobody has sharded anything, torch's module of it is not imported, and importing it takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_resharding(before: Any, after: Any) -> bool:
    """Whether a module's parameter ``before`` makes way for its sharded form, or the other way round."""
    return is_sharded(before) or is_sharded(after)


def whole(tensor: Any, partial: bool = False) -> Tensor:
    """All of a tensor, in every process; itself where it is not sharded.

    Args:
        partial: whether the gradient of each process is a part, so that it is their sum; else all have found the whole
            of it.
    """
    if not is_sharded(tensor):
        return tensor
    return tensor.full_tensor(grad_placements=_partial(tensor) if partial else None)


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def rows_of(rows: Tensor, tensor: Any) -> Tensor:
    """Of ``rows``, which belong to the first dimension of ``tensor``, or are one for all, those of this process."""
    if not is_sharded(tensor) or len(rows) == 1:
        return rows
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return rows[offset[0] : offset[0] + shape[0]]


def total(part: Tensor, tensor: Any) -> Tensor:
    """The sum over all processes of what each has found for its part of ``tensor``; the gradient goes to each part."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, tensor.device_mesh, _partial(tensor), run_check=False).full_tensor()


@torch.no_grad()
def put_(tensor: Any, value: Tensor) -> None:
    """Sets a tensor to the whole ``value``, of its shape, of which each process keeps its part."""
    if not is_sharded(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    shared = distribute_tensor(value.to(tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(shared.to_local())


def _partial(tensor: Any) -> list[Any]:
    """For each dimension of the mesh: parts where processes share the tensor out, copies where each has it."""
    from torch.distributed.tensor import Partial

    return [Partial() if placement.is_shard() else placement for placement in tensor.placements]
