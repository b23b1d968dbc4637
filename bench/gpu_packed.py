"""Packed products on a GPU against cuBLAS and cuDNN in bfloat16: CUDA graphs of many calls over rotating weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import bqnn
from bench.gpu_timing import costs
from bench.gpu_training import Asked, Row

CALLS = 50
ROTATED_BYTES = 256 << 20  # of packed weights that take turns: more than a second-level cache holds
SIZES, BATCHES = (4096, 8192, 16384), (1, 8, 16, 64, 128, 1024)
NUM_LEVELS = 3
# Times faster than cuBLAS in bfloat16, by batch.
FASTER = {
    4096: (2.5, 2.5, 2.0, 1.3, 1.0, 0.95),
    8192: (5.0, 5.0, 4.5, 2.2, 1.3, 0.95),
    16384: (6.0, 6.0, 5.0, 2.4, 1.3, 0.95),
}
CONV = (128, 128, 3, 32, 128)  # inputs, channels, kernel, image, batch
CONV_FASTER = 0.85
ALLOWED = {"bf16": 2e-2, "int8": 5e-2}  # root mean square, relative to the product in float32


def asked() -> dict[str, list[Asked]]:
    """By case: what is asked of the better precision."""
    rows = {f"packed_linear-{n}-B{b}": [Asked("bf16", f)] for n in SIZES for b, f in zip(BATCHES, FASTER[n])}
    return {**rows, "packed_conv2d": [Asked("bf16", CONV_FASTER)]}


def linear_rows(size: int, batch: int, device: torch.device) -> Iterator[Row]:
    """One layer without bias, all precisions, against nn.Linear in bfloat16."""
    x = torch.randn(batch, size, device=device).bfloat16()
    yield from _rows(f"packed_linear-{size}-B{batch}", lambda: nn.Linear(size, size, bias=False), x, size * size)


def conv2d_rows(device: torch.device) -> Iterator[Row]:
    """One 3x3 layer without bias, channels-last."""
    inputs, channels, kernel, image, batch = CONV
    x = torch.randn(batch, inputs, image, image, device=device).bfloat16().to(memory_format=torch.channels_last)
    layer = lambda: nn.Conv2d(inputs, channels, kernel, padding=1, bias=False)  # noqa: E731
    yield from _rows("packed_conv2d", layer, x, inputs * channels * kernel * kernel)


@torch.inference_mode()
def _rows(case: str, make: Callable[[], nn.Module], x: torch.Tensor, weights: int) -> Iterator[Row]:
    copies = max(1, min(CALLS, ROTATED_BYTES * 4 // weights)) if x.is_cuda else 1
    torch.manual_seed(0)
    quantized = bqnn.convert(nn.Sequential(make()), NUM_LEVELS).eval()
    calls, errors = {}, {}
    for precision in ALLOWED:
        packed = [bqnn.pack(quantized, precision=precision).to(x.device) for _ in range(copies)]
        expected = F.linear if x.dim() == 2 else F.conv2d
        dense = packed[0][0].decode().to(x.device)
        exact = expected(x.float(), dense, **({} if x.dim() == 2 else {"padding": 1}))
        found = packed[0](x).float()
        errors[precision] = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        assert errors[precision] <= ALLOWED[precision], f"{case}: {precision} is {errors[precision]:.2g} off"
        calls[precision] = _replayed(packed, x)
    copies = max(1, min(CALLS, ROTATED_BYTES // (2 * weights))) if x.is_cuda else 1
    dense = [make().to(x.device, torch.bfloat16) for _ in range(copies)]
    if x.dim() == 4:
        dense = [layer.to(memory_format=torch.channels_last) for layer in dense]
    calls["bf16 dense"] = _replayed(dense, x)
    for variant, cost in costs(calls, x.device).items():
        yield Row(case, variant, cost.seconds / CALLS, cost.peak_bytes, errors.get(variant))


def _replayed(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], object]:
    """CALLS calls, the layers in turns, as one CUDA graph; on the CPU as a loop."""

    def loop() -> None:
        for i in range(CALLS):
            layers[i % len(layers)](x)

    if not x.is_cuda:
        return loop
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay
