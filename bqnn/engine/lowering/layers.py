"""Products with weights, and normalization with constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bqnn.engine.graph import NO_ACTIVATION, RELU
from bqnn.engine.lowering.call import Call, Unlowered


def conv2d(call: Call) -> str:
    weight = call.constant("weight")
    if call.has("transposed") and call["transposed"]:
        raise Unlowered("the engine has no transposed convolution")
    channels, _, *kernel = weight.shape
    tensors = {"weight": _floats(weight).view(channels, -1)} | _bias(call)
    padding = _sides(call["padding"], kernel, call["dilation"])
    return _convolution(call, call.value("input"), kernel, padding, tensors, False)


def packed_conv2d(call: Call) -> str:
    padding = _sides(call["padding"], call["kernel_size"], call["dilation"])
    return _convolution(call, call.value("x"), call["kernel_size"], padding, _coded(call), call["relu"])


def _convolution(
    call: Call, x: Any, kernel: Sequence[int], padding: list[int], tensors: dict[str, Tensor], relu: bool
) -> str:
    if len(x.shape) != 3:
        raise Unlowered("it takes no images")
    attributes = {
        "kernel": tuple(kernel),
        "stride": pair(call["stride"]),
        "padding": tuple(padding),
        "dilation": pair(call["dilation"]),
        "groups": call["groups"],
    }
    return call.emit("conv2d", [x.name], None, attributes, tensors, RELU if relu else NO_ACTIVATION)


def linear(call: Call) -> str:
    return _linear(call, "input", {"weight": _floats(call.constant("weight"))} | _bias(call), False)


def matmul(call: Call) -> str:
    """x @ weight, and bias + x @ weight of addmm, with a constant matrix."""
    x, matrix = "mat1" if call.has("mat1") else "self", "other" if call.has("other") else "mat2"
    bias = {}
    if call.has("mat1"):
        if call["beta"] != 1 or call["alpha"] != 1:
            raise Unlowered("it scales what it adds")
        channels = call.shape()[0]
        bias = {"bias": _floats(call.constant("self").expand(1, channels).reshape(-1))}
    weight = call.constant(matrix)
    if weight.dim() != 2:
        raise Unlowered("its weight is no matrix")
    return _linear(call, x, {"weight": _floats(weight.t())} | bias, False)


def packed_linear(call: Call) -> str:
    return _linear(call, "x", _coded(call), call["relu"])


def _linear(call: Call, x: str, tensors: dict[str, Tensor], relu: bool) -> str:
    value = call.value(x)
    if len(value.shape) != 1 or len(call.shape()) != 1:
        raise Unlowered("it takes more than one row an image")
    return call.emit("linear", [value.name], None, {}, tensors, RELU if relu else NO_ACTIVATION)


def batch_norm(call: Call) -> str:
    if call["training"]:
        raise Unlowered("it takes the statistics of the batch")
    return _normalized(call)


def batch_norm_with_statistics(call: Call) -> None:
    """As batch_norm; it gives the statistics of the batch too, which are empty and which nobody takes."""

    def statistics(_: Call) -> str:
        raise Unlowered("it takes statistics of a batch")

    call.value("input")
    call.gives([lambda taker: _normalized(taker.of(call)), statistics, statistics])


def _normalized(call: Call) -> str:
    x = call.value("input")
    mean, variance = (call.constant(name).double() for name in ("running_mean", "running_var"))
    scale = 1 / (variance + call["eps"]).sqrt()
    if call.given("weight"):
        scale = scale * call.constant("weight").double()
    shift = -mean * scale
    if call.given("bias"):
        shift = shift + call.constant("bias").double()
    return affine(call, x.name, scale, shift)


def affine(call: Call, x: str, scale: Tensor, shift: Tensor, shape: Any = None) -> str:
    """x * scale + shift with float64 numbers [C]; ``shape`` as of :meth:`Call.emit`."""
    tensors = {"scale": _floats(scale), "shift": _floats(shift)}
    if not all(bool(each.isfinite().all()) for each in tensors.values()):
        raise Unlowered("its numbers are not finite")
    return call.emit("affine", [x], shape, {}, tensors)


def pair(value: Any) -> tuple[int, int]:
    """One integer, a list of one or a list of two, as two."""
    numbers = [value] if isinstance(value, int) else list(value)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def _sides(padding: Any, kernel: Sequence[int], dilation: Any) -> list[int]:
    """Top, bottom, left and right."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        sides = []
        for size, step in zip(kernel, pair(dilation)):
            total = step * (size - 1)
            sides += [total // 2, total - total // 2]
        return sides
    height, width = pair(padding)
    return [height, height, width, width]


def _floats(tensor: Tensor) -> Tensor:
    """A copy, which later changes of the network's own tensor do not reach."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _bias(call: Call) -> dict[str, Tensor]:
    return {"bias": _floats(call.constant("bias"))} if call.given("bias") else {}


def _coded(call: Call) -> dict[str, Tensor]:
    codes, levels = (
        call.constant("codes").clone(memory_format=torch.contiguous_format),
        _floats(call.constant("levels")),
    )
    return {"codes": codes, "levels": levels} | _bias(call)


TABLE = {
    "aten::conv2d": conv2d,
    "aten::convolution": conv2d,
    "bqnn::packed_conv2d": packed_conv2d,
    "aten::linear": linear,
    "aten::matmul": matmul,
    "aten::mm": matmul,
    "aten::addmm": matmul,
    "bqnn::packed_linear": packed_linear,
    "aten::batch_norm": batch_norm,
    "aten::_native_batch_norm_legit_no_training": batch_norm_with_statistics,
}
