"""Which elements of an image the windows of an average cover, and by what their sums are divided."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.engine.node import Node

Span = tuple[int, int, int]
"""Of a window along one axis: its first element, the one after its last, and the elements that it counts as."""


def window_spans(node: Node, size: int, axis: int, count: int) -> list[Span]:
    """The ``count`` windows of an avg_pool2d or adaptive_avg_pool2d along an axis (0 height, 1 width) of ``size``."""
    if node.op == "adaptive_avg_pool2d":
        ends = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        return [(first, last, last - first) for first, last in ends]
    kernel, stride, padding = (node.attributes[name][axis] for name in ("kernel", "stride", "padding"))
    spans = []
    for i in range(count):
        start = i * stride - padding
        first, last = max(start, 0), min(start + kernel, size)
        counted = min(start + kernel, size + padding) - start if node.attributes["count_include_pad"] else last - first
        spans.append((first, last, counted))
    return spans


def window_sums(node: Node, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sums of ``x`` [B, C, H, W] over the windows of a node that gives ``shape`` [C, Ho, Wo], and divisors [Ho, Wo].

    Sums of integers are exact where x is float64.
    """
    divisors = torch.ones(1, 1, dtype=torch.float64)
    for axis in (0, 1):
        size = x.shape[2 + axis]
        spans = window_spans(node, size, axis, shape[1 + axis])
        covers = torch.zeros(len(spans), size, dtype=x.dtype)
        for i, (first, last, _) in enumerate(spans):
            covers[i, first:last] = 1
        x = covers @ x if axis == 0 else x @ covers.T
        counts = torch.tensor([counted for _, _, counted in spans], dtype=torch.float64)
        divisors = divisors * (counts[:, None] if axis == 0 else counts)
    divisor = node.attributes.get("divisor", 0)
    return x, torch.full_like(divisors, divisor) if divisor else divisors
