"""refresh_batchnorm: BatchNorm statistics of the network that will run, not of the one that was trained."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bqnn.core.inputs import call_network
from bqnn.core.modes import replica
from bqnn.core.precision import wide

MOST_BATCHES = 20  # are enough


@torch.no_grad()
def refresh_batchnorm(net: nn.Module, batches: Iterable[Any], limit: int = MOST_BATCHES) -> nn.Module:
    """Re-estimates the running statistics of every BatchNorm with the network in evaluation mode.

    The weights of training are noisy and those of the test are not, so the activations' statistics differ. The new
    ones are mean and unbiased variance over all images together, of the activations that a norm will see: those that
    the norms before it have made with their new statistics. They depend neither on the order of the images nor on how
    they are cut into batches. For that each norm takes a pass, as far as it, over the images: one norm after the other.
    A SyncBatchNorm counts the images of all processes.

    Args:
        net: any network; the statistics are changed in place, and nothing else.
        batches: inputs, each a tensor, or a tuple, list or dict of the network's arguments; those taken are kept until
            the end.
        limit: the number of batches at most.

    Returns:
        ``net``.

    Raises:
        ValueError: the network has a BatchNorm and there is no batch, or one value only for a channel. Statistics are
            then as before, as they are where the network itself fails.
    """
    if not any(is_tracked(module) for module in net.modules()):
        return net
    images = list(itertools.islice(batches, limit))
    if not images:
        raise ValueError("batches must hold at least one batch of inputs, got none")
    _Calibration(replica(net).eval()).run(images)
    return net


def is_tracked(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with running statistics."""
    return isinstance(module, _BatchNorm) and module.track_running_stats


class _Statistics(NamedTuple):
    """Of some values of each channel."""

    number: float
    """Of values."""
    mean: Tensor
    """float64 [C]."""
    squares: Tensor
    """float64 [C], the sum of squared deviations from the mean."""

    @classmethod
    def of(cls, x: Tensor) -> _Statistics:
        """Those of x [B, C, ...]."""
        number = x.numel() / x.shape[1]
        variance, mean = torch.var_mean(wide(x), [d for d in range(x.dim()) if d != 1], correction=0)
        return cls(number, mean.double(), variance.double() * number)

    def merged(self, other: _Statistics) -> _Statistics:
        """Those of all values together (Chan et al., "Algorithms for computing the sample variance", 1983)."""
        number = self.number + other.number
        shift, share = other.mean - self.mean, other.number / number
        squares = self.squares + other.squares + shift.square() * (self.number * share)
        return _Statistics(number, self.mean + shift * share, squares)

    def over_processes(self, group: Any) -> _Statistics:
        """Those of the values of all processes of the group."""
        number, total = self.mean.new_tensor(self.number), self.mean * self.number
        distributed.all_reduce(number, group=group)
        distributed.all_reduce(total, group=group)
        mean = total / number
        squares = self.squares + self.number * (self.mean - mean).square()
        distributed.all_reduce(squares, group=group)
        return _Statistics(number.item(), mean, squares)


class _Reached(BaseException):
    """A pass has come to the norm whose turn it is; no error, so that no network handles it."""


class _Calibration:
    """Measures the norms of a network one after the other, in the order in which it comes to them.

    A norm that a network uses several times is measured as often, each time with the statistics of the uses before; in
    the end it has those of all uses.

    Args:
        net: in evaluation mode; a replica, which gets buffers and hooks of its own.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._norms: list[Any] = [module for module in net.modules() if is_tracked(module)]
        self._targets = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
            norm.register_forward_pre_hook(self._before, with_kwargs=True)
        self._measured: dict[nn.Module, _Statistics] = {}
        self._uses: Counter[nn.Module] = Counter()
        self._calls: Counter[nn.Module] = Counter()
        self._next: Any = None
        self._found: _Statistics | None = None

    def run(self, batches: list[Any]) -> None:
        """Puts the statistics of these inputs into the network that the replica is one of, when all are known."""
        while self._measure_next(batches):
            pass
        for norm, (mean, variance, batches_tracked) in zip(self._norms, self._targets, strict=True):
            if norm in self._measured:
                mean.copy_(norm.running_mean)
                variance.copy_(norm.running_var)
                batches_tracked.fill_(len(batches))

    def _measure_next(self, batches: list[Any]) -> bool:
        """A pass as far as the next norm; False where there is none any more."""
        self._next = self._found = None
        for x in batches:
            self._calls.clear()
            try:
                call_network(self._net, x)
            except _Reached:
                continue
            if self._next is None:
                return False
        assert self._next is not None
        self._finish(self._next)
        return True

    def _before(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[norm] += 1
        if self._calls[norm] <= self._uses[norm]:
            return
        x = args[0] if args else kwargs["input"]
        norm._check_input_dim(x)
        if self._next is None:
            self._next = norm
        if norm is self._next and x.numel():
            found = _Statistics.of(x)
            self._found = found if self._found is None else self._found.merged(found)
        raise _Reached

    def _finish(self, norm: Any) -> None:
        found = self._found
        if found is not None and isinstance(norm, nn.SyncBatchNorm) and distributed.is_initialized():
            found = found.over_processes(norm.process_group)
        if found is None or found.number < 2:
            raise ValueError("batches must hold at least two values for each channel of a BatchNorm")
        if norm in self._measured:
            found = self._measured[norm].merged(found)
        self._measured[norm] = found
        self._uses[norm] += 1
        norm.running_mean.copy_(found.mean)
        norm.running_var.copy_(found.squares / (found.number - 1.0))
