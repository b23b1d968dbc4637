"""dequantize: a packed network to one of torch's own layers, for whatever takes those and knows no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.layers import bayes_layers
from bqnn.core.check import check_module
from bqnn.core.composed import Composed, make_plain
from bqnn.core.readers import read_parameter_of, readers
from bqnn.core.references import copy_network
from bqnn.core.replace import become, bound_methods, check_own_forward, rebind
from bqnn.engine.pack import pack
from bqnn.packed.base import PackedLayer
from bqnn.packed.convolutions import PackedConv1d, PackedConv2d, PackedConvolution
from bqnn.packed.embedding import PackedEmbedding
from bqnn.packed.layers import PackedLinear
from bqnn.packed.weight import PackedWeight


@torch.inference_mode(False)  # whose tensors could not be trained
def dequantize(net: nn.Module) -> nn.Module:
    """A copy of ``net`` with nn.Linear and nn.Conv2d in place of packed and Bayes layers, in evaluation mode.

    A weight is the decoded one, in the network's dtype, whatever the precision that a packed layer computes with; it
    gives the outputs of the packed network of precision "fp32" up to the order of summation. Tied weights are one
    parameter, of embeddings too. An nn.ReLU that a packed layer has taken over is a module of its own again; a packed
    layer with a ReLU that never was one becomes an nn.Sequential of both. All else stays as it is, hooks too. Weights
    and biases require gradients, so that the network can be trained further.

    Args:
        net: a network with packed layers, Bayes layers or both; a single layer, too.

    Returns:
        the copy; ``net`` stays as it is.

    Raises:
        TypeError: ``net`` is no module.
        ValueError: it has neither packed nor Bayes layers; a parameter of a Bayes layer is not finite or out of range;
            a layer has a forward of its own; ``net`` can not be copied, as :func:`bqnn.convert` says.
    """
    check_module("net", net)
    if not (bayes_layers(net) or packed_layers(net)):
        raise ValueError("net must have packed or Bayes layers, as bqnn.pack and bqnn.convert make them, got none")
    # Codes are most of the memory of a packed layer, and the copy has no use for them.
    shared = {id(layer.codes): layer.codes for layer in packed_layers(net).values()}
    copied = pack(net, fuse_relu=False) if bayes_layers(net) else copy_network(net, shared)
    layers = packed_layers(copied)
    composed = [module for module in copied.modules() if isinstance(module, Composed)]
    changing: dict[nn.Module, str] = {
        module: name for name, module in copied.named_modules() if isinstance(module, (Composed, PackedWeight))
    }
    methods = bound_methods(copied, changing)
    for name, layer in layers.items():
        check_own_forward(name, layer)
    templates: dict[type, PackedWeight] = {kind: _template(kind) for kind in _PLAIN}
    parameters: dict[tuple[Any, ...], nn.Parameter] = {}
    weights: dict[nn.Module, nn.Parameter] = {}
    for layer in layers.values():
        key = *map(id, layer.weight_sources()), layer.shape
        if key not in parameters:
            parameters[key] = _parameter(layer.decode().to(layer.weight_dtype))
        weights[layer] = parameters[key]
        if isinstance(layer, PackedLayer):
            layer.give_back_relu()
    for packed, weight in weights.items():
        become(packed, _plain(packed, weight), templates[type(packed)])
    for module, name, owner in list(readers(copied)):
        read_parameter_of(module, name, weights[owner])
    make_plain(composed)
    rebind(methods)
    return copied.eval()


def packed_layers(net: nn.Module) -> dict[str, PackedWeight]:
    """The packed layers of a network by name, each once."""
    return {name: module for name, module in net.named_modules() if isinstance(module, PackedWeight)}


def _parameter(values: Tensor) -> nn.Parameter:
    """A parameter with memory of its own."""
    return nn.Parameter(values.detach().clone())


def _linear(layer: PackedLinear) -> nn.Module:
    return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")


def _convolution(kind: Any) -> Callable[[Any], nn.Module]:
    def make(layer: Any) -> nn.Module:
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size
        steps = layer.stride, layer.padding, layer.dilation, layer.groups
        return kind(*sizes, *steps, bias=False, padding_mode=layer.padding_mode, device="meta")

    return make


def _embedding(layer: PackedEmbedding) -> nn.Module:
    return nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")


_PLAIN: dict[type[PackedWeight], Callable[[Any], nn.Module]] = {
    PackedLinear: _linear,
    PackedConv1d: _convolution(nn.Conv1d),
    PackedConv2d: _convolution(nn.Conv2d),
    PackedEmbedding: _embedding,
}


def _plain(layer: Any, weight: nn.Parameter) -> nn.Module:
    """The layer of torch's own, and the ReLU that it does, where it does one."""
    plain: Any = _PLAIN[type(layer)](layer)
    plain.weight = weight
    if layer.bias is not None:
        plain.bias = _parameter(layer.bias)
    return nn.Sequential(plain, nn.ReLU()) if isinstance(layer, PackedLayer) and layer.relu else plain


def _template(kind: Any) -> PackedWeight:
    """A layer that has whatever attribute a packed layer may come to have by itself."""
    sizes = (1, 1) if issubclass(kind, PackedConvolution) else (1,)
    template = kind(*sizes, torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([[0.0, 1.0]]))
    template.weight_dtype = torch.float32
    if isinstance(template, PackedLayer):
        template.take_over(nn.ReLU())
    return template
