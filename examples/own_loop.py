"""The three phases in a loop of one's own: what fit does, for whoever has to do more between the steps.

python examples/own_loop.py      # a few seconds; the handwritten digits of scikit-learn
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn

TRAIN = 1400
PHASES = ((6, 4e-3), (10, 3e-3), (4, 5e-3))  # epochs, and the highest learning rate


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float, is_bayes: bool) -> None:
    """A phase: AdamW with one cycle of the learning rate, and the divergence where there is a posterior."""
    groups = bqnn.parameter_groups(net, lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99 if is_bayes else 0.999))
    highest = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, highest, epochs * len(loader), pct_start=0.1, cycle_momentum=False
    )
    net.train()
    for epoch in range(epochs):
        for step, (x, y) in enumerate(loader):
            if is_bayes:
                weight = bqnn.kl_warmup(epoch + step / len(loader), 1.0)
                loss = bqnn.elbo(net(x), y, net, len(loader.dataset), weight).loss
            else:
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def three_phases(net: nn.Module, loader: DataLoader) -> nn.Module:
    """The M-ary network that ``net``, at full precision, becomes."""
    for phase, (epochs, lr) in enumerate(PHASES):
        if phase == 1:  # from here on the network is quantized: first without a posterior, ...
            net = bqnn.convert(net, num_levels=3, estimator="deterministic")
        if phase == 2:  # ... then with one
            for layer in net.modules():
                if isinstance(layer, bqnn.BayesLinear):
                    layer.estimator = "moment"
                    layer.reset_variances_()
        train(net, loader, epochs, lr, is_bayes=phase == 2)
    bqnn.refresh_batchnorm(net, (batch for batch, _ in loader))
    return net.eval()


def main() -> dict[str, float]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    loader = DataLoader(TensorDataset(x[:TRAIN], y[:TRAIN]), batch_size=64, shuffle=True)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    net = three_phases(net, loader)

    error = 100 * (net(x[TRAIN:]).argmax(1) != y[TRAIN:]).float().mean().item()
    near = bqnn.report(net).near_share
    print(f"error {error:.2f} %, {100 * near:.1f} % of the means near their level")
    return {"error": error, "near_share": near}


if __name__ == "__main__":
    main()
