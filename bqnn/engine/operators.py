"""The operators of a graph: what each computes, which attributes it has, and the shape that it gives.

Shapes are of one image: [C, H, W] or [F]. ``act`` is the node's activation, applied last, elementwise; an operator that
is described without it has none.

W is coded, tensors "codes" (uint8 [N, packed_width(K, M)]) and "levels" (float32 [1 or N, M]), or dense, "weight"
(float32 [N, K]), in the order of nn.Conv2d's weight, flattened. Where x is uint8, "integers" (int8 [1 or N, M]) take
the place of levels, or "weight" is int8, both within -64..64. "scale" (float32 [N], 1 where it is absent; always there
where x is uint8) and "bias" (float32 [N], 0 where it is absent) belong to the output channels.

What happens to uint8 values is bit for bit the same in every backend; all operations are of float32, each rounded by
itself. A value x stands for ``real(x) = float(x - zero) * scale``, and y is stored as
``clamp(rint(y * float32(1 / scale)) + zero, 0, 255)``, ties to even. Scales and zeros of conv2d, linear, affine,
activation, add, sub and mul, of uint8 inputs and y and with no activation but clamp, are folded: what is stored is
``clamp(rint(q * scale' + bias' + r * ratio'), low', high')``, where q and r are stored numbers, or q the exact sum of
products of them, or of mul the product of two less their zeros; the primed numbers are computed in float64
(:func:`bqnn.engine.reference.fold_bytes`).

=====================  =================================================================================================
conv2d                 x [C, H, W] and perhaps residual [N, Ho, Wo]; padding is (top, bottom, left, right), of zeros.
                       act(scale * (W * x) + bias + residual). Where x is uint8, ``W * x`` is the exact sum of
                       integer * (x - zero) as float32, and the residual is its real number.
linear                 x of any shape, flattened in the order [C, H, W], and perhaps residual [N]; the same, [N].
affine                 act(x * scale + shift), both float32 [C] (or [F]).
activation             act(x); "none" changes the dtype alone.
add, sub, mul          act(a + b), act(a - b), act(a * b); each dimension of b is a's, or 1.
max_pool2d             As torch's; what it pads is minus infinity.
avg_pool2d             As torch's; divisor 0 stands for none. Of uint8: (float(sum of (x - zero)) * scale) / divisor.
adaptive_avg_pool2d    As torch's, to ``size``; means of uint8 as in avg_pool2d.
cat                    Two or more inputs, along channels.
pad                    Puts ``low`` and ``high`` elements of ``value`` around each dimension.
slice                  start, stop and step of each dimension.
reshape                To ``shape``, in the order [C, H, W].
softmax, log_softmax   Over the first dimension; float32 of real(x), and float32 comes out.
=====================  =================================================================================================

max_pool2d, cat, pad, slice and reshape move numbers: inputs and output have one dtype, scale and zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bqnn.engine.node import Node, Shape

MOST = 2**31 - 1
"""Of sizes, of a value's elements and of sums of integers."""
MAX_WEIGHT = 64
"""The largest absolute integer of a quantized weight."""

AS_RANK = -1


@dataclass(frozen=True)
class Integers:
    """An attribute of integers: one by itself (count 0), a tuple of ``count``, or one for each dimension (AS_RANK)."""

    count: int = 0
    least: int = 0
    most: int = MOST

    def check(self, name: str, value: Any, rank: int) -> None:
        count = rank if self.count == AS_RANK else self.count
        if count and not (isinstance(value, tuple) and len(value) == count):
            raise ValueError(f"{name} must be a tuple of {count} integers")
        for each in value if count else (value,):
            if type(each) is not int or not self.least <= each <= self.most:
                raise ValueError(f"{name} must hold integers from {self.least} to {self.most}")


FLAG = Integers(most=1)
PAIR, SIZES = Integers(2, least=0), Integers(2, least=1)
OF_DIMENSIONS = Integers(AS_RANK)

Rule = Callable[[Node, Sequence[Shape]], Shape]


