"""What a graph is made of: values, and the nodes that write them.

Shapes are of one image, without the batch: [channels, height, width] or [features]. A value is float32, or uint8 where
it is quantized: then it stands for (stored - zero) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]

ACTIVATIONS = (
    "none",
    "clamp",
    "leaky_relu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
)
"""In the order in which csrc/cpu/engine/graph.h numbers them."""


@dataclass(frozen=True)
class Activation:
    """What is applied to a node's outputs, elementwise.

    "clamp" is min(max(x, low), high): ReLU has low 0 and high infinity, ReLU6 and hardtanh have both. "leaky_relu" is
    ``low * x`` where x is negative. The others have no numbers.
    """

    name: str = "none"
    low: float = 0.0
    high: float = 0.0


NO_ACTIVATION = Activation()
RELU = Activation("clamp", 0.0, float("inf"))


@dataclass(frozen=True)
class Value:
    """What a node writes, or an input of the graph."""

    name: str
    shape: Shape
    dtype: str = "float32"
    """ "float32" or "uint8"."""
    scale: float = 1.0
    """Of a quantized value: a positive float32 number."""
    zero: int = 0
    """What stands for 0 in a quantized value, 0 to 255."""


@dataclass(frozen=True)
class Node:
    """One operator; ``bqnn.engine.operators`` says what each computes."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    """Numbers, and tuples of numbers."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    activation: Activation = NO_ACTIVATION
