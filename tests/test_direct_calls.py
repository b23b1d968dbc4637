"""Packed layers on the cpu backend: the layout that is made once, and the calls that skip what was checked before.

A stand-in takes the kernels' place, so that these run without the extension; it counts, and computes by the reference.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn.core.codes import pack_codes
from bqnn.ops import dispatch
from bqnn.ops.packed_conv2d import packed_conv2d, packed_conv2d_reference
from bqnn.ops.packed_linear import packed_linear, packed_linear_reference
from bqnn.packed.base import MAX_DIRECT_SHAPES, PackedLayer
from bqnn.packed.layers import PackedConv2d, PackedLinear

LAYOUT = torch.arange(7, dtype=torch.uint8)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the stand-in in place and returns what it has been asked for: "layout", "op", "direct"."""
    done: list[str] = []
    real = dispatch.choose

    def choose(op: str, device: torch.device, backend: str | None = None) -> str:
        if op.startswith("packed") and device.type == "cpu" and "BQNN_BACKEND" not in dispatch.os.environ:
            return backend or "cpu"
        return real(op, device, backend)

    def make_layout(*arguments: Any) -> Tensor:
        done.append("layout")
        return LAYOUT.clone()

    def counted(reference: Any) -> Any:
        def run(x: Tensor, *arguments: Any) -> Tensor:
            layout = arguments[-1]
            assert layout is None or torch.equal(layout, LAYOUT)
            done.append("op" if layout is not None else "op without a layout")
            return reference(x, *arguments)

        return run

    def run_linear(self: PackedLinear, x: Tensor) -> Tensor:
        done.append("direct")
        return packed_linear(x, self.codes, self.levels, self.bias, self.precision, self._layout, "reference")

    def run_conv2d(self: PackedConv2d, x: Tensor) -> Tensor:
        done.append("direct")
        geometry = (self.kernel_size, self.stride, self._zeros, self.dilation, self.groups)
        layout, backend = self._layout, "reference"
        return packed_conv2d(x, self.codes, self.levels, self.bias, *geometry, self.precision, layout, backend)

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr("bqnn.packed.layers.make_layout", make_layout)
    for op, reference in (("packed_linear", packed_linear_reference), ("packed_conv2d", packed_conv2d_reference)):
        monkeypatch.setitem(dispatch._implementations[op], "cpu", counted(reference))
    monkeypatch.setattr(PackedLinear, "_run_direct", run_linear)
    monkeypatch.setattr(PackedConv2d, "_run_direct", run_conv2d)
    return done


