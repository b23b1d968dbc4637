"""pack: a trained Bayes network to codes in bytes, in one call."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bqnn.bayes.layers import BayesConv2d, BayesLayer, BayesLinear, bayes_layers
from bqnn.core.check import check_precision
from bqnn.core.codes import pack_codes
from bqnn.engine.relu import relu_after
from bqnn.packed.base import PackedLayer, check_execution
from bqnn.packed.layers import PackedConv2d, PackedLinear


def pack(net: nn.Module, precision: str = "fp32", execution: str = "auto", fuse_relu: bool = True) -> nn.Module:
    """A copy of ``net`` in which every Bayes layer is a packed one, in evaluation mode; ``net`` stays as it is.

    A layer used in two places stays one layer, and everything that is no Bayes layer is copied as it is, but for an
    nn.ReLU that directly follows one in an nn.Sequential: the packed layer does its work, an nn.Identity its place.

    Args:
        net: a network that bqnn.convert made, or a single Bayes layer.
        precision: "fp32", "bf16" or "int8" (bqnn.ops.packed_linear says what each computes).
        execution: "packed" keeps the weight as codes, and as the layout of them that a kernel reads; "dense" decodes it
            once and keeps it; "auto" takes, for each call, the one that bqnn.packed.cost expects to be faster.
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
        id(layer): _pack_named(name, layer, precision, execution, id(layer) in relus) for name, layer in layers.items()
    }
    memo |= {id(relu): nn.Identity() for relu in relus.values()}
    return copy.deepcopy(net, memo).eval()


def pack_layer(
    layer: BayesLayer, precision: str = "fp32", execution: str = "auto", relu: bool = False
) -> PackedLinear | PackedConv2d:
    """The packed form of one Bayes layer; the arguments are those of the packed layers.

    Raises:
        TypeError: ``layer`` is neither a BayesLinear nor a BayesConv2d.
        ValueError: a parameter is not finite or out of range, or an argument is wrong.
    """
    if isinstance(layer, BayesLinear):
        return PackedLinear(layer.in_features, *_packed_tensors(layer), precision, execution, relu)
    if isinstance(layer, BayesConv2d):
        return PackedConv2d(
            layer.in_channels,
            layer.kernel_size,
            *_packed_tensors(layer),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            precision=precision,
            execution=execution,
            relu=relu,
        )
    raise TypeError(f"layer must be a BayesLinear or a BayesConv2d, got {type(layer).__name__}")


def _pack_named(name: str, layer: BayesLayer, precision: str, execution: str, relu: bool) -> PackedLayer:
    try:
        return pack_layer(layer, precision, execution, relu)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error


def _packed_tensors(layer: BayesLayer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, levels and bias of a Bayes layer, as the packed layers take them."""
    codes = pack_codes(layer.codes().flatten(1), layer.num_levels)
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return codes, layer._codebook()[0].detach().to(torch.float32, copy=True), bias
