"""How networks are called and what of their output is meant, by fit, elbo, predict and ensembles alike."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bqnn.core.inputs import logits_of

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face has it: fields are keys too, and those that are None are not there."""

    def __init__(self, **fields: Any) -> None:
        super().__init__({name: value for name, value in fields.items() if value is not None})
        for name, value in fields.items():
            object.__setattr__(self, name, value)


class WithAuxiliary(NamedTuple):
    """As torchvision's Inception returns it."""

    logits: Tensor
    aux_logits: Tensor


class Holds(nn.Module):
    """A network whose output is made of its logits by a function."""

    def __init__(self, hold: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.hold = hold

    def forward(self, x: Tensor) -> Any:
        return self.hold(self.layers(x))


def itself(logits: Tensor) -> Tensor:
    return logits


HELD = [
    pytest.param(lambda y: ModelOutput(loss=None, logits=y, hidden_states=(y + 1,)), id="model-output"),
    pytest.param(lambda y: {"features": y + 1, "logits": y}, id="dict"),
    pytest.param(lambda y: {"out": y, "aux": y + 1}, id="segmentation"),
    pytest.param(lambda y: UserDict(logits=y), id="mapping"),
    pytest.param(lambda y: WithAuxiliary(y, y + 1), id="named-tuple"),
    pytest.param(lambda y: (y, y + 1), id="tuple"),
    pytest.param(lambda y: [y.sum(), y], id="loss-first"),
]


@pytest.mark.parametrize("hold", HELD)
def test_logits_are_found_by_all(hold: Callable[[Tensor], Any]) -> None:
    plain, holding = bqnn.convert(Holds(itself), 3), bqnn.convert(Holds(hold), 3)
    torch.manual_seed(1)
    expected = bqnn.elbo(plain(X), Y, plain, 24)
    torch.manual_seed(1)
    found = bqnn.elbo(holding(X), Y, holding, 24)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.nll, expected.nll)
    assert torch.equal(bqnn.predict(holding, X).probs, bqnn.predict(plain, X).probs)
    assert torch.equal(bqnn.predict(holding, X, 3, seed=0).entropy, bqnn.predict(plain, X, 3, seed=0).entropy)
    both = bqnn.predict(bqnn.Ensemble([plain, holding]), {"x": X})
    torch.testing.assert_close(both.probs, bqnn.predict(plain, X).probs)


@pytest.mark.parametrize("hold", HELD[:1] + HELD[-1:])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_fit_trains_the_same(hold: Callable[[Tensor], Any], task: str) -> None:
    batches = [(X, Y if task == "classification" else X[:, :2])] * 2
    results = [
        bqnn.fit(Holds(each), batches, validation=batches, epochs=(1, 1, 1), task=task, seed=0, autocast=torch.bfloat16)
        for each in (itself, hold)
    ]
    assert [r["nll"] for r in results[0].history] == [r["nll"] for r in results[1].history]
    assert [r["validation_nll"] for r in results[0].history] == [r["validation_nll"] for r in results[1].history]


def test_regressions_find_theirs_in_elbo_too() -> None:
    net = bqnn.convert(Holds(lambda y: {"logits": y}), 3)
    likelihood = bqnn.GaussianLikelihood()
    assert torch.isfinite(bqnn.elbo(net(X), X[:, :2], net, 24, nll=likelihood).loss)
    assert likelihood.variance is not None and likelihood.variance.shape == (2,)


def test_a_likelihood_of_ones_own_gets_what_the_network_made() -> None:
    net = bqnn.convert(Holds(lambda y: {"first": y, "second": 2 * y}), 3)

    def nll(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output["first"], target) + F.cross_entropy(output["second"], target)

    assert torch.isfinite(bqnn.elbo(net(X), Y, net, 24, nll=nll).loss)
    with pytest.raises(TypeError, match="output must be a tensor, .* as logits or out, got dict with first, second"):
        bqnn.elbo(net(X), Y, net, 24)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        pytest.param(None, "got NoneType", id="nothing"),
        pytest.param((), "got tuple", id="empty"),
        pytest.param([torch.tensor(1.0), "a"], "got list", id="loss-alone"),
        pytest.param({"logits": None, "last_hidden_state": X}, "got dict with logits, last_hidden", id="headless"),
    ],
)
def test_an_output_without_logits_is_refused(output: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"the network's output must be a tensor.*{got}"):
        logits_of(output)
    with pytest.raises(TypeError, match=got):
        bqnn.predict(Holds(lambda y: output), X)
    with pytest.raises(TypeError, match=got):
        bqnn.fit(Holds(lambda y: output), [(X, Y)], epochs=(1, 0, 0))
