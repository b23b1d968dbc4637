"""Packed layers: one derived thing, made once and never stale, and calls that skip what was checked before.

A stand-in takes the place of the backend "cpu", so that these run without the extension; it counts, and computes by the
reference.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn.core import native
from bqnn.core.codes import pack_codes
from bqnn.core.derived import Derived
from bqnn.ops import dispatch
from bqnn.ops.packed_product import PackedCall, packed_product
from bqnn.packed.base import MAX_PLANS, PackedLayer
from bqnn.packed.convolutions import PackedConv2d
from bqnn.packed.layers import PackedLinear

OPS = ("packed_linear", "packed_conv2d")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Puts the stand-in in place and returns what it has been asked for: "layout", "bind", "run"; "run" where a layer
    goes straight to it."""
    done: list[str] = []

    def make(codes: Tensor, levels: Tensor) -> Tensor:
        done.append("layout")
        return codes.clone()

    layouts = Derived(make)

    def bind(call: PackedCall) -> dispatch.Bound:
        done.append("bind")
        layout = layouts((call.codes, call.levels))
        assert torch.equal(layout, call.codes)

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            done.append("run")
            return packed_product(call._replace(x=x, bias=bias, codes=layout))

        return run

    def serves(call: PackedCall) -> str:
        return "it takes no float64" if call.x.dtype == torch.float64 else ""

    before = {op: dispatch.backend(op, "cpu") for op in OPS}
    monkeypatch.setattr(native, "MISSING", "")
    for op in OPS:
        dispatch.register(op, "cpu", lambda call: bind(call)(call.x, call.bias), serves, bind)
    yield done
    for op in OPS:
        dispatch.register(op, *before[op])


def make_codes(channels: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pack_codes(torch.randint(3, (channels, columns), dtype=torch.uint8, generator=generator), 3)


def make_linear(execution: str = "packed", seed: int = 0) -> PackedLinear:
    levels = torch.tensor([[-1.0, 0.25, 1.5]]) + seed
    return PackedLinear(21, make_codes(6, 21, seed), levels, torch.randn(6), execution=execution)


def make_conv2d(execution: str = "packed", **geometry: Any) -> PackedConv2d:
    levels = torch.tensor([[-1.0, 0.25, 1.5]])
    return PackedConv2d(4, 3, make_codes(6, 36), levels, torch.randn(6), execution=execution, **geometry)


def expected_of(layer: PackedLayer, x: Tensor) -> Tensor:
    """What the layer's buffers, as they are now, make of x: a product with the decoded weight."""
    weight = layer.decode().to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if isinstance(layer, PackedLinear):
        return nn.functional.linear(x, weight, bias)
    twin = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        padding_mode=layer.padding_mode,
    )
    return torch.func.functional_call(twin, {"weight": weight, "bias": bias}, (x,))


def run(layer: PackedLayer, x: Tensor, calls: list[str]) -> list[str]:
    """What the layer asked for to compute ``x``, once it has been seen to be right."""
    calls.clear()
    y = layer(x)
    done = list(calls)
    torch.testing.assert_close(y, expected_of(layer, x), check_stride=False)
    return done


