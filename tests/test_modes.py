"""Modes belong to who asks: predictions of many threads at once, replicas, sampling, and an estimator that changes."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bqnn
from bqnn.bayes.base import BayesLayer
from bqnn.core.modes import in_evaluation, replica
from tests.support.odd_nets import Tied, TiedEmbedding

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def make_net(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)
    return bqnn.convert(nn.Sequential(*layers), 3, **options)


def run_at_once(*tasks: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_predictions_of_many_threads_are_those_of_one(training: bool) -> None:
    """While four threads sample, four more get the quantized network's own probabilities, bit by bit."""
    net = make_net().train(training)
    before = copy.deepcopy(net.state_dict())
    expected = bqnn.predict(net, X).probs
    sampling = [threading.Event() for _ in range(4)]

    def plain() -> None:
        while not all(event.is_set() for event in sampling):
            assert torch.equal(bqnn.predict(net, X).probs, expected)

    def sampled(done: threading.Event) -> None:
        try:
            for _ in range(4):
                found = bqnn.predict(net, X, samples=16)
                assert (found.mutual_information > 0.0).any() and not torch.equal(found.probs, expected)
        finally:
            done.set()

    run_at_once(*[plain] * 4, *[functools.partial(sampled, done) for done in sampling])
    assert [module.training for module in net.modules()] == [training] * len(list(net.modules()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_training_goes_on_while_others_predict() -> None:
    """Steps of a network that is being asked are the steps that it takes alone."""

    def train(net: nn.Module, steps: int) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(steps):
            assert all(module.training for module in net.modules())
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()

    alone, asked = (make_net(estimator="deterministic").train() for _ in range(2))
    for net in (alone, asked):
        net[3].p = 0.0  # Dropout draws from the generator that the threads share
    train(alone, 40)
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            bqnn.predict(asked, X)

    def work() -> None:
        try:
            train(asked, 40)
        finally:
            done.set()

    run_at_once(work, ask, ask)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, asked.state_dict()[name]), name


def test_sampling_is_of_its_thread_and_its_network() -> None:
    net, other = make_net().eval(), make_net().eval()
    with bqnn.sampling(net):
        assert net[0].sampling and net[4].sampling and not other[0].sampling
        with bqnn.sampling(other):
            assert net[0].sampling and other[0].sampling
        assert net[0].sampling and not other[0].sampling

        def elsewhere() -> None:
            assert not net[0].sampling
            assert torch.equal(net(X), net(X))

        run_at_once(elsewhere)
        assert not torch.equal(net(X), net(X))
        # DataParallel runs replicas in threads, for who is inside.
        assert net[0]._replicate_for_data_parallel()._replica_of_sampling
    assert not net[0].sampling
    with pytest.raises(KeyError), bqnn.sampling(net):
        raise KeyError
    assert not net[0].sampling


def test_replicas_share_tensors_and_nothing_else() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.tied = self.first
            self.listed = [self.first]
            self.by_name = {"norm": nn.BatchNorm1d(4)}
            self.norm = self.by_name["norm"]
            self.run = self.work
            self.constants = [1.0, 2.0]

        def work(self, x: Tensor) -> Tensor:
            return self.by_name["norm"](self.listed[0](x)) + self.training

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    net = Net().train()
    twin = replica(net)
    assert twin.tied is twin.first is twin.listed[0] is not net.first
    assert twin.norm is twin.by_name["norm"] is not net.norm
    assert twin.constants is net.constants
    for (name, tensor), own in zip(net.state_dict(keep_vars=True).items(), twin.state_dict(keep_vars=True).values()):
        assert tensor is own, name
    before = net.norm.running_mean.clone()
    expected = copy.deepcopy(net).eval()(X[:, :4])
    assert torch.equal(twin.eval()(X[:, :4]), expected)
    assert net.training and torch.equal(net.norm.running_mean, before)
    twin.first.register_forward_hook(lambda module, args, output: output * 0)
    assert not net.first._forward_hooks
    assert in_evaluation(net.eval()) is net


def test_replicas_of_compiled_and_scripted_modules_have_modes_of_their_own() -> None:
    plain = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5)).train()
    expected = copy.deepcopy(plain).eval()(X)
    called = copy.deepcopy(plain)
    called.compile(backend="eager")
    nets = [
        torch.compile(plain, backend="eager"),
        nn.Sequential(plain[0], torch.compile(plain[1], backend="eager")),
        torch.jit.script(plain),
        called,
    ]
    for net in nets:
        assert torch.equal(in_evaluation(net)(X), expected)
        assert net.training and not torch.equal(net(X), net(X))


