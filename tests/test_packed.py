"""PackedLinear and PackedConv2d against the Bayes layers they come from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn import BayesConv2d, BayesLinear
from bqnn.core.check import PRECISIONS
from bqnn.core.codes import pack_codes, packed_width
from bqnn.engine.pack import pack_layer
from bqnn.ops.backends import dense_packed
from bqnn.packed.base import PackedLayer
from bqnn.packed.convolutions import PackedConv2d
from bqnn.packed.layers import PackedLinear

EVERY_M = [pytest.param(m, id=f"M{m}") for m in range(2, 17)]
EXECUTIONS = ["packed", "dense"]
GEOMETRIES = [
    pytest.param({"kernel_size": 3}, id="plain"),
    pytest.param({"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, id="stride-padding"),
    pytest.param({"kernel_size": 3, "padding": 2, "dilation": (1, 2), "groups": 2}, id="dilation-groups"),
    pytest.param({"kernel_size": 3, "padding": "same"}, id="same-odd"),
    pytest.param({"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)}, id="same-even"),
    pytest.param({"kernel_size": 3, "padding": "valid"}, id="valid"),
    pytest.param({"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}, id="reflect"),
    pytest.param({"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, id="replicate"),
    pytest.param({"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}, id="circular-same-even"),
]


def make_linear(num_levels: int = 3, granularity: str = "tensor", bias: bool = True) -> BayesLinear:
    torch.manual_seed(num_levels)
    return BayesLinear(21, 6, bias, num_levels=num_levels, granularity=granularity).eval()


def make_conv2d(num_levels: int = 3, granularity: str = "tensor", **geometry: Any) -> BayesConv2d:
    torch.manual_seed(num_levels)
    return BayesConv2d(4, 6, **geometry, num_levels=num_levels, granularity=granularity).eval()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_linear_decodes_to_the_quantized_weight(num_levels: int, granularity: str) -> None:
    bayes = make_linear(num_levels, granularity)
    packed = pack_layer(bayes)
    assert torch.equal(packed.decode(), bayes.quantized_weight())
    assert (packed.num_levels, packed.granularity, packed.precision) == (num_levels, granularity, "fp32")
    codebooks = 6 if granularity == "channel" else 1
    assert packed.nbytes == 6 * packed_width(21, num_levels) + 4 * codebooks * num_levels + 4 * 6


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("num_levels", EVERY_M)
def test_conv2d_decodes_to_the_quantized_weight(num_levels: int, granularity: str) -> None:
    bayes = make_conv2d(num_levels, granularity, kernel_size=3, groups=2)
    packed = pack_layer(bayes)
    assert torch.equal(packed.decode(), bayes.quantized_weight())
    assert (packed.num_levels, packed.granularity) == (num_levels, granularity)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_output(execution: str, bias: bool) -> None:
    bayes = make_linear(bias=bias)
    packed = pack_layer(bayes, execution=execution)
    for shape in ((5, 21), (2, 3, 21), (21,), (0, 21)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), bayes(x), rtol=1e-5, atol=1e-6)
        assert packed(x.double()).dtype == torch.float64
    assert packed(x.half()).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv2d_output(geometry: dict[str, Any], execution: str) -> None:
    bayes = make_conv2d(**geometry)
    packed = pack_layer(bayes, execution=execution)
    x = torch.randn(3, 4, 9, 8)
    y = bayes(x)
    assert packed.rows(x) * 6 == y.numel()
    torch.testing.assert_close(packed(x), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed(x[0]), y[0], rtol=1e-5, atol=1e-6)
    assert packed(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_int8_is_the_same_bits_packed_and_dense(granularity: str) -> None:
    """Up to sums of 2**24, that is with 1040 columns or fewer: the dense product then is one of integers, exact."""
    x, images = torch.randn(5, 21), torch.randn(3, 4, 9, 8)
    linear = pack_layer(make_linear(5, granularity), "int8")
    assert torch.equal(executed(linear, "dense", x), executed(linear, "packed", x))
    conv2d = pack_layer(make_conv2d(5, granularity, kernel_size=3, padding=1), "int8")
    assert torch.equal(executed(conv2d, "dense", images), executed(conv2d, "packed", images))
    assert torch.equal(linear.decode(), make_linear(5, granularity).quantized_weight())  # which is not rounded


def test_int8_is_refused_where_sums_could_overflow() -> None:
    codes, levels = torch.zeros(1, 600_000, dtype=torch.uint8), torch.arange(16.0).unsqueeze(0)
    PackedLinear(1_200_000, codes, levels)
    with pytest.raises(ValueError, match="precision must not be 'int8' for 16 levels"):
        PackedLinear(1_200_000, codes, levels, precision="int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_executions_round_alike(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, images = torch.randn(2, 5, 21, generator=generator), torch.randn(3, 4, 9, 8, generator=generator)
    for layer, given in (
        (pack_layer(make_linear(), precision), x),
        (pack_layer(make_conv2d(kernel_size=3, padding=1), precision), images),
    ):
        dense, packed = executed(layer, "dense", given), executed(layer, "packed", given)
        torch.testing.assert_close(dense, packed, rtol=1e-5, atol=1e-6)


def executed(layer: PackedLayer, execution: str, x: Tensor) -> Tensor:
    """The layer's output with this execution; the layer stays as it is."""
    twin = copy.copy(layer)
    twin.execution = execution
    return twin(x)