def test_a_shape_that_was_checked_goes_straight_to_the_kernel(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    assert run(layer, x, calls) == ["bind", "layout", "run"]
    assert run(layer, x, calls) == ["run"]
    assert run(layer, x.t().contiguous().t(), calls) == ["run"]
    assert run(layer, torch.randn(3, 21), calls) == ["bind", "run"]
    assert run(layer, torch.randn(3, 21), calls) == ["run"]
    with torch.inference_mode():
        assert run(layer, x, calls) == ["run"]


def test_anything_else_goes_through_the_checks(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    run(layer, x, calls)
    assert run(layer, x.double(), calls) == []  # the reference runs it
    assert run(layer, nn.Parameter(x), calls) == ["bind", "run"]
    needs_gradient = x.clone().requires_grad_()
    assert run(layer, needs_gradient, calls) == ["bind", "run"]
    with torch.no_grad():
        assert run(layer, needs_gradient, calls) == ["run"]
    assert layer(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"x must have the shape \[..., 21\], got \[4, 22\]"):
        layer(torch.randn(4, 22))
    with pytest.raises(TypeError, match="x must be floating point"):
        layer(torch.ones(4, 21, dtype=torch.int64))


@pytest.mark.parametrize("execution", ["packed", "dense"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_gradient_is_that_of_the_decoded_weight(precision: str, execution: str) -> None:
    for layer, x in (
        (make_linear(), torch.randn(2, 4, 21)),
        (make_conv2d(stride=2, padding=1), torch.randn(2, 4, 9, 8)),
    ):
        layer._precision, layer.execution, layer.relu = precision, execution, True
        layer(x), layer(x)
        x.requires_grad_()
        y = layer(x)
        upstream = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, upstream)
        masked = torch.where(y > 0, upstream, 0.0)
        (expected,) = torch.autograd.grad(expected_of(layer, x), x, masked)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param({}, id="plain"),
        pytest.param({"stride": 2, "padding": (1, 2)}, id="stride-padding"),
        pytest.param({"padding": "same"}, id="same-odd"),
        pytest.param({"padding": "valid"}, id="valid"),
        pytest.param({"padding": "valid", "padding_mode": "reflect"}, id="nothing-to-reflect"),
        pytest.param({"padding": "same", "dilation": 2}, id="same-dilated"),
        pytest.param({"padding": 1, "padding_mode": "circular"}, id="circular"),
    ],
)
def test_convolutions(geometry: dict[str, Any], calls: list[str]) -> None:
    layer, x = make_conv2d(**geometry), torch.randn(2, 4, 9, 8)
    assert run(layer, x, calls) == ["bind", "layout", "run"]
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        assert run(layer, images, calls) == ["run"]
    run(layer, x[0], calls)
    assert run(layer, x[0], calls) == ["run"]


def pickled(layer: PackedLayer) -> PackedLayer:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: PackedLayer) -> PackedLayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(layer: PackedLayer) -> PackedLayer:
    """As nn.DataParallel makes one for another device: the same attributes, and buffers of its own."""
    twin = layer._replicate_for_data_parallel()
    twin._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()}
    twin.levels.add_(1.0)
    return twin


def changed(layer: PackedLayer, change: Callable[[PackedLayer], object]) -> PackedLayer:
    change(layer)
    return layer


def assign_levels(layer: PackedLayer) -> None:
    layer.levels = layer.levels * 2.0


def assign_codes(layer: PackedLayer) -> None:
    layer.codes = layer.codes.flip(0)


def assign_bias(layer: PackedLayer) -> None:
    layer.bias = layer.bias * 2.0


def load_other_levels(layer: PackedLayer) -> None:
    layer.load_state_dict({**layer.state_dict(), "levels": layer.levels * 2.0})