@pytest.mark.parametrize("packed", [False, True], ids=["bayes", "packed"])
def test_a_compiled_network_is_sampled_as_it_is_uncompiled(packed: bool) -> None:
    net = make_net(start_sigma=0.4).eval()
    net = bqnn.pack(net, execution="packed") if packed else net
    expected = bqnn.predict(net, X, samples=3, seed=0)
    for compiled in (torch.compile(net, backend="eager"), nn.Sequential(torch.compile(net, backend="eager"))):
        assert torch.equal(bqnn.predict(compiled, X, samples=3, seed=0).probs, expected.probs)


def test_a_deterministic_layer_does_not_train_its_variance() -> None:
    layer: BayesLayer = make_net()[0]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        (layer(X).square().mean() + layer.kl_divergence()).backward()
        optimizer.step()

    step()
    layer.estimator = "deterministic"
    assert not layer.log_sigma2.requires_grad and layer.log_sigma2.grad is None
    before = layer.log_sigma2.clone()
    step()
    assert torch.equal(layer.log_sigma2, before)
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)
    layer.estimator = "sample"
    step()
    assert layer.log_sigma2.requires_grad and not torch.equal(layer.log_sigma2, before)
    with pytest.raises(ValueError, match="estimator must be one of moment, sample, local, deterministic, got 'mean'"):
        layer.estimator = "mean"
    assert layer.estimator == "sample"


def test_a_frozen_variance_stays_frozen() -> None:
    layer = make_net(estimator="deterministic")[0]
    assert not layer.log_sigma2.requires_grad
    layer.estimator = "moment"
    assert layer.log_sigma2.requires_grad
    layer.log_sigma2.requires_grad_(False)
    for estimator in ("deterministic", "deterministic", "local", "moment"):
        layer.estimator = estimator
        assert not copy.deepcopy(layer).log_sigma2.requires_grad


def test_a_tied_module_reads_the_weight_in_the_mode_of_its_own_replica() -> None:
    torch.manual_seed(0)
    net, x = bqnn.convert(TiedEmbedding(), 3, skip=[nn.Embedding]).eval(), TiedEmbedding.example()
    expected = bqnn.predict(net, x).probs
    net.train()
    original = net.embedding.weight
    twin = replica(net).eval()
    assert twin.embedding.weight is twin.head.weight is not original
    assert torch.equal(twin.embedding.weight.clone(), net.head.quantized_weight())

    def predict() -> None:
        for _ in range(5):
            assert torch.equal(bqnn.predict(net, x).probs, expected)
            assert not torch.equal(bqnn.predict(net, x, samples=4).probs, expected)

    run_at_once(predict, predict)
    with bqnn.sampling(twin):
        assert not torch.equal(twin.embedding.weight.clone(), twin.embedding.weight.clone())


def test_tied_layers_are_tied_in_a_replica() -> None:
    net = bqnn.convert(Tied(), 3)
    twin = replica(net)
    for layer in (twin.a, twin.b):
        assert layer.sharing_layers() == (twin.a, twin.b)
    assert twin.a.weight is twin.b.weight is not net.a.weight
    assert twin.a.mean is net.b.mean