@dataclass(frozen=True)
class Operator:
    """A row of the table."""

    shape: Rule
    """The output's shape from the inputs', once attributes are known to be sound; raises ValueError."""
    inputs: tuple[int, int] = (1, 1)
    """The least and the most."""
    attributes: Mapping[str, Integers | type] = field(default_factory=dict)
    """``float`` and ``tuple`` stand for what the shape rule looks at itself."""
    activates: bool = False
    """Whether it may have an activation."""
    moves: bool = False
    """Whether inputs and output have one dtype, scale and zero."""


def channels_of(node: Node) -> int:
    """Output channels of a conv2d or linear node."""
    return len(node.tensors["codes"] if "codes" in node.tensors else node.tensors["weight"])


def columns_of(node: Node, x: Shape) -> int:
    """Weights of an output channel of a conv2d or linear node whose input has the shape ``x``."""
    if node.op == "linear":
        return math.prod(x)
    return x[0] // node.attributes["groups"] * math.prod(node.attributes["kernel"])


def output_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    """The shape of what a node gives for inputs of these shapes; looks at operator, attributes and activation.

    Raises:
        ValueError: one of them is wrong, or they do not go together; says what, without naming the node.
    """
    operator = OPERATORS.get(node.op)
    if operator is None:
        raise ValueError("no such operator")
    least, most = operator.inputs
    if not least <= len(inputs) <= most:
        raise ValueError(f"must have {least} to {most} inputs, got {len(inputs)}")
    if set(node.attributes) != set(operator.attributes):
        raise ValueError(f"must have the attributes {', '.join(operator.attributes) or 'none'} and no others")
    for name, kind in operator.attributes.items():
        value = node.attributes[name]
        if isinstance(kind, Integers):
            kind.check(name, value, len(inputs[0]))
        elif type(value) is not kind:
            raise ValueError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if node.activation.name != "none" and not operator.activates:
        raise ValueError("can not have an activation")
    shape = operator.shape(node, inputs)
    if min(shape) < 1 or math.prod(shape) > MOST:
        raise ValueError(f"its output would have the shape {list(shape)}")
    return shape


def _image(x: Shape) -> Shape:
    if len(x) != 3:
        raise ValueError(f"its input must have the shape [C, H, W], got {list(x)}")
    return x


