"""How programs of the engine are run and compared: by every plan, for any batch, with the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

PLANS: dict[str, dict[str, int]] = {
    "kept": {},
    "made": {"kept_panels": 0, "wide_layer": 1 << 40},
    "wide": {"kept_panels": 0, "wide_layer": 1},
}


def of_batch(inputs: tuple[Tensor, ...], batch: int) -> list[Tensor]:
    return [x.repeat(-(-batch // len(x)), *[1] * (x.dim() - 1))[:batch] for x in inputs]


def check_near(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for y, reference in zip(found, expected):
        assert y.dtype == torch.float32 and y.shape == reference.shape
        distance = (y.double() - reference).norm()
        assert distance <= 1e-5 * reference.norm() + 1e-6 * reference.numel() ** 0.5
