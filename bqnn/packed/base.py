"""What the packed layers share: what is made of their buffers once, and the choice between two ways to run.

Each runs in one of two ways, with the same result up to the order of summation: "packed" multiplies from the codes, or
from a layout that a backend makes of them; "dense" multiplies with the weight, decoded once and kept. "auto" takes, for
each shape, the one that bqnn.packed.cost expects to be faster.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from bqnn.core.check import check_choice, check_flag, check_precision
from bqnn.core.derived import version_of
from bqnn.core.geometry import Geometry
from bqnn.core.int8 import integer_limit
from bqnn.core.leaf import node_of
from bqnn.ops import dispatch
from bqnn.ops.dispatch import Backend, Bound
from bqnn.ops.packed_product import PackedCall
from bqnn.ops.register import call, is_plain
from bqnn.packed.cost import Winning
from bqnn.packed.probes import packed_rows
from bqnn.packed.weight import PackedWeight

EXECUTIONS = ("auto", "packed", "dense")

# To look a function up in a module takes as long as these functions do, and a small layer's kernels not ten times that.
_compiling = torch.compiler.is_dynamo_compiling
_threads = torch.get_num_threads
_watching_modes = torch._C._len_torch_dispatch_stack  # TorchDispatchMode, which sees ops and not what backends do
_tracing = torch._C._get_tracing_state  # torch.jit.trace, which sees and keeps whatever goes through the dispatcher

# A layer remembers how it runs so many shapes; with more it starts again.
MAX_PLANS = 64


class Prepared(NamedTuple):
    """What a layer has made of its buffers, and of what else it depends on: all that it keeps beside the buffers."""

    codes: Tensor
    levels: Tensor
    counted: bool
    """Whether both tensors count their changes; inference tensors do not."""
    codes_version: int
    levels_version: int
    threads: int
    ranges: dict[torch.dtype, Winning]
    """By the dtype of the activations: for how many rows "auto" runs packed."""
    plans: dict[tuple[torch.dtype, torch.Size], Bound]
    """By dtype and shape of x: what runs it, with everything looked up."""


class PackedLayer(PackedWeight):
    """What the packed layers share.

    Buffers, those of :class:`bqnn.packed.weight.PackedWeight`, may be assigned, loaded, changed in place or swapped for
    a call (torch.func.functional_call): the layer sees it, by identity and by the count of changes that autograd keeps.
    What that one does not count, a change through ``tensor.data`` or of an inference tensor, the layer does not see.
    How a shape runs is decided in its first call: a later change of BQNN_BACKEND leaves alone what the layer has run
    before.
    """

    op: str
    relu: bool = False
    """Whether negative outputs become 0."""
    _relu_of: tuple[nn.Module, ...] = ()
    """The module, now an nn.Identity, whose ReLU the layer does; in a tuple, as it is no part of the layer."""
    _prepared: Prepared | None = None

    def __init__(
        self,
        shape: tuple[int, ...],
        codes: Tensor,
        levels: Tensor,
        bias: Tensor | None,
        precision: str = "fp32",
        execution: str = "auto",
        relu: bool = False,
        chances: Tensor | None = None,
    ) -> None:
        check_precision(precision)
        check_execution(execution)  # before nn.Module sees it, which keeps a module as one of its own
        check_flag("relu", relu)
        super().__init__(shape, codes, levels, bias, chances)
        if precision == "int8":
            integer_limit(math.prod(shape[1:]), self.num_levels)
        self._precision = precision
        self.relu = relu
        self.execution = execution

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
        self._prepared = None

    def rows(self, x: Tensor) -> int:
        """How many output positions the layer computes for ``x``, over the whole batch."""
        raise NotImplementedError

    def execution_for(self, x: Tensor) -> str:
        """ "packed" or "dense": what :meth:`forward` does with ``x``."""
        if self._execution != "auto":
            return self._execution
        ranges = self._prepare().ranges
        if x.dtype not in ranges:
            packed_bytes = self.codes.nbytes + self.levels.nbytes
            ranges[x.dtype] = packed_rows(
                self.op, self.codes.device, self.shape, self.num_levels, self.precision, packed_bytes, x.dtype
            )
        rows = self.rows(x)
        return "packed" if any(first <= rows <= last for first, last in ranges[x.dtype]) else "dense"

    def backend_for(self, x: Tensor) -> tuple[Backend, PackedCall]:
        """What runs ``x``, which the layer takes, in eager execution, and the call that it runs.

        Raises:
            bqnn.BackendError: the backend that ``BQNN_BACKEND`` names can not run it.
        """
        arguments = self._call(self._prepared_input(x))
        return dispatch.choose(self.op, arguments, _name_of(self.execution_for(x))), arguments

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``, in x's dtype; float16 and bfloat16 are computed in float32.

        The gradient for ``x`` is that of the product with the decoded weight, whatever the precision.

        Raises:
            TypeError, ValueError: ``x`` has a wrong dtype or shape.
        """
        if (
            not _compiling()
            and type(x) is Tensor  # no subclass: such a tensor may have no data
            and x.is_cpu
            and not _watching_modes()
            and not _tracing()
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            prepared = self._prepared
            if prepared is not None:
                # _is_current, written out, since a small layer's kernels take less time than a call of a method; and
                # nn.Module looks for a buffer in three places: here is where it is.
                codes, levels, counted, codes_version, levels_version, threads, _, plans = prepared
                buffers = self._buffers
                if (
                    codes is buffers["codes"]
                    and levels is buffers["levels"]
                    and (not counted or (codes._version == codes_version and levels._version == levels_version))
                    and threads == _threads()
                ):
                    run = plans.get((x.dtype, x.shape))
                    if run is not None:
                        return run(x, buffers["bias"])
        return self._run_checked(x)

    def take_over(self, relu: nn.Module) -> None:
        """Does the work of ``relu``, which follows the layer and is an nn.Identity from now on, until the layer gets a
        hook that would see the outputs before it."""
        self.relu, self._relu_of = True, (relu,)

    def give_back_relu(self) -> None:
        """Makes the ReLU that the layer has taken over, if there is one, a module of its own again."""
        for module in self._relu_of:
            module.__class__ = nn.ReLU
            module.inplace = False  # type: ignore[assignment]
            self.relu, self._relu_of, self._prepared = False, (), None

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of any module. A ReLU that the layer had taken over is a module of its own again."""
        self.give_back_relu()
        return super().register_forward_hook(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"bias={self.bias is not None}, num_levels={self.num_levels}, granularity={self.granularity!r}, "
            f"precision={self.precision!r}, execution={self.execution!r}" + (", relu=True" if self.relu else "")
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def _check_input(self, x: Tensor) -> None:
        raise NotImplementedError

    def _geometry(self) -> Geometry:
        """As the op takes it, on what :meth:`_prepared_input` gives."""
        raise NotImplementedError

    def _prepared_input(self, x: Tensor) -> Tensor:
        """x in the shape that the op takes, with that padding which the op does not make itself."""
        return x

    def _finished_output(self, y: Tensor) -> Tensor:
        """What the op gives, in the shape of the layer's output."""
        return y

    def _call(self, x: Tensor) -> PackedCall:
        geometry = self._geometry()
        return PackedCall(x, self.codes, self.levels, self.bias, geometry, self.precision, None, self.relu)

    def _run_checked(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            self.give_back_relu()  # whoever has the graph may look at what comes before it
            return node_of(self, x)
        self._check_input(x)
        if not is_plain([x]) or (x.requires_grad and torch.is_grad_enabled()):
            # Codes and levels go into the graph: what runs it makes its layout of them, and sees them change.
            arguments = self._call(self._prepared_input(x))
            return self._finished_output(call(self.op, arguments, _name_of(self._execution)))
        prepared = self._prepare()
        backend, arguments = self.backend_for(x)
        if backend.bind is None or not x.is_cpu:
            return self._finished_output(backend.run(arguments))
        run = backend.bind(arguments)
        if arguments.codes is prepared.codes and arguments.levels is prepared.levels:
            if len(prepared.plans) >= MAX_PLANS:
                prepared.plans.clear()
            shaped = lambda x, bias: self._finished_output(run(self._prepared_input(x), bias))  # noqa: E731
            prepared.plans[x.dtype, x.shape] = run if arguments.x is x else shaped
        return self._finished_output(run(arguments.x, arguments.bias))

    def _is_current(self, prepared: Prepared) -> bool:
        return (
            prepared.codes is self._buffers["codes"]
            and prepared.levels is self._buffers["levels"]
            and prepared.codes_version == version_of(prepared.codes)
            and prepared.levels_version == version_of(prepared.levels)
            and prepared.threads == torch.get_num_threads()
        )

    def _prepare(self) -> Prepared:
        """What there is, where it is of the present buffers and threads; else a new one."""
        prepared = self._prepared
        if prepared is None or not self._is_current(prepared):
            codes, levels = self.codes, self.levels
            counted = not (codes.is_inference() or levels.is_inference())
            versions = version_of(codes), version_of(levels)
            prepared = Prepared(codes, levels, counted, *versions, torch.get_num_threads(), {}, {})
            self._prepared = prepared
        return prepared


def _name_of(execution: str) -> str | None:
    """The backend that is asked for: "packed" leaves it to the choice among those that multiply codes."""
    return "dense" if execution == "dense" else None


def check_execution(execution: str) -> None:
    """Raises ValueError where ``execution`` is not one of :data:`EXECUTIONS`."""
    check_choice("execution", execution, EXECUTIONS)
