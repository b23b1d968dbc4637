"""What the packed layers share: buffers, what is made of them once, and the choice between two ways to run.

Each runs in one of two ways, with the same result up to the order of summation: "packed" calls the packed op and keeps,
beside the codes, at most the layout that a backend makes of them; "dense" multiplies with the weight, decoded once and
kept. "auto" takes, call by call, the one that bqnn.packed.cost expects to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.core.check import check_precision
from bqnn.core.codes import find_bad_byte
from bqnn.core.int8 import integer_limit
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu_layout import KERNEL_DTYPES
from bqnn.ops.packed_product import DenseWeight, check_weight, decode, decode_rounded, is_half
from bqnn.packed.cost import ALWAYS, NEVER, packed_rows

EXECUTIONS = ("auto", "packed", "dense")

# A layer remembers the shapes that the kernel takes as they are; with more than so many it starts again.
MAX_DIRECT_SHAPES = 64


class PackedLayer(nn.Module):
    """What the packed layers share.

    Buffers: ``codes`` uint8 [N, packed_width(K, M)], ``levels`` float32 [1 or N, M], ``bias`` [N] or None. ``levels``
    stays float32 when the module is cast. To change a buffer in place leaves the decoded weight and the layout stale;
    load_state_dict and every conversion drop them. That is also when the backend is chosen: a later change of
    BQNN_BACKEND may leave alone what the layer has run before.
    """

    op: str
    layout_backends: tuple[str, ...] = ("cpu",)
    """Those that read a layout of codes and levels, made once."""
    codes: Tensor
    levels: Tensor
    bias: Tensor | None
    relu: bool = False
    """Whether negative outputs become 0."""
    _dense_weight: DenseWeight | None
    _layout: Tensor | None
    _layout_backend: str
    _direct_shapes: dict[torch.dtype, set[torch.Size]]
    _dense_shapes: set[torch.Size]

    def __init__(
        self,
        shape: tuple[int, ...],
        codes: Tensor,
        levels: Tensor,
        bias: Tensor | None,
        precision: str = "fp32",
        execution: str = "auto",
        relu: bool = False,
    ) -> None:
        super().__init__()
        check_precision(precision)
        if not isinstance(relu, bool):
            raise TypeError(f"relu must be a bool, got {type(relu).__name__}")
        columns = math.prod(shape[1:])
        check_weight(codes, levels, bias, columns)
        if precision == "int8":
            integer_limit(columns, levels.shape[1])
        _check_values(codes, levels, columns)
        self.shape = shape
        self._precision = precision
        self.relu = relu
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
        """Bytes of codes, levels and bias. A decoded weight and a layout, where they are kept, are not counted."""
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
        rows = self._packed_rows if x.dtype == torch.bfloat16 else self._packed_rows_of_wide
        first, last = rows
        if rows in (ALWAYS, NEVER):
            return "packed" if last else "dense"
        return "packed" if first <= self.rows(x) <= last else "dense"

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``, in x's dtype; float16 and bfloat16 are computed in float32.

        Raises:
            TypeError, ValueError: ``x`` has a wrong dtype or shape.
        """
        if (
            not torch.compiler.is_dynamo_compiling()
            and type(x) is Tensor  # no subclass: such a tensor may have no data
            and x.is_cpu
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            if x.shape in self._direct_shapes.get(x.dtype, ()):
                return self._run_direct(x)
            if x.shape in self._dense_shapes and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu"):
                return self._run_direct_dense(x)
        return self._run_checked(x)

    def extra_repr(self) -> str:
        return (
            f"bias={self.bias is not None}, num_levels={self.num_levels}, granularity={self.granularity!r}, "
            f"precision={self.precision!r}, execution={self.execution!r}" + (", relu=True" if self.relu else "")
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense_weight": None, "_layout": None, "_direct_shapes": {}, "_dense_shapes": set()}

    def _check_input(self, x: Tensor) -> None:
        raise NotImplementedError

    def _make_layout(self, backend: str) -> Tensor:
        """The layout of codes and levels for one of ``layout_backends``."""
        raise NotImplementedError

    def _takes_direct_calls(self) -> bool:
        """Whether the kernel can take what the layer is given as it is."""
        return True

    def _run_direct(self, x: Tensor) -> Tensor:
        """The kernel on an ``x`` that has been through every check in a call before."""
        raise NotImplementedError

    def _run_direct_dense(self, x: Tensor) -> Tensor:
        """The float32 product with the decoded weight, for an ``x`` that has been through every check before."""
        raise NotImplementedError

    def _run_checked(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if x.dtype == torch.float16 and x.is_cpu:
            return self.forward(x.float()).to(x.dtype)
        # An exported program holds the codes, not a weight that tracing would have to store in the module.
        if not torch.compiler.is_exporting() and self.execution_for(x) == "dense":
            if is_half(x) and x.dtype != self._dense().values.dtype:
                return self.run_dense(x.float()).to(x.dtype)
            y = self.run_dense(x)
            plain = self.precision == "fp32" and (self.bias is None or self.bias.dtype == torch.float32)
            if plain and not torch.compiler.is_compiling() and self._takes_direct_calls():
                self._remember(self._dense_shapes, x)
            return y
        y = self.run_packed(x)
        if not torch.compiler.is_compiling() and self._layout_for(x) is not None and self._takes_direct_calls():
            if dispatch.choose(self.op, x.device) == "cpu":
                self._remember(self._direct_shapes.setdefault(x.dtype, set()), x)
        return y

    @staticmethod
    def _remember(shapes: set[torch.Size], x: Tensor) -> None:
        if len(shapes) >= MAX_DIRECT_SHAPES:
            shapes.clear()
        shapes.add(x.shape)

    def _layout_for(self, x: Tensor) -> Tensor | None:
        """The layout, made in the first call; None where the backend that runs ``x`` wants none."""
        if torch.compiler.is_exporting() or type(x) is not Tensor:
            return None
        if not x.is_cuda and (not x.is_cpu or x.dtype not in KERNEL_DTYPES):
            return None
        return self._layout if self._prepare_layout() else None

    def _prepare_layout(self) -> bool:
        """Whether the backend that runs the op reads a layout; makes it for that one."""
        backend = dispatch.choose(self.op, self.codes.device)
        if backend not in self.layout_backends:
            return False
        if self._layout is None or self._layout_backend != backend:
            # An inference tensor, made in a first call under inference_mode, could not serve later calls outside it.
            with torch.inference_mode(False), torch.no_grad():
                self._layout, self._layout_backend = self._make_layout(backend), backend
            self._direct_shapes = {}
        return True

    # While torch.compile traces, that method is run and not itself traced; the graph then takes the layout as an input.
    # This is all that torch.compiler.assume_constant_result does, but that one imports the compiler.
    _prepare_layout._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _dense(self) -> DenseWeight:
        if self._dense_weight is None:
            with torch.inference_mode(False), torch.no_grad():
                columns = math.prod(self.shape[1:])
                values, scale = decode_rounded(self.codes, self.levels, columns, self.precision)
                if self.precision == "bf16" and values.is_cuda:
                    values = values.bfloat16()  # a GPU's libraries multiply them as they are
                self._dense_weight = DenseWeight(values.view(self.shape), scale)
        return self._dense_weight

    def _renew(self) -> None:
        """Drops what was made of the buffers and chooses again, for the present device, backend and threads."""
        self._dense_weight = None
        self._layout, self._layout_backend = None, ""
        self._direct_shapes = {}
        self._dense_shapes = set()
        self._packed_rows = self._packed_rows_of_wide = ALWAYS if self._execution == "packed" else NEVER
        if self._execution == "auto":
            n_bytes = self.codes.nbytes + self.levels.nbytes
            layer = (self.op, self.codes.device, self.shape, self.num_levels, self.precision, n_bytes)
            self._packed_rows = self._packed_rows_of_wide = packed_rows(*layer)
            if self.codes.is_cuda:
                self._packed_rows = packed_rows(*layer, torch.bfloat16)

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