def make_codes(channels: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pack_codes(torch.randint(3, (channels, columns), dtype=torch.uint8, generator=generator), 3)


def make_linear(execution: str = "packed") -> PackedLinear:
    levels = torch.tensor([[-1.0, 0.25, 1.5]])
    return PackedLinear(21, make_codes(6, 21), levels, torch.randn(6), execution=execution)


def make_conv2d(**geometry: Any) -> PackedConv2d:
    levels = torch.tensor([[-1.0, 0.25, 1.5]])
    return PackedConv2d(4, 3, make_codes(6, 36), levels, torch.randn(6), execution="packed", **geometry)


def run(layer: PackedLayer, x: Tensor, calls: list[str]) -> list[str]:
    """What the layer asked for to compute ``x``, once it has been seen to be right."""
    calls.clear()
    y = layer(x)
    done = list(calls)
    dense = copy.deepcopy(layer)
    dense.execution = "dense"
    torch.testing.assert_close(y, dense(x))
    return done


def test_a_shape_that_was_checked_goes_straight_to_the_kernel(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    assert run(layer, x, calls) == ["layout", "op"]
    assert run(layer, x, calls) == ["direct"]
    assert run(layer, x.t().contiguous().t(), calls) == ["direct"]
    assert run(layer, torch.randn(3, 21), calls) == ["op"]
    assert run(layer, torch.randn(3, 21), calls) == ["direct"]
    with torch.inference_mode():
        assert run(layer, x, calls) == ["direct"]


def test_anything_else_goes_through_the_checks(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    run(layer, x, calls)
    assert run(layer, x.double(), calls) == ["op without a layout"]
    assert run(layer, nn.Parameter(x), calls) == ["op without a layout"]
    needs_gradient = x.clone().requires_grad_()
    assert run(layer, needs_gradient, calls) == ["op"]
    with torch.no_grad():
        assert run(layer, needs_gradient, calls) == ["direct"]
    assert run(layer, x.half(), calls) == ["direct"]  # computed in float32
    with pytest.raises(ValueError, match=r"x must have the shape \[..., 21\], got \[4, 22\]"):
        layer(torch.randn(4, 22))
    with pytest.raises(TypeError, match="x must be floating point"):
        layer(torch.ones(4, 21, dtype=torch.int64))
    layer.bfloat16()  # the bias; the kernel converts it
    for _ in range(2):
        found = run(layer, x, calls)
    assert found == ["direct"]


def test_bfloat16_goes_to_the_kernel_as_it_is(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21).bfloat16()
    assert run(layer, x, calls) == ["layout", "op"]
    assert run(layer, x, calls) == ["direct"]
    assert layer(x).dtype == torch.bfloat16


def test_a_gradient_is_still_refused(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    layer(x), layer(x)
    with pytest.raises(NotImplementedError, match="no gradient"):
        layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("geometry", "direct"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param({"stride": 2, "padding": (1, 2)}, True, id="stride-padding"),
        pytest.param({"padding": "same"}, True, id="same-odd"),
        pytest.param({"padding": "valid"}, True, id="valid"),
        pytest.param({"padding": "valid", "padding_mode": "reflect"}, True, id="nothing-to-reflect"),
        pytest.param({"padding": "same", "dilation": 2}, True, id="same-dilated"),
        pytest.param({"padding": 1, "padding_mode": "circular"}, False, id="circular"),
    ],
)
def test_convolutions(geometry: dict[str, Any], direct: bool, calls: list[str]) -> None:
    layer, x = make_conv2d(**geometry), torch.randn(2, 4, 9, 8)
    assert run(layer, x, calls) == ["layout", "op"]
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        assert run(layer, images, calls) == ["direct" if direct else "op"]
    run(layer, x[0], calls)
    assert run(layer, x[0], calls) == ["direct" if direct else "op"]


def test_the_layout_is_dropped_with_what_it_was_made_of(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    assert layer._layout is None
    with torch.inference_mode():
        layer(x)
    assert layer._layout is not None
    assert not layer._layout.is_inference()
    assert set(layer.state_dict()) == {"codes", "levels", "bias"}
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (copied._layout, copied._direct_shapes) == (None, {})
        assert run(copied, x, calls) == ["layout", "op"]
    layer.load_state_dict(make_linear().state_dict())
    assert run(layer, x, calls) == ["layout", "op"]
    layer.to("cpu")
    assert run(layer, x, calls) == ["layout", "op"]
    layer.execution = "dense"
    assert run(layer, x, calls) == []
    assert layer._layout is None


def test_a_forced_reference_needs_no_layout(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    layer, x = make_linear(), torch.randn(4, 21)
    for _ in range(2):
        assert run(layer, x, calls) == []
    assert layer._layout is None
    monkeypatch.delenv("BQNN_BACKEND")
    assert run(layer, x, calls) == ["layout", "op"]


def test_shapes_are_not_collected_for_ever(calls: list[str]) -> None:
    layer = make_linear()
    for rows in range(3 * MAX_DIRECT_SHAPES):
        layer(torch.zeros(rows, 21))
    assert 0 < len(layer._direct_shapes) <= MAX_DIRECT_SHAPES


def test_compiled_code_takes_the_layout(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    expected = copy.deepcopy(layer)(x)
    calls.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert calls == ["layout", "op", "op"]
    other = make_linear()
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
    assert calls[3:] == ["layout", "op", "layout", "op"]


def test_an_exported_program_has_the_codes_alone(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    expected = layer(x)
    program = torch.export.export(layer, (x,))
    assert set(program.state_dict) == {"codes", "levels", "bias"}
    assert not program.constants
    calls.clear()
    torch.testing.assert_close(program.module()(x), expected)
    assert calls == ["op without a layout"]


def test_dense_calls_are_direct_too_and_drop_a_decoded_weight_that_is_stale() -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    layer.execution = "dense"
    expected = layer(x)
    assert x.shape in layer._dense_shapes
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)  # the precision is the layer's own
    with pytest.raises(ValueError, match=r"x must have the shape \[..., 21\], got \[4, 22\]"):
        layer(torch.randn(4, 22))
    other = make_linear()
    other.levels += 1
    layer.load_state_dict(other.state_dict())
    assert not layer._dense_shapes
    torch.testing.assert_close(layer(x), other(x))
