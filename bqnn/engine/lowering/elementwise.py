"""Activations, arithmetic with tensors and numbers, and what leaves a tensor as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bqnn.engine.graph import RELU, Activation, Shape, Value
from bqnn.engine.lowering.call import Call, Unlowered, name_of
from bqnn.engine.lowering.layers import affine

INFINITY = math.inf
_EXPANSIONS = ("aten::expand", "aten::expand_as")


def activate(call: Call, activation: Activation) -> str:
    x = call.value("input" if call.has("input") else "self")
    return call.emit("activation", [x.name], activation=activation)


def named(name: str) -> Any:
    return lambda call: activate(call, Activation(name))


def relu(call: Call) -> str:
    return activate(call, RELU)


def relu6(call: Call) -> str:
    return _clamped(call, 0.0, 6.0)


def hardtanh(call: Call) -> str:
    return _clamped(call, call["min_val"], call["max_val"])


def clamp(call: Call) -> str:
    return _clamped(call, *(call[name] if call.has(name) and call.given(name) else None for name in ("min", "max")))


def _clamped(call: Call, low: Any, high: Any) -> str:
    low, high = -INFINITY if low is None else float(low), INFINITY if high is None else float(high)
    # torch gives the upper bound where the lower one is above it.
    return activate(call, Activation("clamp", min(low, high), high))


def leaky_relu(call: Call) -> str:
    return activate(call, Activation("leaky_relu", float(call["negative_slope"])))


def gelu(call: Call) -> str:
    return activate(call, Activation("gelu_tanh" if call["approximate"] == "tanh" else "gelu"))


def add(call: Call) -> str:
    return _sum(call, 1, call["alpha"] if call.has("alpha") else 1)


def subtract(call: Call) -> str:
    return _sum(call, 1, -call["alpha"])


def subtract_reversed(call: Call) -> str:
    return _sum(call, -call["alpha"], 1)


def negate(call: Call) -> str:
    return _scaled(call, "self", -1.0)


def _sum(call: Call, left: Any, right: Any) -> str:
    """left * self + right * other; one of the two numbers is 1."""
    if not call.is_value("other"):
        return _scaled(call, "self", left, _numbers(call, "other", call.value("self")) * right)
    if not call.is_value("self"):
        return _scaled(call, "other", right, _numbers(call, "self", call.value("other")) * left)
    a, b = call.value("self"), call.value("other")
    if left != 1:
        a, b, left, right = b, a, right, left
    _check_broadcast(call, a, b)
    if a.shape == call.shape() and right in (1, -1):
        return call.emit("add" if right == 1 else "sub", [a.name, b.name])
    scaled = b.name if right == 1 else _scale(call, b, right)
    first, second = (a.name, scaled) if a.shape == call.shape() else (scaled, a.name)
    return call.emit("add", [first, second])


def multiply(call: Call) -> str:
    for one, other in (("self", "other"), ("other", "self")):
        if not call.is_value(other):
            return _scaled(call, one, _numbers(call, other, call.value(one)))
    a, b = call.value("self"), call.value("other")
    _check_broadcast(call, a, b)
    names = [a.name, b.name] if a.shape == call.shape() else [b.name, a.name]
    return call.emit("mul", names)


def divide(call: Call) -> str:
    if call.has("rounding_mode") and call.given("rounding_mode"):
        raise Unlowered("it rounds")
    if call.is_value("other"):
        raise Unlowered("the engine divides by constants alone")
    return _scaled(call, "self", 1 / _numbers(call, "other", call.value("self")))


def _check_broadcast(call: Call, a: Value, b: Value) -> None:
    shape = call.shape()
    if len(a.shape) != len(b.shape) or shape not in (a.shape, b.shape):
        raise Unlowered(f"shapes {list(a.shape)} and {list(b.shape)} are both spread out")


def _scaled(call: Call, x: str, scale: Any, shift: Any = 0.0) -> str:
    """x * scale + shift, with numbers or tensors [C]."""
    value = call.value(x)
    if call.shape() != value.shape:
        raise Unlowered("it spreads its input out")
    return affine(call, value.name, *_spread(value.shape, scale, shift))


def _scale(call: Call, x: Value, scale: Any) -> str:
    """x * scale, as a value between two calls."""
    scale, shift = _spread(x.shape, scale, 0.0)
    return affine(call, x.name, scale, shift, x.shape)


def _spread(shape: Shape, *numbers: Any) -> list[Tensor]:
    return [torch.as_tensor(each, dtype=torch.float64).expand(shape[0]) for each in numbers]


def _numbers(call: Call, name: str, x: Value) -> Tensor:
    """An argument that is a number, or a constant with one for each channel of ``x``, as float64 [C] or []."""
    if isinstance(call.node_of(name), (int, float)):
        return torch.tensor(float(call[name]), dtype=torch.float64)
    constant = call.constant(name)
    if constant.is_complex():
        raise Unlowered(f"its {name} is complex")
    if constant.numel() == 1:
        return constant.double().reshape(())
    # Aligned at the last dimension, it may have the channels' size where the value's channels are, and else 1.
    dimensions = [1] * (len(x.shape) + 1 - constant.dim()) + list(constant.shape)
    if dimensions != [1, x.shape[0]] + [1] * (len(x.shape) - 1):
        raise Unlowered(f"its {name} is a constant {list(constant.shape)}, not one number a channel")
    return constant.double().reshape(-1)


def unchanged(call: Call) -> str:
    """Gives what it takes: the same float32 numbers."""
    x = call.value("input" if call.has("input") else "self")
    if call.shape() != x.shape:
        raise Unlowered("it gives another shape")
    return x.name


def expand(call: Call) -> str:
    """A value that is spread out for sums and products alone: these spread it out themselves."""
    x, shape = call.value(), call.shape()
    if shape == x.shape:
        return x.name
    for user in call.node.users:
        others = [each for each in user.all_input_nodes if each is not call.node]
        whole = [each for each in others if call.is_whole(each, shape) and name_of(each) not in _EXPANSIONS]
        if TABLE.get(name_of(user)) not in (add, subtract, multiply) or len(whole) != 1:
            raise Unlowered("the engine spreads out what is added to another value or multiplied with it alone")
    return x.name


def dropout(call: Call) -> str:
    if call["train"] and call["p"]:
        raise Unlowered("it drops at random")
    return unchanged(call)


TABLE: dict[str, Callable[[Call], str]] = {
    "aten::relu": relu,
    "aten::relu6": relu6,
    "aten::hardtanh": hardtanh,
    "aten::clamp": clamp,
    "aten::clip": clamp,
    "aten::clamp_min": clamp,
    "aten::clamp_max": clamp,
    "aten::leaky_relu": leaky_relu,
    "aten::gelu": gelu,
    "aten::hardswish": named("hardswish"),
    "aten::hardsigmoid": named("hardsigmoid"),
    "aten::sigmoid": named("sigmoid"),
    "aten::silu": named("silu"),
    "aten::tanh": named("tanh"),
    "aten::add": add,
    "aten::sub": subtract,
    "aten::subtract": subtract,
    "aten::rsub": subtract_reversed,
    "aten::neg": negate,
    "aten::mul": multiply,
    "aten::multiply": multiply,
    "aten::div": divide,
    "aten::divide": divide,
    "aten::true_divide": divide,
    "aten::dropout": dropout,
    "aten::feature_dropout": dropout,
    "aten::alpha_dropout": dropout,
    "aten::alias": unchanged,
    "aten::contiguous": unchanged,
    "aten::clone": unchanged,
    "aten::detach": unchanged,
    "aten::lift_fresh_copy": unchanged,
    "aten::to": unchanged,
    "aten::_to_copy": unchanged,
    "aten::type_as": unchanged,
    "aten::expand": expand,
    "aten::expand_as": expand,
}
