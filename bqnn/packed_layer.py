"""What the packed layers share: buffers, the decoded weight, and the choice between two ways to run.

Each runs in one of two ways, with the same result up to the order of summation: "packed" calls the packed op and keeps
nothing else in memory; "dense" multiplies with the weight, decoded once and kept. "auto" takes, call by call, the one
that bqnn.speed expects to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.ops._packed import check_precision, check_weight, decode, is_half, round_weight
from bqnn.packing import find_bad_byte
from bqnn.speed import packed_row_limit

EXECUTIONS = ("auto", "packed", "dense")


class PackedLayer(nn.Module):
    """What the packed layers share.

    Buffers: ``codes`` uint8 [N, packed_width(K, M)], ``levels`` float32 [1 or N, M], ``bias`` [N] or None. ``levels``
    stays float32 when the module is cast. To change a buffer in place leaves the decoded weight stale; load_state_dict
    and every conversion drop it.
    """

    op: str
    codes: Tensor
    levels: Tensor
    bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        codes: Tensor,
        levels: Tensor,
        bias: Tensor | None,
        precision: str = "fp32",
        execution: str = "auto",
    ) -> None:
        super().__init__()
        check_precision(precision)
        columns = math.prod(shape[1:])
        check_weight(codes, levels, bias, columns)
        _check_values(codes, levels, columns)
        self.shape = shape
        self._precision = precision
        self._dense_weight: Tensor | None = None
        for name, tensor in (("codes", codes), ("levels", levels), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.execution = execution

    @property
    def num_levels(self) -> int:
        """M, 2..16."""
        return self.levels.shape[1]

    @property
    def granularity(self) -> str:
        """ "tensor" (one codebook) or "channel" (one an output channel)."""
        return "tensor" if self.levels.shape[0] == 1 else "channel"

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "int8"; fixed when the layer is made."""
        return self._precision

    @property
    def execution(self) -> str:
        """ "auto", "packed" or "dense"; may be set."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        check_execution(value)
        self._execution = value
        self._renew()

    @property
    def nbytes(self) -> int:
        """Bytes of codes, levels and bias; a decoded weight, where one is kept, is not counted."""
        return sum(tensor.nbytes for tensor in (self.codes, self.levels, self.bias) if tensor is not None)

    def decode(self) -> Tensor:
        """The dense float32 weight in the layer's shape."""
        return decode(self.codes, self.levels, math.prod(self.shape[1:])).view(self.shape)

    def rows(self, x: Tensor) -> int:
        """How many output positions the layer computes for ``x``, over the whole batch."""
        raise NotImplementedError

    def run_packed(self, x: Tensor) -> Tensor:
        """The output for ``x`` by the packed op."""
        raise NotImplementedError

    def run_dense(self, x: Tensor) -> Tensor:
        """The output for ``x`` by the dense product with the decoded weight."""
        raise NotImplementedError

    def execution_for(self, x: Tensor) -> str:
        """ "packed" or "dense": what :meth:`forward` does with ``x``."""
        if self._row_limit in (0, math.inf):
            return "packed" if self._row_limit else "dense"
        return "packed" if self.rows(x) <= self._row_limit else "dense"

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``, in x's dtype; float16 and bfloat16 are computed in float32.

        Raises:
            TypeError, ValueError: ``x`` has a wrong dtype or shape.
        """
        self._check_input(x)
        if is_half(x):
            return self.forward(x.float()).to(x.dtype)
        # An exported program holds the codes, not a weight that tracing would have to store in the module.
        if torch.compiler.is_exporting() or self.execution_for(x) == "packed":
            return self.run_packed(x)
        return self.run_dense(x)

    def extra_repr(self) -> str:
        return (
            f"bias={self.bias is not None}, num_levels={self.num_levels}, granularity={self.granularity!r}, "
            f"precision={self.precision!r}, execution={self.execution!r}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense_weight": None}

    def _check_input(self, x: Tensor) -> None:
        raise NotImplementedError

    def _dense(self) -> Tensor:
        if self._dense_weight is None:
            # An inference tensor, made in a first call under inference_mode, could not serve later calls outside it.
            with torch.inference_mode(False), torch.no_grad():
                self._dense_weight = round_weight(self.decode(), self.precision)
        return self._dense_weight

    def _renew(self) -> None:
        """Drops the decoded weight and chooses again, for the present device."""
        self._dense_weight = None
        self._row_limit: float = 0 if self._execution == "dense" else math.inf
        if self._execution == "auto":
            columns = math.prod(self.shape[1:])
            n_bytes = self.codes.nbytes + self.levels.nbytes
            self._row_limit = packed_row_limit(self.op, self.codes.device, self.shape[0], columns, n_bytes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        levels = self.levels
        super()._apply(fn, recurse)
        if self.levels.dtype != torch.float32:
            self.levels = levels.to(self.levels.device)
        self._renew()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *messages: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *messages)
        try:
            _check_values(self.codes, self.levels, math.prod(self.shape[1:]))
        except ValueError as error:
            messages[-1].append(prefix + str(error))
        self._renew()


def check_execution(execution: str) -> None:
    """Raises ValueError where ``execution`` is not one of :data:`EXECUTIONS`."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")


def _check_values(codes: Tensor, levels: Tensor, columns: int) -> None:
    if not (levels.isfinite().all() and (levels[:, 1:] > levels[:, :-1]).all()):
        raise ValueError(f"levels must be finite and strictly increasing in each row, got {levels.tolist()}")
    if problem := find_bad_byte(codes, levels.shape[1], columns):
        raise ValueError(f"codes {problem}")
