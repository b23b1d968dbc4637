"""Whether a value comes back from a GPU: that would wait for it, and no CUDA graph could hold it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By these ops a value comes back from the GPU, as a number or as the shape of a result.
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"),
    *("repeat_interleave.Tensor", "bincount", "histc", "_assert_async"),
}


class NothingIsRead(TorchDispatchMode):
    """Looks at every op of torch, and raises AssertionError where one reads a value back, but for that of ``known``, a
    tensor that a GPU has no part in."""

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self._known = known
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.seen.append(name)
        if self._known is None or not any(each is self._known for each in args):
            assert name not in READS and name.split(".")[0] not in READS, f"{name} waits for the GPU"
        return func(*args, **(kwargs or {}))
