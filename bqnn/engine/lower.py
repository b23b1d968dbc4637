"""lower: a captured network to the engine's operators, call by call; what has none stays torch's, with the reason."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import fx

from bqnn.engine.capture import Captured
from bqnn.engine.lowering import elementwise, layers, shapes
from bqnn.engine.lowering.call import Call, Lowering, Unlowered, name_of

TABLE: Mapping[str, Callable[[Call], str | None]] = layers.TABLE | elementwise.TABLE | shapes.TABLE
"""By the name of an ATen operator, whatever its overload: a function that makes nodes of a call and returns the name of
the value that they give, or None where the call gives several tensors."""


def lower(captured: Captured) -> Lowering:
    """Lowers every call that the engine has an operator for.

    What the engine's calls can take, [batch, C, H, W] or [batch, F] of float32, is a value whoever computes it.
    """
    lowered = Lowering(captured)
    for node in captured.inputs:
        lowered.enter(node)
    for node in captured.nodes:
        call = Call(lowered, node)
        try:
            call.done(_function(node)(call))
        except Unlowered as error:
            lowered.reasons[node] = str(error)
            lowered.enter(node)
    return lowered


def _function(node: fx.Node) -> Callable[[Call], str | None]:
    if node.target is operator.getitem:
        return shapes.element
    function = TABLE.get(name_of(node))
    if function is None:
        raise Unlowered("the engine has no such operator")
    return function
