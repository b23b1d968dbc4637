"""The recipes that the README recommends: chosen on the validation split, by the measurements in docs/recipe.md."""

from __future__ import annotations

from bqnn.train import Recipe

LENET5_MNIST = Recipe(model="lenet5", dataset="mnist", augment="affine")
LENET5_DIGITS = Recipe(
    model="lenet5", dataset="digits", augment="affine", pretrain_epochs=30, deterministic_epochs=20, epochs=20
)
