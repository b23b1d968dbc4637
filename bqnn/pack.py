"""pack: a trained Bayes network to codes in bytes, in one call."""

from __future__ import annotations

import copy

from torch import nn

from bqnn.fuse import relu_after
from bqnn.layers import BayesConv2d, BayesLayer, BayesLinear, bayes_layers
from bqnn.ops._packed import check_precision
from bqnn.packed import PackedConv2d, PackedLinear
from bqnn.packed_layer import PackedLayer, check_execution


def pack(net: nn.Module, precision: str = "fp32", execution: str = "auto", fuse_relu: bool = True) -> nn.Module:
    """A copy of ``net`` in which every Bayes layer is a packed one, in evaluation mode; ``net`` stays as it is.

    A layer used in two places stays one layer, and everything that is no Bayes layer is copied as it is, but for an
    nn.ReLU that directly follows one in an nn.Sequential: the packed layer does its work, an nn.Identity its place.

    Args:
        net: a network that bqnn.convert made, or a single Bayes layer.
        precision: "fp32", "bf16" or "int8" (bqnn.ops.packed_linear says what each computes).
        execution: "packed" keeps the weight as codes, and as the layout of them that a kernel reads; "dense" decodes it
            once and keeps it; "auto" takes, for each call, the one that bqnn.speed expects to be faster.
        fuse_relu: False leaves every nn.ReLU where it is, for a network that reads what comes before one.

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
    relus = relu_after(net, (BayesLinear, BayesConv2d)) if fuse_relu else {}
    memo: dict[int, nn.Module] = {
        id(layer): _pack_layer(name, layer, precision, execution, id(layer) in relus) for name, layer in layers.items()
    }
    memo |= {id(relu): nn.Identity() for relu in relus.values()}
    return copy.deepcopy(net, memo).eval()


def _pack_layer(name: str, layer: BayesLayer, precision: str, execution: str, relu: bool) -> PackedLayer:
    try:
        if isinstance(layer, BayesLinear):
            return PackedLinear.from_bayes(layer, precision, execution, relu)
        if isinstance(layer, BayesConv2d):
            return PackedConv2d.from_bayes(layer, precision, execution, relu)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    raise TypeError(f"layer {name!r} must be a BayesLinear or a BayesConv2d, got {type(layer).__name__}")
