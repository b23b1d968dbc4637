"""The likelihoods of classification and regression, against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Normal

import bqnn
from bqnn.bayes.likelihood import LEAST_NOISE, MEMORY, CategoricalLikelihood, GaussianLikelihood


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [pytest.param((), id="classes"), pytest.param((3, 5), id="pixels")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_classes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, likelihood = draw(7, 4, *shape), CategoricalLikelihood()
    classes = torch.randint(4, (7, *shape), generator=torch.Generator().manual_seed(1))
    log_probs = Categorical(logits=logits.movedim(1, -1)).log_prob(classes)
    torch.testing.assert_close(likelihood(logits, classes.to(dtype)), -log_probs.sum() / 7)
    wrong = likelihood.average(likelihood.losses(logits, classes.to(dtype)))
    assert likelihood.summarize(wrong) == pytest.approx(100 * (logits.argmax(1) != classes).double().mean().item())


def test_probabilities() -> None:
    logits, target, likelihood = draw(7, 4), draw(7, 4, seed=1).softmax(1), CategoricalLikelihood()
    torch.testing.assert_close(likelihood(logits, target), -(target * logits.log_softmax(1)).sum() / 7)
    assert torch.equal(likelihood.losses(logits, target), (logits.argmax(1) != target.argmax(1)).float())


@pytest.mark.parametrize(
    ("output", "target", "error"),
    [
        pytest.param(draw(7), torch.zeros(7, dtype=torch.long), r"two classes or more, got the shape \[7\]", id="rank"),
        pytest.param(draw(7, 1), torch.zeros(7, dtype=torch.long), 'task="regression"', id="one-logit"),
        pytest.param(draw(7, 3), torch.zeros(7), r"probabilities of the shape \[7, 3\], got \[7\]", id="float"),
        pytest.param(draw(7, 3), torch.zeros(7, 1).long(), r"classes of the shape \[7\], got \[7, 1\]", id="column"),
    ],
)
def test_classes_that_do_not_fit(output: torch.Tensor, target: torch.Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        CategoricalLikelihood()(output, target)


@pytest.mark.parametrize("shape", [pytest.param((9,), id="B"), pytest.param((9, 3), id="B-D"), (9, 2, 5)])
def test_noise_is_a_running_mean_of_squares(shape: tuple[int, ...]) -> None:
    likelihood = GaussianLikelihood()
    dims = (0,) if len(shape) == 2 else tuple(range(len(shape)))
    squares, weights = [], []
    for step in range(4):
        output, target = draw(*shape, seed=step), draw(*shape, seed=10 + step)
        found = likelihood(output, target)
        squares.append((output - target).square().mean(dims))
        weights = [MEMORY * weight for weight in weights] + [1.0]
        variance = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
        torch.testing.assert_close(likelihood.variance, variance)
        expected = -Normal(output, variance.sqrt()).log_prob(target).sum() / shape[0]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(likelihood.nll(output, target), expected)


def test_a_perfect_fit_has_a_finite_likelihood() -> None:
    target, likelihood = draw(50, 2), GaussianLikelihood()
    assert torch.isfinite(likelihood(target, target))
    torch.testing.assert_close(likelihood.variance, (LEAST_NOISE * target.var(correction=0)).expand(2))
    assert torch.isfinite(GaussianLikelihood()(torch.zeros(3), torch.zeros(3)))


@pytest.mark.parametrize(("output", "target"), [((5, 1), (5,)), ((5,), (5, 1)), ((1, 1), (1,)), ((5, 2, 1), (5, 2))])
def test_a_last_dimension_of_one_may_be_left_out(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    x, y = draw(*output), draw(*target, seed=1)
    found = GaussianLikelihood().losses(x, y)
    torch.testing.assert_close(found.flatten(), (x.flatten() - y.flatten()).square())


@pytest.mark.parametrize(("output", "target"), [((5, 2), (5,)), ((5,), (4,)), ((5, 3), (5, 1))])
def test_shapes_that_do_not_fit(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="target must have the shape of the network's output"):
        GaussianLikelihood()(draw(*output), draw(*target))


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        GaussianLikelihood()(draw(3), [1.0, 2.0, 3.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the network's output must be a tensor, got tuple"):
        CategoricalLikelihood()((draw(3, 3),), torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"output \[\], got \[\]"):
        GaussianLikelihood()(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="must have seen a batch"):
        GaussianLikelihood().nll(draw(3), draw(3))


def test_in_the_objective() -> None:
    torch.manual_seed(0)
    net, likelihood = bqnn.BayesLinear(3, 2), GaussianLikelihood()
    output, target = net(draw(8, 3).float()), draw(8, 2).float()
    terms = bqnn.elbo(output, target, net, 100, nll=likelihood)
    squares = (output - target).square().mean(0).double()
    torch.testing.assert_close(terms.nll.double(), 0.5 * (1.0 + (2 * torch.pi * squares).log()).sum())
    (gradient,) = torch.autograd.grad(terms.nll, output)
    torch.testing.assert_close(gradient.double(), ((output - target) / squares / 8).double())
