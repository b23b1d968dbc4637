"""A layer as one node of a graph that torch.fx traces."""

from __future__ import annotations

from typing import Any

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
