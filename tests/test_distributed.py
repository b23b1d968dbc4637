"""DistributedDataParallel: two processes on the loopback, with every estimator."""

from __future__ import annotations

from tests.support.processes import run_in_two

WORK = """
import bqnn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
for estimator, prior, partition in (
    ("deterministic", "spike_slab", "nearest"),
    ("deterministic", "gaussian", "learned"),
    ("moment", "spike_slab", "learned"),
    ("sample", "spike_slab", "learned"),
    ("local", "gaussian", "nearest"),
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    net = bqnn.convert(net, 3, estimator=estimator, prior=prior, partition=partition)
    optimizer = torch.optim.Adam(bqnn.parameter_groups(net, lr=0.01))
    # The second phase's estimator is another one: with it, a wrapper of its own for the same optimizer.
    for phase in (estimator, "moment", "deterministic"):
        for layer in (net[0], net[2]):
            layer.estimator = phase
        parallel = DistributedDataParallel(net)
        torch.manual_seed(rank + 1)
        for step in range(3):
            x, y = torch.randn(12, 8), torch.randint(0, 3, (12,))
            optimizer.zero_grad()
            bqnn.elbo(parallel(x), y, net, 1000).loss.backward()
            optimizer.step()
        flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        both = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(both, flat)
        assert torch.equal(*both), (estimator, phase)

# Statistics of a SyncBatchNorm are those of the images of both processes, whatever their numbers.
generator = torch.Generator().manual_seed(5)
images = torch.randn(11, 3, 4, generator=generator) * 2 + 1
norm = nn.SyncBatchNorm(3)
bqnn.refresh_batchnorm(nn.Sequential(norm), images[:4].split(2) if rank == 0 else images[4:].split(5))
flat = images.double().transpose(0, 1).flatten(1)
torch.testing.assert_close(norm.running_mean.double(), flat.mean(1), rtol=1e-5, atol=1e-6)
torch.testing.assert_close(norm.running_var.double(), flat.var(1), rtol=1e-5, atol=1e-6)
"""


def test_replicas_stay_equal_with_every_estimator() -> None:
    run_in_two(WORK)
