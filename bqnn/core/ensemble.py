"""Ensemble: how code that knows no compiled networks asks several networks for their logits."""

from __future__ import annotations

from torch import nn


class Ensemble(nn.Module):
    """Networks as one module, whose forward gives the logits of each, stacked: [networks, B, classes]."""

    @property
    def num_networks(self) -> int:
        raise NotImplementedError
