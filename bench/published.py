"""The published training written plainly: local reparameterisation and the spike-and-slab divergence, op by op.

What a user would write in PyTorch without this package, and the baseline that its fused steps are held against: Chien
and Chang (2023), after Achterhold et al. (2018), every intermediate kept by autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bqnn.core.codebook import TAU_PER_GAP, gaps, lloyd_max
from bqnn.ops.spike_slab_kl import K1, K2, K3

TINY = 1e-8


class _PublishedLayer(nn.Module):
    """A layer's means, log variances and levels; ``product`` is what its means are multiplied by."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, num_levels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
        self.levels = nn.Parameter(lloyd_max(self.weight.detach().reshape(1, -1), num_levels)[0])
        self.log_sigma2 = nn.Parameter(torch.full_like(self.weight, -8.0))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        mean = self.product(x, self.weight)
        variance = self.product(x.square(), self.log_sigma2.exp())
        y = mean + (variance + TINY).sqrt() * torch.randn_like(mean)
        return y if self.bias is None else y + self.bias

    def kl_divergence(self) -> Tensor:
        distance = self.weight.unsqueeze(-1) - self.levels
        tau = TAU_PER_GAP * gaps(self.levels.detach().view(1, -1))[0]
        window = torch.exp(-distance.square() / (2.0 * tau.square()))
        log_alpha = self.log_sigma2.unsqueeze(-1) - torch.log(distance.square() + TINY)
        spike = K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * torch.log1p(torch.exp(-log_alpha))
        slab = spike.gather(-1, distance.abs().argmin(-1, keepdim=True)).squeeze(-1)
        return ((window * spike).sum(-1) + (1.0 - window.sum(-1)) * slab).sum()


class PublishedLinear(_PublishedLayer):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class PublishedConv2d(_PublishedLayer):
    def __init__(self, layer: nn.Conv2d, num_levels: int) -> None:
        super().__init__(layer, num_levels)
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, *self.geometry)


def published(net: nn.Module, num_levels: int) -> nn.Module:
    """Replaces every nn.Linear and nn.Conv2d of ``net``, and returns it."""
    for name, layer in list(net.named_children()):
        if isinstance(layer, nn.Conv2d):
            setattr(net, name, PublishedConv2d(layer, num_levels))
        elif isinstance(layer, nn.Linear):
            setattr(net, name, PublishedLinear(layer, num_levels))
        else:
            published(layer, num_levels)
    return net


def published_loss(output: Tensor, target: Tensor, net: nn.Module, dataset_size: int) -> Tensor:
    """The negative evidence lower bound of a batch, in nats a sample."""
    divergences = [layer.kl_divergence() for layer in net.modules() if isinstance(layer, _PublishedLayer)]
    return F.cross_entropy(output, target) + torch.stack(divergences).sum() / dataset_size
