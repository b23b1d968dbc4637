"""dequantize: torch's own layers with the decoded weights, tied as they were, that compute what the packed ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.bayes.base import BayesLayer
from bqnn.packed.base import PackedLayer
from tests.support.odd_nets import ODD_NETS, UNCOPIABLE_NETS, Tied, TiedEmbedding
from tests.support.packed_nets import Shared, packed_odd


def make(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def check(plain: nn.Module, packed: nn.Module, x: Tensor) -> None:
    """``plain`` gives the outputs of ``packed``, up to the order of summation, and has none of its layers."""
    assert not [name for name, module in plain.named_modules() if isinstance(module, (PackedLayer, BayesLayer))]
    assert not any(module.training for module in plain.modules())
    expected = packed(x)
    torch.testing.assert_close(plain(x), expected, rtol=0.0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ODD_NETS)
def test_networks_of_every_kind(kind: Any) -> None:
    x, converted = kind.example(), bqnn.convert(make(kind), 3).eval()
    packed = bqnn.pack(converted)
    for net in (converted, packed, bqnn.pack(converted, "int8")):
        plain = bqnn.dequantize(net)
        check(plain, packed, x)
        assert {name: type(each) for name, each in plain.named_modules()} == {
            name: type(each) for name, each in make(kind).named_modules()
        }
        assert plain.state_dict().keys() == make(kind).state_dict().keys()
    check(bqnn.dequantize(copy.deepcopy(packed)), packed, x)


def test_every_geometry_bias_and_skipped_layers() -> None:
    for granularity in ("tensor", "channel"):
        packed = packed_odd(granularity=granularity)
        x = torch.randn(3, 4, 7, 5, generator=torch.Generator().manual_seed(1))
        plain: Any = bqnn.dequantize(packed)
        check(plain, packed, x)
        assert plain.conv.bias is None and (plain.conv.groups, plain.conv.dilation) == (2, (1, 2))
        assert plain.same.padding == "same" and plain.same.padding_mode == "reflect"
        assert torch.equal(plain.conv.weight, packed.conv.decode())
        buffers = dict(packed.named_buffers())
        assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers() if value.numel())


def test_ties_stay() -> None:
    tied = bqnn.dequantize(bqnn.pack(bqnn.convert(make(Tied), 3)))
    assert tied.a.weight is tied.b.weight and isinstance(tied.a.weight, nn.Parameter)
    net = bqnn.convert(make(TiedEmbedding), 3, skip=[nn.Embedding])
    for source in (net, bqnn.pack(net)):
        plain: Any = bqnn.dequantize(source)
        assert plain.embedding.weight is plain.head.weight and type(plain.embedding) is nn.Embedding
    shared: Any = bqnn.dequantize(bqnn.pack(bqnn.convert(make(Shared), 3)))
    assert shared.first is shared.again


def test_relus_come_back() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    packed: Any = bqnn.pack(bqnn.convert(net, 3))
    assert type(packed[1]) is nn.Identity and packed[0].relu
    plain: Any = bqnn.dequantize(packed)
    assert [type(each) for each in plain[:2]] + [type(each) for each in plain[2]] == [nn.Linear, nn.ReLU] * 2
    assert type(packed[1]) is nn.Identity and packed[0].relu, "the network itself is left alone"
    check(plain, packed, torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
    layer = bqnn.PackedLinear(3, torch.zeros(2, 1, dtype=torch.uint8), torch.tensor([[-1.0, 1.0]]), relu=True)
    assert [type(each) for each in bqnn.dequantize(layer)] == [nn.Linear, nn.ReLU]
    check(bqnn.dequantize(layer), layer, torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, 0.5]]))


def test_dtype_hooks_and_attributes() -> None:
    seen: list[torch.Size] = []
    net: Any = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net[2].note = "kept"
    packed = bqnn.pack(bqnn.convert(net, 3)).to(torch.bfloat16)
    plain: Any = bqnn.dequantize(packed)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    assert plain[2].note == "kept" and vars(plain[2]).keys() - {"note"} == vars(nn.Linear(1, 1)).keys()
    plain(torch.ones(3, 5, dtype=torch.bfloat16))
    assert seen == [torch.Size([3, 4])]


def test_what_was_loaded(tmp_path: Path) -> None:
    net = bqnn.pack(bqnn.convert(bqnn.models.lenet5(), 3))
    bqnn.save(net, tmp_path / "net")
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    loaded = bqnn.load(tmp_path / "net")
    with torch.inference_mode():
        plain = bqnn.dequantize(loaded)
    check(plain, net, x)
    assert list(plain.state_dict()) == list(bqnn.models.lenet5().state_dict())
    plain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_a_network_that_holds_no_layer_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="net must have packed or Bayes layers.*got none"):
        bqnn.dequantize(nn.Linear(3, 2))
    with pytest.raises(TypeError, match="net must be"):
        bqnn.dequantize(torch.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", UNCOPIABLE_NETS)
def test_what_a_copy_would_not_follow_is_refused(kind: Any) -> None:
    packed = bqnn.pack_(bqnn.convert_(make(kind), 3))
    with pytest.raises(ValueError, match="net can not be copied"):
        bqnn.dequantize(packed)


def test_a_forward_of_its_own_is_refused() -> None:
    packed: Any = bqnn.pack(bqnn.convert(nn.Sequential(nn.Linear(3, 2)), 3))
    packed[0].forward = lambda x: x
    with pytest.raises(ValueError, match="layer '0' has a forward of its own"):
        bqnn.dequantize(packed)
