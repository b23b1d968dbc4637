"""The processes that train one network together: those that torchrun started, on one machine or several.

Each takes its part of every batch and its own noise; gradients are averaged (DistributedDataParallel). The first leads:
it alone validates, writes the run and prints. What it reads of the run's folder it hands to the others; the data, and a
network to begin with, each reads for itself.
"""

from __future__ import annotations

import os
import random
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bqnn.training.epoch import Means

T = TypeVar("T")


class Processes:
    """Where this process is among all that train.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        leads: whether it is the first.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.leads = rank == 0

    def device(self, kind: str) -> str:
        """The device of this process: of GPUs the one of its number on its machine."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" and self.size > 1 else kind

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError unless the images of a step can be divided evenly."""
        if batch_size % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes, got {batch_size}")

    def part(self, batch: Tensor) -> Tensor:
        """This process's images of a batch [B, ...]; where B is no multiple of the processes, the last ones are no
        one's."""
        each = len(batch) // self.size
        return batch[self.rank * each : (self.rank + 1) * each]

    def draw_own_noise(self, seed: int, epoch: int) -> None:
        """Begins noise of its own for an epoch; the first process goes on with that of a process alone."""
        if not self.leads:
            torch.manual_seed(random.Random(f"{seed} {epoch} {self.rank}").getrandbits(63))

    def together(self, net: nn.Module) -> nn.Module:
        """What trains ``net``: itself, of a process alone, else a wrapper that averages gradients over all of them."""
        if self.size == 1:
            return net
        return DistributedDataParallel(net)

    def mean(self, means: Means) -> Means:
        """The means over all processes."""
        if self.size == 1:
            return means
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(means, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return Means(*(total / self.size).tolist())

    def from_leader(self, value: T | None) -> T:
        """What the first process gives here, in all of them; each waits for it."""
        shared = [value]
        if self.size > 1:
            distributed.broadcast_object_list(shared)
        return shared[0]  # type: ignore[return-value]


ALONE = Processes()


def join(device: str) -> Processes:
    """The processes that torchrun has started, connected by NCCL where ``device`` is of CUDA, else by Gloo.

    A process that it did not start is alone, as is one without others.
    """
    size = int(os.environ.get("WORLD_SIZE", 1)) if distributed.is_torchelastic_launched() else 1
    if size == 1:
        return ALONE
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Processes(distributed.get_rank(), size)
