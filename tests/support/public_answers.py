"""The right answers of public functions: what the backend "reference" makes of the same arguments, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.answers import NEAR, RETURNED, Answer, Answers, Arguments
from tests.support.draws import Draw


def _has_half(given: Arguments) -> bool:
    return any(isinstance(each, Tensor) and each.dtype in (torch.bfloat16, torch.float16) for each in given.values())


def doubled(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def by_reference(run: Callable[..., Any], kept: tuple[str, ...] = ()) -> Callable[..., Answers]:
    """The answer of the backend "reference" in float64; those of ``kept`` keep their dtype."""

    def answer(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
        if any(isinstance(each, Tensor) and each.requires_grad and each.is_leaf for each in given.values()):
            return {}
        exact = {name: each if name in kept else doubled(each) for name, each in given.items()}
        rounds = _has_half(given) or given.get("coarse_variance") or given.get("precision", "fp32") != "fp32"
        found = run(**{**exact, "backend": "reference"})
        results = found if isinstance(found, tuple) else (found,)
        names = [f"{RETURNED} {i}" for i in range(len(results))] if isinstance(found, tuple) else [RETURNED]
        # A sum that cancels is as far off as its terms.
        return {
            name: Answer(each, (3e-2 if rounds else 2e-4) * max(1.0, 3.0 / (float(each.abs().amax()) + 1e-3)))
            for name, each in zip(names, results)
            if each.numel() and each.is_floating_point()
        }

    return answer


def unless_a_cell_is_close(run: Callable[..., Any]) -> Callable[..., Answers]:
    """:func:`by_reference`, but for weights so near to a threshold, or samples, that rounding may decide their cell."""
    compute = by_reference(run)

    def answer(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
        if given.get("mode") == "gaussian":
            return compute(draw, given, changed)
        exact = {name: doubled(each) for name, each in given.items()}
        near = 2e-2 if _has_half(given) else NEAR
        results = []
        for shift in (-near, near):
            moved = {**exact, "thresholds": exact["thresholds"] + shift, "backend": "reference"}
            results.append(run(**moved))
        expected = compute(draw, given, changed)
        same = given.get("mode") == "categorical" or torch.allclose(*results, rtol=1e-9, atol=1e-9, equal_nan=True)
        return expected if same else {}

    return answer


def exactly(run: Callable[..., Any]) -> Callable[..., Answers]:
    def answer(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
        return {RETURNED: Answer(run(**{**given, "backend": "reference"}), 0.0)}

    return answer


def unknown(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {}
