"""LSTM, GRU and RNN: torch's own kernel on weights that are drawn, quantized or decoded once a call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bqnn
from bqnn.core.recurrent import ComposedLSTM
from tests.support.composed import check_equal, check_life, quantized

LAYERS = [
    pytest.param(nn.LSTM, {}, id="lstm"),
    pytest.param(nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False}, id="lstm-all"),
    pytest.param(nn.LSTM, {"num_layers": 2, "batch_first": True, "dropout": 0.5}, id="lstm-dropout"),
    pytest.param(nn.GRU, {"num_layers": 2, "bidirectional": True}, id="gru"),
    pytest.param(nn.RNN, {"nonlinearity": "relu", "batch_first": True}, id="rnn"),
]


class Tagger(nn.Module):
    """A recurrence and a head on every step."""

    def __init__(self, kind: Any, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = kind(5, 7, **options)
        width = (options.get("proj_size") or 7) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0])


def flat(output: Any) -> list[Tensor]:
    """The tensors of an output."""
    return [output] if isinstance(output, Tensor) else [each for part in output for each in flat(part)]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_it_is_torchs_layer_with_the_quantized_weights(kind: Any, options: Any, granularity: str) -> None:
    net, x = Tagger(kind, options).body, torch.randn(4, 4, 5)
    state = net(x)[1]
    check_equal(
        net, lambda each: [*flat(each(x)), *flat(each(x[:, 0])), *flat(each(x, state))], granularity=granularity
    )


def test_packed_sequences() -> None:
    net, x = Tagger(nn.LSTM, {"bidirectional": True}).body, torch.randn(6, 3, 5)
    sequence = pack_padded_sequence(x, torch.tensor([3, 6, 2]), enforce_sorted=False)
    check_equal(net, lambda each: pad_packed_sequence(each(sequence)[0])[0])


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_from_convert_to_a_file_and_back(kind: Any, options: Any, tmp_path: Path) -> None:
    net = Tagger(kind, {**options, **({"dropout": 0.0} if "dropout" in options else {})})
    weights = sum(name.startswith("weight") for name, _ in net.body.named_parameters())
    packed: Any = check_life(net, torch.randn(4, 3, 5), tmp_path / "net", weights + 1)
    assert isinstance(packed.body, kind) and isinstance(packed.body.ih_l0, bqnn.PackedLinear)


def test_compile_and_explain_leave_the_recurrence_to_torch() -> None:
    _, packed, _ = quantized(Tagger(nn.LSTM, {"batch_first": True}))
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(bqnn.compile(packed, x)(x), packed(x))
    assert [layer.name for layer in bqnn.explain_speed(packed, x)] == ["head"]


@pytest.mark.parametrize("estimator", ["moment", "sample", "local", "deterministic"])
def test_a_weight_is_drawn_once_a_call(estimator: str) -> None:
    """Each step of a sequence of equal inputs, from the same state, gives the same: the weight is one."""
    net: Any = bqnn.convert(nn.RNN(3, 4, bias=False), 3, estimator=estimator)
    net.hh_l0.mean.data.zero_()
    net.hh_l0.set_levels_(torch.tensor([[-1e-6, 0.0, 1e-6]]))  # no state to speak of
    net.ih_l0.log_sigma2.data.fill_(-1.0)
    y, again = (net(torch.ones(5, 2, 3))[0] for _ in range(2))
    torch.testing.assert_close(y[1:], y[:1].expand(4, 2, 4), rtol=0, atol=1e-4)
    assert torch.allclose(y, again, atol=1e-4) == (estimator == "deterministic")


def test_gradients_in_float64() -> None:
    net = bqnn.convert(nn.LSTM(2, 3, bidirectional=True, dtype=torch.float64), 3, estimator="deterministic")
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    for each in (net, bqnn.pack(net)):
        assert torch.autograd.gradcheck(lambda given, each=each: each(given)[0], x)

    def of_levels(raw_levels: Tensor) -> Tensor:
        return torch.func.functional_call(net, {"hh_l0.raw_levels": raw_levels}, (x.detach(),))[0]

    assert torch.autograd.gradcheck(of_levels, net.hh_l0.raw_levels.detach().clone().requires_grad_())


def test_weights_are_read_under_torchs_names_and_follow_copies_and_dtypes() -> None:
    net: Any = bqnn.convert(nn.LSTM(3, 4, 2), 3).eval()
    assert type(net) is ComposedLSTM
    assert torch.equal(net.weight_hh_l1.clone(), net.hh_l1.quantized_weight()) and net.bias_ih_l0 is net.ih_l0.bias
    assert [len(names) for names in net.all_weights] == [4, 4]
    with pytest.raises(TypeError, match="weight_ih_l0 of a ComposedLSTM is that of its parts and can not be assigned"):
        net.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
    x = torch.randn(5, 2, 3)
    for other in (copy.deepcopy(net), bqnn.pack(net), copy.deepcopy(bqnn.pack(net))):
        torch.testing.assert_close(other(x)[0], net(x)[0])
        assert other.double()(x.double())[0].dtype == torch.float64


def test_a_pruned_layer_is_refused() -> None:
    net = nn.Sequential(nn.LSTM(3, 4))
    prune.random_unstructured(net[0], "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match="layer '0' has a parametrized weight"):
        bqnn.convert_(net)
    assert type(net[0]) is nn.LSTM


def test_it_is_one_node_of_torch_fx() -> None:
    net, x = bqnn.convert(Tagger(nn.LSTM, {"batch_first": True}), 3).eval(), torch.randn(2, 3, 5)
    for each in (net, bqnn.pack(net)):
        graph = torch.fx.symbolic_trace(each)
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["body", "head"]
        torch.testing.assert_close(graph(x), each(x))
