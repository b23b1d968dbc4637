"""unwrapped: the network inside what training puts around it."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def unwrapped(net: nn.Module) -> nn.Module:
    """``net`` without the wrappers of torch.compile, DataParallel, DistributedDataParallel and AveragedModel.

    They may stand around the whole network or around any of its modules. The names of modules and tensors are then
    those of the network as its author wrote it. Where a wrapper is inside, the result is a copy that has the tensors of
    ``net`` in it; otherwise it is ``net`` or the module that it wraps.
    """
    while (inner := _inside(net)) is not None:
        net = inner
    if not any(_inside(module) for module in net.modules()):
        return net
    # deepcopy takes what its memo holds for the copy: of a tensor the tensor, of a wrapper the copy of what it wraps.
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    # A module comes before those inside it, so that from the end on the innermost wrappers are done first.
    for module in reversed(list(net.modules())):
        if (inner := _inside(module)) is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(net, memo)


def _inside(module: nn.Module) -> nn.Module | None:
    """What ``module`` wraps, None where it is no wrapper."""
    if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
        return module.module
    # Where nobody has compiled anything, the compiler is not imported, and importing it takes long.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return module._orig_mod
    return None