CHANGES: dict[str, Callable[[PackedLayer], PackedLayer]] = {
    "levels-assigned": lambda layer: changed(layer, assign_levels),
    "codes-assigned": lambda layer: changed(layer, assign_codes),
    "bias-assigned": lambda layer: changed(layer, assign_bias),
    "levels-in-place": lambda layer: changed(layer, lambda each: each.levels.mul_(2.0)),
    "codes-in-place": lambda layer: changed(layer, lambda each: each.codes.copy_(each.codes.flip(0))),
    "bias-in-place": lambda layer: changed(layer, lambda each: each.bias.add_(1.0)),
    "load_state_dict": lambda layer: changed(layer, load_other_levels),
    "to": lambda layer: layer.to("cpu"),
    "double-float": lambda layer: layer.double().float(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickled,
    "torch.save": saved,
    "replica": replica,
    "dense": lambda layer: changed(layer, lambda each: setattr(each, "execution", "dense")),
}


@pytest.mark.parametrize("warm", [0, 1, 2], ids=["before-a-call", "after-a-call", "after-two"])
@pytest.mark.parametrize("execution", ["packed", "dense", "auto"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_nothing_is_stale(kind: str, change: str, execution: str, warm: int) -> None:
    layer = make_linear(execution) if kind == "linear" else make_conv2d(execution)
    x = torch.randn((4, 21) if kind == "linear" else (2, 4, 9, 8))
    for _ in range(warm):
        layer(x)
    after = CHANGES[change](layer)
    for _ in range(2):
        torch.testing.assert_close(after(x), expected_of(after, x))


@pytest.mark.parametrize("execution", ["packed", "dense", "auto"])
def test_functional_call_uses_its_own_buffers(execution: str) -> None:
    layer, other, x = make_linear(execution), make_linear(execution, seed=1), torch.randn(4, 21)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected_of(layer, x))
        found = torch.func.functional_call(layer, dict(other.named_buffers()), (x,))
        torch.testing.assert_close(found, expected_of(other, x))


def test_another_number_of_threads_is_another_plan(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    run(layer, x, calls)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert run(layer, x, calls) == ["bind", "run"]
        assert run(layer, x, calls) == ["run"]
    finally:
        torch.set_num_threads(threads)


def test_buffers_of_inference_mode_are_copied_so_that_changes_are_seen() -> None:
    with torch.inference_mode():
        layer = make_linear()
    assert not layer.levels.is_inference()
    x = torch.randn(4, 21)
    layer(x)
    layer.levels.mul_(2.0)
    torch.testing.assert_close(layer(x), expected_of(layer, x))


def test_the_derived_thing_is_no_part_of_the_module(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    assert layer._prepared is None
    layer(x)
    assert layer._prepared is not None
    assert set(layer.state_dict()) == {"codes", "levels", "bias"}
    for copied in (copy.deepcopy(layer), pickled(layer)):
        assert copied._prepared is None


def test_a_forced_reference_needs_no_layout(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    layer, x = make_linear(), torch.randn(4, 21)
    for _ in range(2):
        assert run(layer, x, calls) == []
    monkeypatch.delenv("BQNN_BACKEND")
    assert run(layer, x, calls) == ["bind", "layout", "run"]


def test_shapes_are_not_collected_for_ever(calls: list[str]) -> None:
    layer = make_linear()
    for rows in range(3 * MAX_PLANS):
        layer(torch.zeros(rows, 21))
        assert 0 < len(layer._prepared.plans) <= MAX_PLANS
    assert len(layer._prepared.plans) > 1


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_compiled_code_makes_the_layout_once_and_sees_changes(calls: list[str], grad: bool) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    expected = copy.deepcopy(layer)(x)
    calls.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
        assert calls == ["bind", "layout", "run", "bind", "run"]
        layer.load_state_dict(make_linear(seed=1).state_dict())
        torch.testing.assert_close(compiled(x), expected_of(layer, x))
        assert calls[5:] == ["bind", "layout", "run"]


def test_an_exported_program_has_the_codes_alone(calls: list[str]) -> None:
    layer, x = make_linear(), torch.randn(4, 21)
    expected = layer(x)
    program = torch.export.export(layer, (x,))
    assert set(program.state_dict) == {"codes", "levels", "bias"}
    assert not program.constants
    module = program.module()
    calls.clear()
    for _ in range(2):
        torch.testing.assert_close(module(x), expected)
    assert calls.count("run") == 2
    assert calls.count("layout") <= 1


def test_dense_calls_are_direct_too() -> None:
    layer, x = make_linear("dense"), torch.randn(4, 21)
    expected = layer(x)
    assert (x.dtype, x.shape) in layer._prepared.plans
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)  # the precision is the layer's own
    with pytest.raises(ValueError, match=r"x must have the shape \[..., 21\], got \[4, 22\]"):
        layer(torch.randn(4, 22))
    layer.bfloat16()  # the bias, another dtype than the plan was made for
    torch.testing.assert_close(layer(x), expected_of(layer, x))
