"""BatchNorm, a scale and a shift, joins the layer before it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bqnn.engine.graph import Graph, Node
from bqnn.engine.passes.rewrite import apply_everywhere, merged, replaced, sole_user


def fold_affines(graph: Graph) -> Graph:
    """An affine node becomes part of a conv2d, linear or affine node before it, or an activation where it does nothing.

    The layer must have no activation, no residual and no other user. Its new scale and bias are computed in float64 and
    stored in float32; the codes stay as they are. An affine before a convolution stays: its shift would have to be
    undone in the padding, and a scale for each input channel is no codebook.
    """
    return apply_everywhere(graph, _fold)


def _fold(graph: Graph, node: Node) -> Graph | None:
    if node.op != "affine":
        return None
    scale, shift = node.tensors["scale"], node.tensors["shift"]
    if bool((scale == 1).all()) and bool((shift == 0).all()):
        return replaced(graph, node, dataclasses.replace(node, op="activation", tensors={}))
    layer = graph.producer(node.inputs[0])
    if layer is None or layer.op not in _NAMES or len(layer.inputs) > 1 or layer.activation.name != "none":
        return None
    if sole_user(graph, layer.output) is not node:
        return None
    names, tensors = _NAMES[layer.op], dict(layer.tensors)
    inner, offset = (tensors.get(name) for name in names)
    after = _composed(inner, offset, scale, shift)
    if not all(bool(each.isfinite().all()) for each in after):
        return None
    tensors |= dict(zip(names, after))
    return merged(
        graph, layer, node, dataclasses.replace(layer, output=node.output, tensors=tensors, activation=node.activation)
    )


_NAMES = {"conv2d": ("scale", "bias"), "linear": ("scale", "bias"), "affine": ("scale", "shift")}


def _composed(inner: Tensor | None, offset: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``(x * inner + offset) * scale + shift``."""
    inner = torch.ones_like(scale, dtype=torch.float64) if inner is None else inner.double()
    offset = torch.zeros_like(scale, dtype=torch.float64) if offset is None else offset.double()
    return (inner * scale.double()).float(), (offset * scale.double() + shift.double()).float()
