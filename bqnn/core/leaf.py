"""What a quantized layer is to those who read networks: one node to torch.fx, and nothing to torch.jit.script."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy


def node_of(layer: nn.Module, x: Proxy, args: tuple[Any, ...] | None = None, kwargs: Any = None) -> Any:
    """The call of ``layer`` with ``x``, or with ``args`` and ``kwargs`` where ``x`` is one of several, as a node of the
    graph that is being traced.

    torch.fx takes torch's own layers for the leaves of its graphs, and follows all others into their forward, where
    there is nothing that a symbol could go through: kernels and checks look at sizes. For who traces, fx passes and
    feature extractors, a quantized layer is what the layer was that it stands for.
    """
    path = x.tracer.path_of_module(layer)  # type: ignore[attr-defined]
    return x.tracer.create_proxy("call_module", path, (x,) if args is None else args, kwargs or {})


class NotScriptable:
    """A module whose Python is more than torch.jit.script reads."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script can not read a {type(self).__name__}; torch.export, torch.compile and torch.jit.trace "
            "capture it"
        )
