"""A small piece of what bqnn.lab.uncertainty measures, with numbers that tell where they stand."""

from __future__ import annotations

from typing import Any

from bqnn.lab.uncertainty_file import SCORES


def scores(first: float) -> dict[str, float]:
    """Scores of the values ``first``, ``first`` + 0.01 and so on."""
    return {name: first + 0.01 * i for i, name in enumerate(SCORES)}


def measured(samples: int = 4, corruptions: tuple[str, ...] = ("fog", "jpeg")) -> dict[str, Any]:
    """What was measured of so many networks, as JSON gives it back."""
    uncertainties = ("entropy", "mutual_information")[: 1 + (samples > 1)]
    return {
        "network": "quantized",
        "dataset": "digits",
        "split": "test",
        "images": 360,
        "samples": samples,
        "seed": 0,
        "temperature": 1.25,
        "clean": scores(0.5),
        "corruptions": {name: [scores(i + k) for i in range(1, 6)] for k, name in enumerate(corruptions)},
        "mean": scores(3.5),
        "ood": {
            "inverted": {name: {"auroc": 0.75, "fpr95": 0.5} for name in uncertainties},
            "uniform noise": {name: {"auroc": 0.875, "fpr95": 0.25} for name in uncertainties},
        },
        "reliability": {"confidence": [0.5, 0.9], "accuracy": [0.25, 1.0], "images": [160.0, 200.0]},
        "coverage": {"coverage": [0.5, 1.0], "error": [0.0, 3.0]},
        "entropy": {
            "edges": [0.0, 1.0, 2.0],
            "shares": {"clean": [0.75, 0.25], "inverted": [0.5, 0.5], "uniform noise": [0.0, 1.0]},
        },
    }