def test_dense_weight_is_decoded_once_and_only_there() -> None:
    dense, packed = (pack_layer(make_linear(), execution=execution) for execution in ("dense", "packed"))
    x = torch.randn(2, 21)
    kept = len(dense_packed.weights)
    with torch.inference_mode():
        dense(x), packed(x)
    assert len(dense_packed.weights) == kept + 1
    key = (dense.codes, dense.levels), 21, "fp32"
    weight = dense_packed.weights(*key)
    assert not weight.values.is_inference()
    assert dense(x) is not None
    assert dense_packed.weights(*key) is weight
    assert set(dense.state_dict()) == {"codes", "levels", "bias", "chances"}
    assert copy.deepcopy(dense)._prepared is None
    del key, dense
    assert len(dense_packed.weights) == kept


def test_loading_a_state_dict_replaces_the_dense_weight() -> None:
    first, other = make_linear(), make_linear()
    x = torch.randn(2, 21)
    nn.init.normal_(other.weight)
    packed = pack_layer(first, execution="dense")
    assert not torch.allclose(packed(x), other(x))
    packed.load_state_dict(pack_layer(other).state_dict())
    torch.testing.assert_close(packed(x), other(x), rtol=1e-5, atol=1e-6)


def test_loading_a_wrong_state_dict_is_refused() -> None:
    packed = pack_layer(make_linear())
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["levels"] = state["levels"].flip(1)
    with pytest.raises(RuntimeError, match="levels must be finite and strictly increasing"):
        packed.load_state_dict(state)


def test_casts_keep_the_levels() -> None:
    packed = pack_layer(make_linear())
    levels, x = packed.levels.clone(), torch.randn(2, 21)
    packed.bfloat16()
    assert (packed.levels.dtype, packed.bias.dtype) == (torch.float32, torch.bfloat16)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    packed.double()
    assert packed.bias.dtype == torch.float64
    assert packed(x.double()).dtype == torch.float64
    assert torch.equal(packed.float().levels, levels)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_autocast_leaves_the_precision_alone(execution: str) -> None:
    packed, x = pack_layer(make_linear(), execution=execution), torch.randn(2, 21)
    expected = packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_compile_and_export(execution: str) -> None:
    net = nn.Sequential(
        pack_layer(make_conv2d(kernel_size=(2, 3), padding="same"), execution=execution),
        nn.Flatten(),
        PackedLinear(
            6 * 72, pack_codes(torch.zeros(5, 6 * 72).byte(), 2), torch.tensor([[-1.0, 1.0]]), None, "fp32", execution
        ),
    )
    x = torch.randn(3, 4, 9, 8)
    expected = copy.deepcopy(net)(x)
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:2]), expected[:2])
    assert sum("packed" in str(node.target) and node.op == "call_function" for node in program.graph.nodes) == 2


