"""What of a network is at full precision, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bqnn.bayes.choice import LAYERS
from bqnn.core.composed import Composed
from bqnn.core.forms import COMPOSED, is_conv1d_of_transformers
from bqnn.core.posterior import Drawable
from bqnn.core.readers import readers

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((Composed,), "beside the weights of its parts"),
    (_NORMS, "a scale and a shift a channel: few numbers"),
    ((nn.Conv3d, nn.ConvTranspose3d), "no op convolves over three dimensions"),
    ((NonDynamicallyQuantizableLinear,), "part of an attention that is left"),
)


@dataclass(frozen=True)
class LeftModule:
    """A module with parameters of its own at full precision."""

    name: str
    kind: str
    parameters: tuple[str, ...]
    numbers: int
    """How many numbers the parameters have."""
    reason: str
    can_be_asked_for: bool
    """Whether convert takes it where its class is among ``subclasses``."""


def left_modules(net: nn.Module) -> list[LeftModule]:
    """Every module of ``net`` with parameters of its own that is no quantized layer, nor reads the weight of one."""
    read = {(module, name) for module, name, _ in readers(net)}
    found = []
    for name, module in net.named_modules():
        own = {
            key: parameter
            for key, parameter in module._parameters.items()
            if parameter is not None and (module, key) not in read
        }
        if own and not isinstance(module, Drawable):
            numbers = sum(parameter.numel() for parameter in own.values())
            reason, can_be = _reason(module)
            found.append(LeftModule(name, type(module).__name__, tuple(own), numbers, reason, can_be))
    return found


def table(left: list[LeftModule]) -> str:
    """A line for each module."""
    rows = [("left at full precision", "type", "numbers", "parameters: why")]
    rows += [(m.name, m.kind, str(m.numbers), f"{', '.join(m.parameters)}: {m.reason}") for m in left]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)
    return "\n".join(lines)


def _reason(module: Any) -> tuple[str, bool]:
    kind = type(module)
    for kinds, reason in _REASONS:
        if isinstance(module, kinds):
            return reason, False
    if is_conv1d_of_transformers(kind):
        return f"its weight is [in, out]; convert(..., subclasses=[{kind.__name__}]) takes it", True
    base = next((each for each in (*LAYERS, *COMPOSED) if isinstance(module, each)), None)
    if base is kind:
        return "convert takes it: it was skipped, or has come later", False
    if base is not None:
        asked = f"convert(..., subclasses=[{kind.__name__}]) takes it where it computes what that does"
        return f"a subclass of nn.{base.__name__}; {asked}", True
    return "no layer that convert knows", False
