"""MultiheadAttention and what is made of it: projections as layers of their own, as torch's with quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.core.attention import ComposedAttention
from tests.support.composed import check_equal, check_life, quantized

LENGTHS = 5, 7
SIZES = [
    pytest.param({}, id="plain"),
    pytest.param({"batch_first": True, "bias": False}, id="batch-first-no-bias"),
    pytest.param({"kdim": 6, "vdim": 10}, id="kdim-vdim"),
    pytest.param({"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, id="bias-kv-zeros"),
    pytest.param({"add_bias_kv": True, "vdim": 4}, id="bias-kv-vdim"),
]


def attention(options: dict[str, Any]) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    layer = nn.MultiheadAttention(8, 2, **options)
    for parameter in layer.parameters():  # torch starts biases at 0
        nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(options: dict[str, Any], batch: int | None = 3) -> list[Tensor]:
    torch.manual_seed(4)
    widths = 8, options.get("kdim", 8), options.get("vdim", 8)
    shapes = [(length, *([batch] if batch else []), width) for length, width in zip((5, 7, 7), widths)]
    tensors = [torch.randn(shape) for shape in shapes]
    return [each.transpose(0, 1) for each in tensors] if batch and options.get("batch_first") else tensors


@pytest.mark.parametrize("options", SIZES)
def test_it_is_torchs_layer_with_the_quantized_weights(options: dict[str, Any]) -> None:
    given, options_of_layers = inputs(options), {"granularity": "channel"} if options else {}
    check_equal(attention(options), lambda net: [*net(*given), net(*given, need_weights=False)[0]], **options_of_layers)


PADDING = torch.arange(7) >= torch.tensor([[7], [4], [5]])
MASKS = {
    "attn": {"attn_mask": torch.rand(LENGTHS, generator=torch.Generator().manual_seed(0)) > 0.6},
    "attn-float": {"attn_mask": torch.linspace(-2, 1, 35).view(LENGTHS)},
    "attn-heads": {"attn_mask": torch.rand(6, *LENGTHS, generator=torch.Generator().manual_seed(1)) > 0.6},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": torch.ones(LENGTHS).triu(3).bool(), "key_padding_mask": PADDING},
    "causal": {"attn_mask": torch.ones(LENGTHS).triu(1).bool(), "is_causal": True},
}


@pytest.mark.parametrize("options", [SIZES[0], SIZES[3]])
def test_masks(options: dict[str, Any]) -> None:
    *forms, plain = quantized(attention(options))
    for name, mask in MASKS.items():
        for need_weights, average in ((True, True), (True, False), (False, True)):
            if name == "causal" and options and not need_weights:
                continue  # torch's hint leaves out the columns that bias_k adds
            given = {"need_weights": need_weights, "average_attn_weights": average, **mask}
            expected = plain(*inputs(options), **given)
            for form in forms:
                found = form(*inputs(options), **given)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_without_a_batch() -> None:
    given = {"key_padding_mask": torch.arange(7) > 5, "attn_mask": torch.rand(2, *LENGTHS) > 0.7}
    averages = (True, False)
    check_equal(
        attention({}), lambda net: [net(*inputs({}, None), average_attn_weights=each, **given) for each in averages]
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_reads_quantized_weights_on_every_path(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
    net, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval(), torch.randn(4, 4, 8)
    padding = torch.arange(4) >= torch.tensor([[4], [3], [2], [4]])
    with torch.no_grad():
        check_equal(net, lambda each: each(x))
        check_equal(
            net, lambda each: each(x, src_key_padding_mask=padding)[~padding.T if not batch_first else ~padding]
        )
        bayes, packed, plain = quantized(net)
        exact = net(x)
        for each in (bayes, packed):
            assert (each(x) - exact).abs().max() > 1e-2, "full precision"


def test_a_decoder() -> None:
    torch.manual_seed(6)
    net, x, memory = nn.TransformerDecoderLayer(8, 2, 12).eval(), torch.randn(3, 2, 8), torch.randn(5, 2, 8)
    check_equal(net, lambda each: each(x, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3)))


def test_from_convert_to_a_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(7)
    net, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0), torch.randn(4, 5, 8)
    packed = check_life(net, x, tmp_path / "net", 6)
    assert type(packed.self_attn) is ComposedAttention and isinstance(packed.self_attn, nn.MultiheadAttention)
    assert isinstance(packed.self_attn.q_proj, bqnn.PackedLinear)
    assert {layer.name for layer in bqnn.explain_speed(packed, x)} >= {"self_attn.q_proj", "self_attn.out_proj"}
    torch.testing.assert_close(bqnn.compile(packed, x)(x), packed(x))


def test_gradients_in_float64() -> None:
    net = attention({"kdim": 6, "batch_first": True}).double()
    given = [each[:, :2].double().requires_grad_() for each in inputs({"kdim": 6, "batch_first": True}, 1)]
    bayes = bqnn.convert(net, 3, estimator="deterministic")
    for each in (bayes, bqnn.pack(bayes)):
        assert torch.autograd.gradcheck(lambda *x, each=each: each(*x, need_weights=False)[0], given)


def test_dropout_drops_in_training_alone() -> None:
    net = bqnn.convert(attention({"dropout": 0.5}), 3, estimator="deterministic")
    given = inputs({})
    assert not torch.equal(net(*given)[0], net(*given)[0]) and (net(*given)[1] == 0).any()
    assert torch.equal(net.eval()(*given)[0], net(*given)[0])


def test_options_and_skips_of_parts() -> None:
    net = nn.ModuleDict({"a": attention({}), "b": nn.Linear(8, 8)})
    overrides = {"a": {"num_levels": 4}, "a.k_proj": {"num_levels": 16}}
    bayes: Any = bqnn.convert(net, 3, overrides=overrides, skip=["a.v_proj"])
    levels = {name: layer.num_levels for name, layer in bqnn.bayes.layers.bayes_layers(bayes).items()}
    assert levels == {"a.q_proj": 4, "a.k_proj": 16, "a.out_proj": 4, "b": 3}
    assert type(bayes.a.v_proj) is nn.Linear
    assert type(bqnn.convert(net, 3, skip=["a"]).a) is nn.MultiheadAttention
    assert type(bqnn.convert(net, 3, skip=[nn.MultiheadAttention]).a) is nn.MultiheadAttention


def test_layers_that_share_a_weight_share_its_parts() -> None:
    one, two = attention({}), attention({})
    two.in_proj_weight = one.in_proj_weight
    bayes: Any = bqnn.convert(nn.ModuleList([one, two]), 3)
    assert bayes[0].k_proj.mean is bayes[1].k_proj.mean and bayes[0].out_proj.mean is not bayes[1].out_proj.mean


def test_what_can_not_be_converted_leaves_the_network_as_it_was() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = attention({}), nn.Linear(8, 8)
            self.kept = [self.a.in_proj_weight]

    net = Reads()
    kinds, state = [type(module) for module in net.modules()], list(net.state_dict())
    with pytest.raises(ValueError, match=r"layer 'a': net.kept\[0\] has the memory of its weight"):
        bqnn.convert_(net)
    net.kept.clear()
    with pytest.raises(ValueError, match="num_levels must be from 2 to 16"):
        bqnn.convert_(net, 17)
    assert [type(module) for module in net.modules()] == kinds and list(net.state_dict()) == state
    assert net.a(*inputs({}))[0].shape == (5, 3, 8)


def test_weights_can_be_read_and_not_assigned() -> None:
    net: Any = bqnn.convert(attention({}), 3).eval()
    assert torch.equal(net.q_proj_weight.clone(), net.q_proj.quantized_weight()) and net.in_proj_bias.shape == (24,)
    for name in ("in_proj_weight", "q_proj_weight", "in_proj_bias"):
        with pytest.raises(TypeError, match=f"{name} of a ComposedAttention is that of its parts"):
            setattr(net, name, nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"is_causal": True}, ValueError, "attn_mask must be given with is_causal", id="causal"),
        pytest.param({"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask must be bool or floating", id="int"),
        pytest.param({"key": torch.ones(6, 3, 8)}, ValueError, "key and value must be as long", id="lengths"),
        pytest.param({"query": torch.ones(5, 8)}, ValueError, "query, key and value must have 3 dimensions", id="dims"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = dict(zip(("query", "key", "value"), inputs({})))
    with pytest.raises(error, match=message):
        bqnn.convert(attention({}), 3)(**{**given, **change})
