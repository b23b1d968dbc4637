"""pack: a trained Bayes network to codes in bytes, in one call."""

from __future__ import annotations

import copy

from torch import nn

from bqnn.layers import BayesConv2d, BayesLayer, BayesLinear, bayes_layers
from bqnn.ops._packed import check_precision
from bqnn.packed import PackedConv2d, PackedLinear
from bqnn.packed_layer import PackedLayer, check_execution


def pack(net: nn.Module, precision: str = "fp32", execution: str = "auto") -> nn.Module:
    """A copy of ``net`` in which every Bayes layer is a packed one, in evaluation mode; ``net`` stays as it is.

    A layer used in two places stays one layer, and everything that is no Bayes layer is copied as it is.

    Args:
        net: a network that bqnn.convert made, or a single Bayes layer.
        precision: "fp32", "bf16" or "int8" (bqnn.ops.packed_linear says what each computes).
        execution: "packed" keeps the weight as codes, and as the layout of them that a kernel reads; "dense" decodes it
            once and keeps it; "auto" takes, for each call, the one that bqnn.speed expects to be faster.

    Raises:
        ValueError: ``net`` has no Bayes layer; a parameter of one is not finite or out of range (the message names the
            layer); ``precision`` or ``execution`` is none of those.
    """
    check_precision(precision)
    check_execution(execution)
    layers = bayes_layers(net)
    if not layers:
        raise ValueError("net must have a Bayes layer, as bqnn.convert makes them, got none")
    # deepcopy takes what its memo holds for the copy: wherever the network refers to a layer, it gets the packed one.
    memo = {id(layer): _pack_layer(name, layer, precision, execution) for name, layer in layers.items()}
    return copy.deepcopy(net, memo).eval()


def _pack_layer(name: str, layer: BayesLayer, precision: str, execution: str) -> PackedLayer:
    try:
        if isinstance(layer, BayesLinear):
            return PackedLinear.from_bayes(layer, precision, execution)
        if isinstance(layer, BayesConv2d):
            return PackedConv2d.from_bayes(layer, precision, execution)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    raise TypeError(f"layer {name!r} must be a BayesLinear or a BayesConv2d, got {type(layer).__name__}")
