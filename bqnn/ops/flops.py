"""How many floating point operations an op stands for, as torch.utils.flop_counter counts them: two for a weight that
is multiplied and added, and nothing else. "int8" counts alike, though its operations are of integers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from bqnn.core.imports import when_imported

_formulas: dict[str, Callable[..., int]] = {}


def count_flops(op: str, formula: Callable[..., int]) -> None:
    """Lets FlopCounterMode count ``bqnn::op``: ``formula`` takes its arguments and, as ``out_val``, its outputs."""
    _formulas[op] = formula


def _register(flop_counter: ModuleType) -> None:
    for op, formula in _formulas.items():
        flop_counter.register_flop_formula(getattr(torch.ops.bqnn, op), get_raw=True)(formula)


def start_counting() -> None:
    """Tells torch of all formulas, once there is somebody who counts: torch.utils.flop_counter imports Triton."""
    when_imported("torch.utils.flop_counter", _register)
