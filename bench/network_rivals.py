"""Rivals that run a whole full-precision network: torch, ONNX Runtime, OpenVINO. Each is given what makes it fast.

Weights and layouts are made ready before any time is taken, shapes are fixed to those of the input, and every library
gets as many threads as torch has. Where a library can, input and output are bound to it once, so that a call is nothing
but the run: what its Python wrapper does to an argument takes longer than a small network. Networks in int8 are
quantized after training by the library's own tool, from a few batches of inputs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Call = Callable[[], Tensor]

COMPILED = ("torch fp32 compiled", "torch bf16 compiled")
"""Made where they are asked for: torch.compile takes up to minutes for a network."""
CHANNELS_LAST = ("torch fp32 nhwc", "torch bf16 nhwc")
"""For images alone."""
RIVALS = (
    "torch fp32",
    "torch bf16",
    *CHANNELS_LAST,
    *COMPILED,
    "onnxruntime fp32",
    "onnxruntime int8",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
)


class Rivals:
    """A network in evaluation mode as the libraries hold it: exported once, for any batch.

    Args:
        net: a network of one input and one output, with the batch first in both. It is not changed.
        calibration: inputs of the same batch, two or more images each, for the tools that quantize.
    """

    def __init__(self, net: nn.Module, calibration: Sequence[Tensor]) -> None:
        self._net, self._calibration = net, calibration

    def call(self, variant: str, x: Tensor) -> Call:
        """A function that runs ``variant`` of RIVALS on ``x``, float32 [B, ...].

        Raises:
            pytest.skip.Exception: the library is not installed, or does not compute in this precision here.
        """
        library, precision, *how = variant.split()
        if library == "torch":
            return _torch(self._net, x, precision, how)
        if library == "onnxruntime":
            return _onnxruntime(self._onnx_int8 if precision == "int8" else self._onnx, x)
        return _openvino(self._openvino_int8 if precision == "int8" else self._openvino, x, precision)

    @cached_property
    def _onnx(self) -> Any:
        """A ModelProto."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
        batch = {0: torch.export.Dim.DYNAMIC}
        with _quiet():
            program = torch.onnx.export(
                self._net, (self._calibration[0],), dynamo=True, dynamic_shapes=(batch,), verbose=False
            )
        return program.model_proto

    @cached_property
    def _onnx_int8(self) -> Any:
        model = self._onnx
        from onnx import load
        from onnxruntime import quantization

        name = model.graph.input[0].name
        feeds = iter([{name: batch.numpy()} for batch in self._calibration])

        class Reader(quantization.CalibrationDataReader):
            def get_next(self) -> Any:
                return next(feeds, None)

        with tempfile.TemporaryDirectory() as folder, _quiet():
            folded, quantized = Path(folder) / "folded.onnx", Path(folder) / "quantized.onnx"
            quantization.quant_pre_process(model, folded)
            quantization.quantize_static(
                folded,
                quantized,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=not torch.cpu._is_vnni_supported(),  # without it sums of two products saturate
            )
            return load(quantized)

    @cached_property
    def _openvino(self) -> Any:
        openvino = _import_openvino()
        example = self._calibration[0]
        with _quiet():
            return openvino.convert_model(self._net, example_input=example, input=[-1, *example.shape[1:]])

    @cached_property
    def _openvino_int8(self) -> Any:
        _import_openvino()
        nncf = pytest.importorskip("nncf")
        with _quiet():
            inputs = nncf.Dataset([batch.numpy() for batch in self._calibration])
            return nncf.quantize(self._openvino, inputs, subset_size=len(self._calibration))


def _torch(net: nn.Module, x: Tensor, precision: str, how: list[str]) -> Call:
    net = copy.deepcopy(net)
    if precision == "bf16":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("torch emulates bf16 on this processor, a hundred times slower than fp32")
        net, x = net.bfloat16(), x.bfloat16()
    if how == ["nhwc"]:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    elif how == ["compiled"]:
        # Frozen weights are laid out as the kernels read them, and BatchNorm goes into the layer before it.
        net = torch.compile(net, dynamic=False, options={"freezing": True})
    return lambda: net(x)


def _onnxruntime(model: Any, x: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    options.add_free_dimension_override_by_name(batch, len(x))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = model.graph.input[0].name
    output = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    bound = session.io_binding()
    bound.bind_input(name, "cpu", 0, "float32", list(x.shape), x.data_ptr())
    bound.bind_output(model.graph.output[0].name, "cpu", 0, "float32", list(output.shape), output.data_ptr())
    output.fill_(float("nan"))

    def call() -> Tensor:
        session.run_with_iobinding(bound)
        return output

    return _keeping(call, x)


def _openvino(model: Any, x: Tensor, precision: str) -> Call:
    openvino = _import_openvino()
    model = model.clone()
    model.reshape(list(x.shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    # What is left in floating point beside int8 runs as the library chooses.
    asked = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}.get(precision)
    if asked is not None:
        options["INFERENCE_PRECISION_HINT"] = asked
    compiled = openvino.Core().compile_model(model, "CPU", options)
    given = compiled.get_property("INFERENCE_PRECISION_HINT")
    if asked is not None and given != asked:
        pytest.skip(f"OpenVINO computes {precision} as {given.get_type_name()} on this processor")
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    return _keeping(lambda: torch.from_numpy(request.infer(share_outputs=True)[0]), x)


def _keeping(call: Any, x: Tensor) -> Call:
    """``call``, which keeps ``x``: a library that it is bound to knows its address alone."""
    call.keeps = x
    return call


def _import_openvino() -> Any:
    """The package, which sends no reports of its use from here: it and nncf do without what would send them."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return pytest.importorskip("openvino")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, a line of the log for every layer, and deprecations in what libraries use."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
