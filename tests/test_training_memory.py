"""What a step of training keeps for its backward pass, in bytes, against the full-precision network's."""

from __future__ import annotations

import pytest
import torch

import bqnn
from bqnn.models import build
from tests.support.memory import saved_bytes

# An input is a batch, and the shape of an image.
INPUTS = {"lenet5": (32, 1, 28, 28), "vgg7": (2, 3, 32, 32)}
# So many times the full-precision network's bytes may be kept.
BOUNDS = {"moment": 1.25, "local": 1.25, "sample": 1.1}


def bytes_of(model: str, **options: object) -> int:
    torch.manual_seed(0)
    net = build(model, {})
    if options:
        net = bqnn.convert(net, 3, **options)
    x = torch.randn(INPUTS[model])
    return saved_bytes(net.train(), x, torch.randint(10, (x.shape[0],)))


@pytest.mark.parametrize("estimator", BOUNDS)
@pytest.mark.parametrize("model", INPUTS)
def test_a_step_keeps_little_more_than_the_full_precision_network(model: str, estimator: str) -> None:
    assert bytes_of(model, estimator=estimator) <= BOUNDS[estimator] * bytes_of(model)


@pytest.mark.parametrize("model", INPUTS)
def test_exact_variances_are_not_kept(model: str) -> None:
    assert bytes_of(model, estimator="moment", coarse_variance=False) <= 1.01 * bytes_of(model)