def _conv2d(node: Node, inputs: Sequence[Shape]) -> Shape:
    channels, *size = _image(inputs[0])
    kernel, stride, dilation, groups = (node.attributes[name] for name in ("kernel", "stride", "dilation", "groups"))
    padding = node.attributes["padding"]
    outputs = channels_of(node)
    if channels % groups or outputs % groups:
        raise ValueError(f"groups must divide {channels} and {outputs} channels, got {groups}")
    out = [outputs]
    for axis in (0, 1):
        padded = size[axis] + sum(padding[2 * axis : 2 * axis + 2])
        out.append((padded - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1)
    return _with_residual(tuple(out), inputs)


def _linear(node: Node, inputs: Sequence[Shape]) -> Shape:
    return _with_residual((channels_of(node),), inputs)


def _with_residual(shape: Shape, inputs: Sequence[Shape]) -> Shape:
    if len(inputs) == 2 and inputs[1] != shape:
        raise ValueError(f"its residual must have the shape {list(shape)}, got {list(inputs[1])}")
    return shape


def _same(node: Node, inputs: Sequence[Shape]) -> Shape:
    return inputs[0]


def _binary(node: Node, inputs: Sequence[Shape]) -> Shape:
    a, b = inputs
    if len(a) != len(b) or any(each not in (size, 1) for size, each in zip(a, b)):
        raise ValueError(f"each dimension of the second input must be the first's or 1, got {list(a)} and {list(b)}")
    return a


def _pool(node: Node, inputs: Sequence[Shape]) -> Shape:
    channels, *size = _image(inputs[0])
    attributes = node.attributes
    out = [channels]
    for axis in (0, 1):
        stride, padding = attributes["stride"][axis], attributes["padding"][axis]
        dilation = attributes["dilation"][axis] if "dilation" in attributes else 1
        kernel = attributes["kernel"][axis]
        reach = dilation * (kernel - 1) + 1
        # Every window then holds an element of the image.
        if padding > kernel // 2 or (padding and dilation > size[axis]):
            raise ValueError("padding must be at most half of the kernel, and dilation within an image that is padded")
        rest = size[axis] + 2 * padding - reach
        count = (-(-rest // stride) if attributes["ceil_mode"] else rest // stride) + 1
        # A window that would begin in the padding at the end is left out.
        if attributes["ceil_mode"] and (count - 1) * stride >= size[axis] + padding:
            count -= 1
        out.append(count)
    return tuple(out)


def _adaptive(node: Node, inputs: Sequence[Shape]) -> Shape:
    return (_image(inputs[0])[0], *node.attributes["size"])


def _cat(node: Node, inputs: Sequence[Shape]) -> Shape:
    if any(each[1:] != inputs[0][1:] for each in inputs):
        raise ValueError(f"all inputs must have one height and width, got {[list(each) for each in inputs[:8]]}")
    return (sum(each[0] for each in inputs), *inputs[0][1:])


def _pad(node: Node, inputs: Sequence[Shape]) -> Shape:
    if math.isnan(node.attributes["value"]):
        raise ValueError("value must be a number, got nan")
    return tuple(map(sum, zip(inputs[0], node.attributes["low"], node.attributes["high"])))


def _slice(node: Node, inputs: Sequence[Shape]) -> Shape:
    start, stop, step = (node.attributes[name] for name in ("start", "stop", "step"))
    if any(last > size for last, size in zip(stop, inputs[0])):
        raise ValueError(f"stop must be within the shape {list(inputs[0])}, got {list(stop)}")
    return tuple(-(-(last - first) // each) for first, last, each in zip(start, stop, step))


def _reshape(node: Node, inputs: Sequence[Shape]) -> Shape:
    shape: Shape = node.attributes["shape"]
    Integers(3 if len(shape) == 3 else 1, least=1).check("shape", shape, 0)
    if math.prod(shape) != math.prod(inputs[0]):
        raise ValueError(f"shape must have the elements of {list(inputs[0])}, got {list(shape)}")
    return shape


_WINDOWS = {"kernel": SIZES, "stride": SIZES, "padding": PAIR, "ceil_mode": FLAG}

# In the order in which csrc/cpu/engine/graph.h numbers them.
OPERATORS: dict[str, Operator] = {
    "conv2d": Operator(
        _conv2d,
        (1, 2),
        {
            "kernel": SIZES,
            "stride": SIZES,
            "padding": Integers(4),
            "dilation": SIZES,
            "groups": Integers(least=1),
        },
        activates=True,
    ),
    "linear": Operator(_linear, (1, 2), activates=True),
    "affine": Operator(_same, activates=True),
    "activation": Operator(_same, activates=True),
    "add": Operator(_binary, (2, 2), activates=True),
    "sub": Operator(_binary, (2, 2), activates=True),
    "mul": Operator(_binary, (2, 2), activates=True),
    "max_pool2d": Operator(_pool, attributes={**_WINDOWS, "dilation": SIZES}, moves=True),
    "avg_pool2d": Operator(_pool, attributes={**_WINDOWS, "count_include_pad": FLAG, "divisor": Integers()}),
    "adaptive_avg_pool2d": Operator(_adaptive, attributes={"size": SIZES}),
    "cat": Operator(_cat, (2, MOST), moves=True),
    "pad": Operator(_pad, attributes={"low": OF_DIMENSIONS, "high": OF_DIMENSIONS, "value": float}, moves=True),
    "slice": Operator(
        _slice,
        attributes={"start": OF_DIMENSIONS, "stop": OF_DIMENSIONS, "step": Integers(AS_RANK, least=1)},
        moves=True,
    ),
    "reshape": Operator(_reshape, attributes={"shape": tuple}, moves=True),
    "softmax": Operator(_same),
    "log_softmax": Operator(_same),
}
