"""Time and saved bytes of a training step: Bayes layers, M = 3, against the full-precision network.

    make bench ARGS="-k training"

A step is forward pass, loss, backward pass and AdamW, as `bqnn train` takes it; what is timed is a few of them, as in a
training loop. Weights and images are random. A step's loss is compared with the reference's before any time is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bqnn
from bench.published import published, published_loss
from bench.summary import Medians, Verdict, times_faster
from bqnn.bayes.elbo import parameter_groups
from bqnn.models import build
from tests.support.memory import saved_bytes

NUM_LEVELS, DATASET_SIZE = 3, 60_000
SEED = 1
NETWORKS = {
    "lenet5": ((128, 1, 28, 28), 4, 20.0, 2.0),
    "vgg7": ((64, 3, 32, 32), 1, 20.0, 1.6),
}
"""The shape of a batch, steps that are timed together, seconds for the group, and how many times the full-precision
network's step one may take."""

BASELINES = ("fpnn",)
OURS = ("cpu moment", "cpu local", "cpu sample", "cpu moment, exact")
VARIANTS = ["fpnn", "published", "reference moment", *OURS]


class TrainingGroup:
    """One network and one batch of random images."""

    def __init__(self, model: str) -> None:
        shape, self.steps, self.budget, _ = NETWORKS[model]
        self.name = f"training, {model} batch {shape[0]}"
        self._model = model
        generator = torch.Generator().manual_seed(SEED)
        self._x = torch.randn(shape, generator=generator)
        self._target = torch.randint(10, (shape[0],), generator=generator)
        self._fpnn_saved = saved_bytes(self._net("fpnn"), self._x, self._target)

    def _net(self, variant: str) -> nn.Module:
        torch.manual_seed(SEED)
        net = build(self._model, {})
        if variant == "published":
            net = published(net, NUM_LEVELS)
        elif variant != "fpnn":
            estimator, _, exact = variant.split(" ", 1)[1].partition(", ")
            net = bqnn.convert(net, NUM_LEVELS, estimator=estimator, coarse_variance=not exact)
        return net.train()

    def _loss(self, net: nn.Module, variant: str) -> Tensor:
        output = net(self._x)
        if variant == "fpnn":
            return F.cross_entropy(output, self._target)
        if variant == "published":
            return published_loss(output, self._target, net, DATASET_SIZE)
        return bqnn.elbo(output, self._target, net, DATASET_SIZE).loss

    def call(self, variant: str) -> Callable[[], Tensor]:
        """Some steps; returns the loss of the first."""
        net = self._net(variant)
        optimizer = torch.optim.AdamW(parameter_groups(net, 1e-3), fused=True)
        backend = {"BQNN_BACKEND": "reference"} if variant.startswith("reference") else {}

        @torch.inference_mode(False)
        @torch.enable_grad()
        def steps() -> Tensor:
            torch.manual_seed(SEED)
            losses = []
            with patch.dict(os.environ, backend):
                for _ in range(self.steps):
                    loss = self._loss(net, variant)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
            return losses[0]

        return steps

    @torch.inference_mode(False)
    def check(self, variant: str, output: Tensor) -> dict[str, Any]:
        """The first loss is the one of the reference, of the same seed; the published one's is only finite."""
        assert torch.isfinite(output)
        if variant != "published":
            net = self._net(variant)
            torch.manual_seed(SEED)
            with torch.no_grad(), patch.dict(os.environ, {"BQNN_BACKEND": "reference"}):
                expected = self._loss(net, variant)
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        if variant in OURS:
            with torch.enable_grad():
                saved = saved_bytes(self._net(variant), self._x, self._target)
            return {"saved_for_backward": saved / self._fpnn_saved}
        return {}


def claims(medians: Medians) -> Iterator[Verdict]:
    """A step may take so many times the full-precision network's."""
    for model, (shape, _, _, factor) in NETWORKS.items():
        group = medians.get(f"training, {model} batch {shape[0]}", {})
        for variant in OURS[:3]:
            measured = times_faster(group, [variant], BASELINES)
            if measured is not None:
                yield Verdict(f"{model}: {variant}, share of the step that is fpnn's", 1.0 / factor, measured)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", NETWORKS)
def test_training(race: Any, variant: str, model: str) -> None:
    race(TrainingGroup)
