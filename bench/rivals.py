"""Rivals that are no nn.Module: products with 4- and 2-bit weights. Each comes with weights of its own, which it can
represent, and with what it should give for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

ATEN_BLOCK, ORT_BLOCK = 32, 128
"""Of 32 and 128, the size of a block of weights at which each rival was the faster."""


def aten_int4(x: Tensor, outputs: int) -> tuple[Callable[[], Tensor], Tensor]:
    """PyTorch's int4 product in bfloat16; in float32 it is 30 times slower."""
    rows, inputs = x.shape
    q, scale = _random_weight(outputs, inputs, 4, ATEN_BLOCK)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.view(outputs, inputs).int(), 1)
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous().bfloat16()
    half = x.bfloat16()
    dense = (q.double() - 8) * scale.bfloat16().double().unsqueeze(2)
    expected = half.double() @ dense.view(outputs, inputs).t()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, ATEN_BLOCK, scale_and_zero), expected


def onnxruntime_bits(x: Tensor, outputs: int, bits: int, level: int) -> tuple[Callable[[], Tensor], Tensor]:
    """ONNX Runtime's MatMulNBits; ``level`` is its accuracy_level, 0 computes in float32 and 4 in int8."""
    ort = pytest.importorskip("onnxruntime")
    rows, inputs = x.shape
    q, scale = _random_weight(outputs, inputs, bits, ORT_BLOCK)
    digits = q.view(outputs, inputs // ORT_BLOCK, -1, 8 // bits).int()
    packed = (digits << (bits * torch.arange(8 // bits))).sum(3).to(torch.uint8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its idle threads must not slow the others
    model = _matmul_bits_model(outputs, inputs, bits, level, packed, scale)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    dense = (q.double() - 2 ** (bits - 1)) * scale.double().unsqueeze(2)
    expected = x.double() @ dense.view(outputs, inputs).t()
    return lambda: torch.from_numpy(session.run(None, feed)[0]), expected


def _random_weight(outputs: int, inputs: int, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Unsigned integers [outputs, blocks, block] and scales [outputs, blocks]."""
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(2**bits, (outputs, inputs // block, block), generator=generator, dtype=torch.uint8)
    return q, 0.5 + torch.rand(outputs, inputs // block, generator=generator)


def _matmul_bits_model(outputs: int, inputs: int, bits: int, level: int, packed: Tensor, scale: Tensor) -> bytes:
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    sizes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": bits, "block_size": ORT_BLOCK, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft", **sizes)
    weights = [
        helper.make_tensor("codes", types.UINT8, packed.shape, packed.numpy().tobytes(), raw=True),
        helper.make_tensor("scale", types.FLOAT, [scale.numel()], scale.numpy().tobytes(), raw=True),
    ]
    ends = [
        helper.make_tensor_value_info(name, types.FLOAT, ["rows", size])
        for name, size in (("x", inputs), ("y", outputs))
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
