"""export_onnx: a packed network as an ONNX file, whose weights are codes there too.

The graph is what torch.onnx makes of the network of torch's own layers (dequantize.py). In place of each weight it has
the bytes of its codes and its levels, and before everything else a few operators that look the levels up:

    byte of codes -> its digits, in a table of all bytes -> the levels of the digits -> the weight in its shape

All of this depends on no input: runtimes that fold constants, such as ONNX Runtime, do it once, when they load the
file, and run the float network from then on. It takes Cast, Gather, GatherElements, Reshape and Slice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.layers import bayes_layers
from bqnn.core.check import check_module
from bqnn.core.codes import digits_per_byte, unpack_codes
from bqnn.core.extras import needs
from bqnn.core.files import write_content
from bqnn.core.wrappers import unwrapped
from bqnn.engine.capture import BATCH, export, names_of_inputs
from bqnn.engine.compile import checked_device, checked_inputs
from bqnn.engine.dequantize import dequantize, packed_layers
from bqnn.engine.pack import pack
from bqnn.packed.weight import PackedWeight

OF_EXPORT = "net."  # what names of the network's tensors begin with in what bqnn.engine.capture.export makes


def export_onnx(net: nn.Module, path: str | os.PathLike[str], example: Tensor | tuple[Tensor, ...]) -> None:
    """Writes ``net`` to an ONNX file, for any size of the batch.

    Weights of packed layers are their codes in the file, as many to a byte as in a packed file: 1.6 bits a weight at
    M = 3. It computes what :func:`bqnn.dequantize` gives, whatever the precision of the packed layers. Inputs have the
    names that ``forward`` has for them, outputs are "output", or "output_0" and so on where there are several.

    Args:
        net: a network with packed layers, Bayes layers (which are packed first) or both, on the CPU; stays as it is.
        path: the file; one that is there is replaced.
        example: an input [batch, ...], or a tuple of the inputs; dtypes and shapes count, but for the batch's size,
            which has to be 1 or more.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed (the extra "onnx").
        TypeError, ValueError: an argument is wrong, as for :func:`bqnn.dequantize`, or torch.export can not capture the
            network with a batch of any size.
        OSError: the file can not be written.
    """
    check_module("net", net)
    given = checked_inputs(example)
    if checked_device(*net.parameters(), *net.buffers(), *given).type != "cpu":
        raise ValueError("net and example must be on the CPU to be exported")
    inputs = tuple(each.new_empty((BATCH, *each.shape[1:])) for each in given)
    net = unwrapped(net)
    packed = pack(net, fuse_relu=False) if bayes_layers(net) else net
    plain = dequantize(packed)
    with needs("onnx"):
        import onnx
        import onnx_ir
        from onnxscript.optimizer import optimize
    program: Any = torch.onnx.export(export(plain, inputs, (False, True)), dynamo=True, optimize=False, verbose=False)
    graph = program.model.graph
    _name_values(onnx_ir, graph, names_of_inputs(plain))
    packer = _Packer(onnx_ir, graph, _packed_weights(packed, plain))
    optimize(program.model)  # so that torch.onnx's detours do not keep runtimes from fusing layers
    packer.put_codes()
    _strip(program.model)
    proto = onnx_ir.to_proto(program.model)
    onnx.checker.check_model(proto)
    write_content(path, proto.SerializeToString())


def _packed_weights(packed: nn.Module, plain: nn.Module) -> dict[str, PackedWeight]:
    """By every name that a parameter of ``plain`` has, the packed layer whose weight it is."""
    layers: dict[int, PackedWeight] = {}
    for name, layer in packed_layers(packed).items():
        found: Any = plain.get_submodule(name)
        layers[id((found[0] if isinstance(found, nn.Sequential) else found).weight)] = layer
    parameters = plain.named_parameters(remove_duplicate=False)
    return {name: layers[id(parameter)] for name, parameter in parameters if id(parameter) in layers}


class _Packer:
    """Puts codes and levels in place of weights; until :meth:`put_codes` the weights are inputs of the graph, whose
    values nothing can compute with.

    Args:
        ir: the module onnx_ir.
        layers: by the name of a weight, the layer that has it; of a weight with several names, the graph has one.
    """

    def __init__(self, ir: Any, graph: Any, layers: Mapping[str, PackedWeight]) -> None:
        self.ir, self.graph = ir, graph
        self.nodes: list[Any] = []
        self.weights = {name: layer for name, layer in layers.items() if name in graph.initializers}
        for name in self.weights:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)

    def put_codes(self) -> None:
        """Makes all weights of their codes."""
        values = {value.name: value for value in self.graph.inputs}
        for name, layer in self.weights.items():
            self.graph.inputs.remove(values[name])
            self._decode(name, layer, values[name])
        self.graph.insert_before(self.graph[0], self.nodes)

    def _decode(self, name: str, layer: PackedWeight, weight: Any) -> None:
        """Adds what makes ``weight`` of the layer's codes."""
        channels, columns = layer.shape[0], layer.weight_like()[0].numel()
        levels = layer.levels.to(layer.weight_dtype)
        digits = digits_per_byte(layer.num_levels)
        stored = self._constant(f"{name}.codes", layer.codes)
        bytes_of_codes = self._call("Cast", stored, to=self.ir.DataType.INT32)
        found = self._call("Gather", self._digits(layer.num_levels), bytes_of_codes, axis=0)
        width = layer.codes.shape[1] * digits
        codes = self._call("Reshape", found, self._numbers(channels, width))
        if width != columns:
            codes = self._call("Slice", codes, self._numbers(0), self._numbers(columns), self._numbers(1))
        codes = self._call("Cast", codes, to=self.ir.DataType.INT32)
        if len(levels) == 1:
            rows = self._call("Gather", self._constant(f"{name}.levels", levels[0]), codes, axis=0)
        else:
            rows = self._call("GatherElements", self._constant(f"{name}.levels", levels), codes, axis=1)
        self._call("Reshape", rows, self._numbers(*layer.shape), outputs=[weight])

    def _digits(self, num_levels: int) -> Any:
        """The table of the digits of a byte, [bytes, digits]."""
        digits = digits_per_byte(num_levels)
        every_byte = torch.arange(num_levels**digits).to(torch.uint8).unsqueeze(1)
        return self._constant(f"digits_{num_levels}", unpack_codes(every_byte, num_levels, digits))

    def _numbers(self, *values: int) -> Any:
        return self._constant("_".join(("numbers", *map(str, values))), torch.tensor(values))

    def _constant(self, name: str, tensor: Tensor) -> Any:
        if name not in self.graph.initializers:
            found = self.ir.tensor(tensor.detach().contiguous(), name=name)
            value = self.ir.Value(name=name, const_value=found, shape=found.shape, type=self.ir.TensorType(found.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _call(self, operator: str, *inputs: Any, outputs: Sequence[Any] | None = None, **attributes: Any) -> Any:
        self.nodes.append(self.ir.node(operator, inputs, attributes, outputs=outputs))
        return self.nodes[-1].outputs[0]


def _name_values(ir: Any, graph: Any, inputs: Sequence[str]) -> None:
    """Gives inputs, outputs, the batch and the network's tensors the names that they have outside."""
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix(OF_EXPORT)
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    names = dict(zip(graph.inputs, inputs))
    outputs = ["output"] if len(graph.outputs) == 1 else [f"output_{i}" for i in range(len(graph.outputs))]
    names |= dict(zip(graph.outputs, outputs))
    for value, name in names.items():
        if name not in taken:
            value.name = name
    batch = re.escape(str(graph.inputs[0].shape[0]))
    for value in (*graph.inputs, *graph.outputs):
        sizes = [size if isinstance(size, int) else re.sub(rf"\b{batch}\b", "batch", str(size)) for size in value.shape]
        value.shape = ir.Shape(sizes)


def _strip(model: Any) -> None:
    """Takes out what torch.onnx has written down of where each operator came from, a multiple of small weights."""
    graph, outputs = model.graph, set(model.graph.outputs)
    values = {value for node in graph for value in node.outputs} | {*graph.inputs, *graph.initializers.values()}
    for part in (model, graph, *graph, *values):
        part.metadata_props.clear()
        part.doc_string = None
    for value in values - outputs - {*graph.inputs, *graph.initializers.values()}:
        value.shape = value.type = None  # runtimes find these by themselves