def test_repr_says_what_it_is() -> None:
    assert repr(pack_layer(make_linear())) == (
        "PackedLinear(in_features=21, out_features=6, bias=True, num_levels=3, granularity='tensor', precision='fp32', "
        "execution='auto')"
    )
    layer = make_conv2d(kernel_size=3, padding="same", groups=2, granularity="channel")
    assert repr(pack_layer(layer, "int8", "packed")) == (
        "PackedConv2d(4, 6, kernel_size=(3, 3), padding='same', groups=2, bias=True, num_levels=3, "
        "granularity='channel', precision='int8', execution='packed')"
    )


def _arguments(**changes: Any) -> dict[str, Any]:
    codes = pack_codes(torch.ones(4, 9).byte(), 3)
    return {"in_channels": 1, "kernel_size": 3, "codes": codes, "levels": torch.tensor([[-1.0, 0.0, 1.0]]), **changes}


def _byte(value: int) -> Tensor:
    codes = pack_codes(torch.ones(4, 9).byte(), 3)
    codes[3, 1] = value
    return codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"codes": _byte(81)}, "codes must .* byte 1 of channel 3 must be below 81, got 81", id="padding-digit"
        ),
        pytest.param({"codes": _byte(0)[:, :1]}, "codes must have 2 bytes a channel", id="codes-width"),
        pytest.param(
            {"levels": torch.tensor([[0.0, 0.0, 1.0]])}, "levels must be finite and strictly", id="levels-equal"
        ),
        pytest.param(
            {"levels": torch.tensor([[1.0, 0.0, 2.0]])}, "levels must be finite and strictly", id="levels-order"
        ),
        pytest.param({"levels": torch.tensor([[0.0, 1.0, float("nan")]])}, "levels must be finite", id="levels-nan"),
        pytest.param({"levels": torch.tensor([[0.0, 1.0, float("inf")]])}, "levels must be finite", id="levels-inf"),
        pytest.param({"levels": torch.zeros(2, 3)}, "levels must have the shape", id="levels-shape"),
        pytest.param({"bias": torch.zeros(3)}, "bias must have the shape", id="bias"),
        pytest.param({"groups": 3, "in_channels": 3}, "groups must divide", id="groups"),
        pytest.param({"padding": "full"}, "padding must be", id="padding"),
        pytest.param({"padding": "same", "stride": 2}, "stride must be 1", id="same-stride"),
        pytest.param({"padding_mode": "mirror"}, "padding_mode must be", id="padding-mode"),
        pytest.param({"stride": (1, 0)}, "stride must be", id="stride"),
        pytest.param({"precision": "fp8"}, "precision must be", id="precision"),
        pytest.param({"execution": "fast"}, "execution must be", id="execution"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    PackedConv2d(**_arguments())
    with pytest.raises(ValueError, match=message):
        PackedConv2d(**_arguments(**change))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_bad_activations(execution: str) -> None:
    linear = pack_layer(make_linear(), execution=execution)
    # 22 columns take as many bytes as 21: only the layer knows that they are too many.
    assert packed_width(22, 3) == packed_width(21, 3)
    with pytest.raises(ValueError, match=r"x must have the shape \[..., 21\], got \[2, 22\]"):
        linear(torch.randn(2, 22))
    with pytest.raises(TypeError, match="x must be floating point"):
        linear(torch.ones(2, 21, dtype=torch.int64))
    conv2d = pack_layer(make_conv2d(kernel_size=3), execution=execution)
    with pytest.raises(ValueError, match=r"x must have the shape \[batch, 4, height, width\], got \[2, 3, 9, 9\]"):
        conv2d(torch.randn(2, 3, 9, 9))
