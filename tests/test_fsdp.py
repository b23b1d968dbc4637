"""torch's fully_shard (FSDP2): two processes share the parameters of Bayes layers out, and train what one trains."""

from __future__ import annotations

from tests.support.processes import run_in_two

SET_UP = """
import warnings
warnings.filterwarnings("ignore")
import bqnn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from bqnn.bayes.layers import bayes_layers, bound_means_

MESH = init_device_mesh("cpu", (2,))
generator = torch.Generator().manual_seed(3)
X, Y = torch.randn(24, 2, 4, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)

def make(**options):
    torch.manual_seed(0)
    # 5 channels are shared out as 3 and 2, the 3 outputs as 2 and 1, and a codebook for all as 1 and 0.
    layers = nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    return bqnn.convert(nn.Sequential(*layers), 3, **options)

def make_row(**options):  # of one output, which is the first process's alone
    torch.manual_seed(0)
    return nn.Sequential(bqnn.BayesLinear(7, 1, **options))

def shard(net):
    for layer in bayes_layers(net).values():
        fully_shard(layer, mesh=MESH)
    return fully_shard(net, mesh=MESH)

def whole_state(net):
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))

def close(net, single, rtol=1e-4, atol=1e-6):
    found = whole_state(net)
    if rank == 0:  # where a whole state is gathered
        assert found.keys() == single.state_dict().keys()
        for name, value in single.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")

def train(net, x, y, steps, size=1000):
    optimizer = torch.optim.SGD(bqnn.parameter_groups(net, lr=0.05))
    for step in range(steps):
        optimizer.zero_grad()
        terms = bqnn.elbo(net(x), y, net, size)
        terms.loss.backward()
        optimizer.step()
        bound_means_(bayes_layers(net).values())
    return terms

half = slice(12 * rank, 12 * rank + 12)
"""

DETERMINISTIC = """
for options in (
    {"prior": "gaussian"},
    {"prior": "gaussian", "granularity": "channel", "partition": "learned"},
):
    # Deviations so small that samples are hardly random, and both ways can be compared in the next phase too.
    options = {"estimator": "deterministic", "start_sigma": 1e-3, **options}
    single, sharded = make(**options), shard(make(**options))
    assert isinstance(sharded[0].mean, DTensor) and sharded[0].weight is sharded[0].mean
    expected = train(single, X, Y, 3)
    found = train(sharded, X[half], Y[half], 3)
    assert found.kl.item() == expected.kl.item() == 0.0
    close(sharded, single)
    for net in (single, sharded):
        for layer in bayes_layers(net).values():
            layer.estimator = "sample"
            layer.reset_variances_()
    close(sharded, single)
    before = {name: value.clone() for name, value in single.state_dict().items()}
    expected = train(single, X, Y, 2, size=20)
    found = train(sharded, X[half], Y[half], 2, size=20)
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-3, atol=0.0)
    close(sharded, single, rtol=0.0, atol=2e-3)
    assert all((single.state_dict()[name] - before[name]).abs().max() > 2e-2 for name in ("0.weight", "3.weight"))
"""

# Of each divergence the value and the gradients, whoever has which weights; and what reads or sets them between calls.
DIVERGENCE = """
for build, options in (
    (make, {"prior": "spike_slab"}),
    (make, {"prior": "mixture", "granularity": "channel", "partition": "learned"}),
    (make, {"prior": "gaussian", "granularity": "channel"}),
    (make_row, {"prior": "spike_slab", "granularity": "channel"}),
    (make_row, {"prior": "mixture"}),
):
    single, sharded = build(**options), shard(build(**options))
    for net in (single, sharded):
        (bqnn.kl_divergence(net) / 1000).backward()
    torch.testing.assert_close(bqnn.kl_divergence(sharded), bqnn.kl_divergence(single))
    for name, parameter in single.named_parameters():
        found = sharded.get_parameter(name).grad
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            torch.testing.assert_close(found.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-8)
    for before, after in zip(bayes_layers(single).values(), bayes_layers(sharded).values()):
        assert torch.equal(after.levels, before.levels) and torch.equal(after.codes(), before.codes())
        for layer in (before, after):
            with torch.no_grad():
                layer.mean.mul_(10.0)
            layer.bound_means_()
            layer.fit_codebook_()
    close(sharded, single)
"""

SAMPLES = """
for estimator, prior in (("sample", "mixture"), ("moment", "spike_slab"), ("local", "gaussian")):
    net = shard(make(estimator=estimator, prior=prior))
    torch.manual_seed(rank)
    first, second = net(X), net(X)
    assert not torch.equal(first, second)
    terms = train(net, X[half], Y[half], 2)
    assert torch.isfinite(terms.loss) and terms.kl != 0
    # What was trained is a network like any other, once its state is whole.
    state, plain = whole_state(net), make(estimator=estimator, prior=prior)
    net.eval()
    logits = net(X)
    if rank == 0:
        plain.load_state_dict(state)
        torch.testing.assert_close(plain.eval()(X), logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bqnn.pack(plain)(X), logits, rtol=1e-4, atol=1e-5)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
    def forward(self, x):
        return self.head(self.embedding(x))

def tied():
    torch.manual_seed(0)
    return bqnn.convert(Tied(), 3, estimator="deterministic")

single, sharded = tied(), fully_shard(tied(), mesh=MESH)
torch.testing.assert_close(sharded(torch.arange(7)), single(torch.arange(7)))

try:
    bqnn.ops.assign_codes(net[0].mean, net[0].thresholds)
except TypeError as error:
    assert "weight must have all of its numbers in this process, got a DTensor" in str(error), error
else:
    raise AssertionError("an op takes a part of a tensor for the whole")
"""


def test_two_processes_train_what_one_does() -> None:
    run_in_two(SET_UP + DETERMINISTIC + DIVERGENCE + SAMPLES)
