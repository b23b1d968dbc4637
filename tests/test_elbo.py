"""The objective: its terms, the divergence of the whole network counted once, warm-up and parameter groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bqnn import BayesConv2d, BayesLinear, elbo, kl_divergence, kl_warmup, parameter_groups

PRIORS = ["spike_slab", "gaussian", "mixture"]


def make_net(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        BayesConv2d(2, 4, 3, padding=1, **options),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 9),
        nn.Sequential(nn.ReLU(), BayesLinear(9, 9, **options)),
        BayesLinear(9, 5, bias=False, **options),
    )


X = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("prior", PRIORS)
def test_the_divergence_is_the_sum_over_all_layers(prior: str) -> None:
    net = make_net(prior=prior)
    layers = [net[0], net[4][1], net[5]]
    each = [layer.kl_divergence() for layer in layers]
    assert all(term > 0.0 for term in each)
    torch.testing.assert_close(kl_divergence(net), each[0] + each[1] + each[2])
    torch.testing.assert_close(kl_divergence(net[5]), each[2])


@pytest.mark.parametrize("prior", PRIORS)
def test_a_shared_layer_counts_once(prior: str) -> None:
    net = make_net(prior=prior)
    once = kl_divergence(net)
    net.append(net[4])
    net.append(net[4][1])
    torch.testing.assert_close(kl_divergence(net), once)


def test_deterministic_layers_have_no_divergence() -> None:
    net = make_net(estimator="deterministic")
    assert kl_divergence(net).item() == 0.0
    mixed = nn.Sequential(net, BayesLinear(5, 5))
    torch.testing.assert_close(kl_divergence(mixed), mixed[1].kl_divergence())


def test_the_loss_is_nll_plus_divergence_over_the_data_set() -> None:
    net = make_net()
    output = net(X)
    terms = elbo(output, Y, net, dataset_size=600, kl_weight=0.25)
    likelihood, kl = F.cross_entropy(output, Y), kl_divergence(net)
    assert torch.equal(terms.nll, likelihood)
    assert torch.equal(terms.kl, kl)
    torch.testing.assert_close(terms.loss, likelihood + 0.25 * kl / 600)
    torch.testing.assert_close(elbo(output, Y, net, 600).loss, likelihood + kl / 600)
    assert torch.equal(elbo(output, Y, net, 600, kl_weight=0.0).loss, likelihood)


def test_another_likelihood() -> None:
    net = make_net()
    output, target = net(X), torch.zeros(6, 5)
    terms = elbo(output, target, net, 10, nll=F.mse_loss)
    assert torch.equal(terms.nll, F.mse_loss(output, target))


def test_both_terms_have_gradients() -> None:
    net = make_net()
    terms = elbo(net(X), Y, net, 10)
    (likelihood,) = torch.autograd.grad(terms.nll, net[5].mean, retain_graph=True)
    (kl,) = torch.autograd.grad(terms.kl, net[5].mean, retain_graph=True)
    (both,) = torch.autograd.grad(terms.loss, net[5].mean)
    assert likelihood.any() and kl.any()
    torch.testing.assert_close(both, likelihood + kl / 10)


def test_layers_of_two_dtypes() -> None:
    net = nn.Sequential(BayesLinear(3, 3), BayesLinear(3, 3, dtype=torch.float64))
    each = [layer.kl_divergence().item() for layer in net]
    assert kl_divergence(net).item() == pytest.approx(sum(each))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"dataset_size": 0}, "dataset_size must be at least 1, got 0", id="no-data"),
        pytest.param({"dataset_size": -5}, "dataset_size must be at least 1, got -5", id="negative-data"),
        pytest.param({"dataset_size": 5, "kl_weight": -0.1}, "kl_weight must be at least 0, got -0.1", id="kl-weight"),
        pytest.param({"dataset_size": 5, "kl_weight": float("nan")}, "kl_weight must be at least 0", id="kl-nan"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    net = make_net()
    with pytest.raises(ValueError, match=message):
        elbo(torch.zeros(6, 5), Y, net, **arguments)  # type: ignore[arg-type]


def test_a_network_without_bayes_layers() -> None:
    with pytest.raises(ValueError, match="net has no Bayes layer"):
        elbo(torch.zeros(6, 5), Y, nn.Linear(3, 3), 10)


@pytest.mark.parametrize(
    ("progress", "length", "expected"),
    [(0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0), (99, 10, 1.0), (-1, 10, 0.0), (0, 0, 1.0), (3, 0, 1.0), (0.5, 2, 0.25)],
)
def test_warmup(progress: float, length: float, expected: float) -> None:
    assert kl_warmup(progress, length) == expected


def tied() -> nn.Sequential:
    """Two layers with one weight between them."""
    net = nn.Sequential(BayesLinear(4, 4), BayesLinear(4, 4), nn.Linear(4, 4))
    net[1].mean = net[0].mean
    net[2].bias = net[0].bias
    return net


def shared() -> nn.Sequential:
    net = make_net(partition="learned")
    net.append(net[4])
    return net


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(make_net(), id="nearest"),
        pytest.param(make_net(partition="learned"), id="learned"),
        pytest.param(shared(), id="shared-layer"),
        pytest.param(tied(), id="tied-weight"),
        pytest.param(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), id="no-bayes-layer"),
        pytest.param(BayesLinear(3, 3, bias=False), id="one-layer"),
    ],
)
def test_groups_hold_every_parameter_once(net: nn.Module) -> None:
    groups = parameter_groups(net, 0.1, weight_decay=0.01)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in net.parameters()}
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.SGD(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]


def test_groups_have_the_rates_and_decay_of_their_kind() -> None:
    net = make_net(partition="learned")
    groups = {
        group["name"]: group
        for group in parameter_groups(net, 0.5, codebook_lr=0.02, variance_lr=3.0, weight_decay=0.01)
    }
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert members == {
        "means": {"0.weight", "4.1.weight", "5.weight"},
        "variances": {"0.log_sigma2", "4.1.log_sigma2", "5.log_sigma2"},
        "codebooks": {f"{i}.raw_{kind}" for i in ("0", "4.1", "5") for kind in ("levels", "thresholds")},
        "weights": {"3.weight"},
        "biases": {"0.bias", "1.weight", "1.bias", "3.bias", "4.1.bias"},
    }
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "means": (0.5, 0.0),
        "variances": (1.5, 0.0),
        "codebooks": (pytest.approx(0.01), 0.0),
        "weights": (0.5, 0.01),
        "biases": (0.5, 0.0),
    }
