"""Pooling, and what moves numbers: concatenations, padding, slices, other shapes; softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bqnn.engine.graph import Shape, Value
from bqnn.engine.lowering.call import Call, Unlowered
from bqnn.engine.lowering.layers import pair


def max_pool2d(call: Call) -> str:
    kernel, stride = _windows(call)
    attributes = {
        "kernel": kernel,
        "stride": stride,
        "padding": pair(call["padding"]),
        "dilation": pair(call["dilation"]),
        "ceil_mode": int(call["ceil_mode"]),
    }
    return call.emit("max_pool2d", [_image(call).name], None, attributes)


def max_pool2d_with_indices(call: Call) -> None:
    _image(call)
    call.gives([lambda taker: max_pool2d(taker.of(call)), _no_indices])


def _no_indices(_: Call) -> str:
    raise Unlowered("the engine has no indices of maxima")


def adaptive_max_pool2d(call: Call) -> None:
    size = pair(call["output_size"])
    _windows_of(call, size)
    call.gives([lambda taker: _largest(taker.of(call), size), _no_indices])


def largest(call: Call) -> str:
    """amax over height and width."""
    x = _image(call)
    if sorted(each % 4 for each in call["dim"]) != [2, 3]:
        raise Unlowered("the engine has maxima over height and width alone")
    if call["keepdim"]:
        return _largest(call, (1, 1))
    return _reshaped(call, _largest(call, (1, 1), (x.shape[0], 1, 1)))


def _largest(call: Call, size: tuple[int, int], shape: Shape | None = None) -> str:
    kernel = _windows_of(call, size)
    attributes = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "dilation": (1, 1), "ceil_mode": 0}
    return call.emit("max_pool2d", [call.value().name], shape, attributes)


def _windows_of(call: Call, size: tuple[int, int]) -> tuple[int, int]:
    """The windows, alike and side by side, of an adaptive pool."""
    _, height, width = _image(call).shape
    if height % size[0] or width % size[1]:
        raise Unlowered("its windows are not alike")
    return height // size[0], width // size[1]


def avg_pool2d(call: Call) -> str:
    kernel, stride = _windows(call)
    attributes = {
        "kernel": kernel,
        "stride": stride,
        "padding": pair(call["padding"]),
        "ceil_mode": int(call["ceil_mode"]),
        "count_include_pad": int(call["count_include_pad"]),
        "divisor": call["divisor_override"] or 0,
    }
    return call.emit("avg_pool2d", [_image(call).name], None, attributes)


def adaptive_avg_pool2d(call: Call) -> str:
    return call.emit("adaptive_avg_pool2d", [_image(call).name], None, {"size": call.shape()[1:]})


def mean(call: Call) -> str:
    x = _image(call)
    dimensions = [] if not call.given("dim") else sorted(each % 4 for each in call["dim"])
    if dimensions != [2, 3]:
        raise Unlowered("the engine has means over height and width alone")
    if call["keepdim"]:
        return call.emit("adaptive_avg_pool2d", [x.name], None, {"size": (1, 1)})
    pooled = call.emit("adaptive_avg_pool2d", [x.name], (x.shape[0], 1, 1), {"size": (1, 1)})
    return _reshaped(call, pooled)


def concatenate(call: Call) -> str:
    values = [call.value(node) for node in call.node_of("tensors")]
    ranks = {len(value.shape) for value in values}
    if len(ranks) != 1 or call["dim"] % (1 + max(ranks)) != 1:
        raise Unlowered("the engine concatenates along channels alone")
    return values[0].name if len(values) == 1 else call.emit("cat", [value.name for value in values])


def pad(call: Call) -> str:
    x = call.value()
    if call.has("mode") and call["mode"] != "constant":
        raise Unlowered(f"the engine has no padding of mode {call['mode']}")
    sides = list(call["pad"])
    rank = len(x.shape)
    # From the last dimension on, a pair each; those of the batch come last.
    sides += [0] * (2 * rank - len(sides))
    if any(sides[2 * rank :]):
        raise Unlowered("it pads the batch")
    if min(sides) < 0:
        raise Unlowered("the engine has no negative padding")
    if not any(sides):
        return x.name
    low, high = (tuple(sides[first : 2 * rank : 2][::-1]) for first in (0, 1))
    value = float(call["value"]) if call.given("value") else 0.0
    return call.emit("pad", [x.name], None, {"low": low, "high": high, "value": value})


def slice_(call: Call) -> str:
    x = call.value()
    dimension = call["dim"] % (1 + len(x.shape))
    if dimension == 0:
        # The size of the batch may stand at its end; what gives the whole batch has its shape.
        if call["step"] == 1 and call["start"] in (None, 0) and call.shape() == x.shape:
            return x.name
        raise Unlowered("it takes a part of the batch")
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(x.shape[dimension - 1])
    return _sliced(call, x, dimension - 1, start, stop, step)


def narrow(call: Call) -> str:
    x = call.value()
    dimension = call["dim"] % (1 + len(x.shape))
    if dimension == 0:
        raise Unlowered("it takes a part of the batch")
    start = call["start"] % x.shape[dimension - 1] if call["start"] < 0 else call["start"]
    return _sliced(call, x, dimension - 1, start, start + call["length"], 1)


def _sliced(call: Call, x: Value, axis: int, start: int, stop: int, step: int) -> str:
    """A slice of one axis."""
    if (start, stop, step) == (0, x.shape[axis], 1):
        return x.name
    starts, stops, steps = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
    starts[axis], stops[axis], steps[axis] = start, stop, step
    attributes = {"start": tuple(starts), "stop": tuple(stops), "step": tuple(steps)}
    return call.emit("slice", [x.name], None, attributes)


def split(call: Call) -> None:
    """split, split_with_sizes and chunk: a slice for each tensor that is taken."""
    x, start = call.value(), 0
    dimension = call["dim"] % (1 + len(x.shape))
    if dimension == 0:
        raise Unlowered("it takes the batch apart")
    elements: list[Callable[[Call], str]] = []
    for piece in call.node.meta["val"]:
        size = piece.shape[dimension]
        elements.append(partial(_piece, x=x, axis=dimension - 1, start=start, stop=start + size))
        start += size
    call.gives(elements)


def _piece(call: Call, x: Value, axis: int, start: int, stop: int) -> str:
    return _sliced(call, x, axis, start, stop, 1)


def element(call: Call) -> str:
    return call.element()(call)


def reshape(call: Call) -> str:
    x = call.value()
    return x.name if call.shape() == x.shape else _reshaped(call, x.name)


def softmax(op: str) -> Any:
    def lower(call: Call) -> str:
        x = call.value()
        if call["dim"] % (1 + len(x.shape)) != 1:
            raise Unlowered("the engine has it over channels alone")
        return call.emit(op, [x.name])

    return lower


def _image(call: Call) -> Value:
    x = call.value()
    if len(x.shape) != 3:
        raise Unlowered("it takes no images")
    return x


def _windows(call: Call) -> tuple[tuple[int, int], tuple[int, int]]:
    kernel = pair(call["kernel_size"])
    return kernel, pair(call["stride"]) if call["stride"] else kernel


def _reshaped(call: Call, x: str) -> str:
    return call.emit("reshape", [x], None, {"shape": call.shape()})


TABLE = {
    "aten::max_pool2d": max_pool2d,
    "aten::max_pool2d_with_indices": max_pool2d_with_indices,
    "aten::adaptive_max_pool2d": adaptive_max_pool2d,
    "aten::amax": largest,
    "aten::avg_pool2d": avg_pool2d,
    "aten::adaptive_avg_pool2d": adaptive_avg_pool2d,
    "aten::_adaptive_avg_pool2d": adaptive_avg_pool2d,
    "aten::mean": mean,
    "aten::cat": concatenate,
    "aten::concat": concatenate,
    "aten::concatenate": concatenate,
    "aten::pad": pad,
    "aten::constant_pad_nd": pad,
    "aten::slice": slice_,
    "aten::narrow": narrow,
    "aten::split": split,
    "aten::split_with_sizes": split,
    "aten::chunk": split,
    "aten::flatten": reshape,
    "aten::view": reshape,
    "aten::_unsafe_view": reshape,
    "aten::reshape": reshape,
    "aten::squeeze": reshape,
    "aten::unsqueeze": reshape,
    "aten::unflatten": reshape,
    "aten::softmax": softmax("softmax"),
    "aten::_softmax": softmax("softmax"),
    "aten::log_softmax": softmax("log_softmax"),
    "aten::_log_softmax": softmax("log_softmax"),
}
