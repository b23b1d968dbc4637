"""codebook_from_raw: a layer's levels and thresholds, in order whatever its raw parameters are, in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn import dispatch
from bqnn.ops._cpu import all_float32, kernels
from bqnn.ops._register import call, register_op
from bqnn.ops.quantizer import midpoints

TAU_PER_GAP = 0.375  # the published window, tau = 0.075 at a gap of 0.2 between levels
MIN_GAP = 1e-4  # between two levels, in units of their size and spread: float32 tells them apart, windows have a width
MARGIN = 1e-3  # of a gap, that a learned threshold keeps from both its levels


def gaps(levels: Tensor) -> Tensor:
    """The distance of each level to its nearest neighbour: [G, M] -> [G, M]."""
    steps = levels[:, 1:] - levels[:, :-1]
    return torch.minimum(torch.cat([steps[:, :1], steps], dim=1), torch.cat([steps, steps[:, -1:]], dim=1))


def smallest_gap(first: Tensor, scale: Tensor | float) -> Tensor:
    """What two neighbouring levels of a codebook that starts at ``first`` [G, 1] are always apart, [G, 1]."""
    return MIN_GAP * (scale + first.abs())


def levels_from_raw(raw: Tensor, scale: Tensor) -> Tensor:
    """scale * (first, first + smallest + softplus(gap_1), ...): increasing whatever the raw values are, [G, M] each.

    ``scale`` [G, 1] is the spread of the weights when the codebook was fitted, so that an optimizer's step moves first
    value and gaps alike, in wide layers and narrow ones.
    """
    first = raw[:, :1]
    increments = torch.cat([first, smallest_gap(first, 1.0) + F.softplus(raw[:, 1:])], dim=1)
    return scale * increments.cumsum(1)


def thresholds_from_raw(raw: Tensor, levels: Tensor) -> Tensor:
    """t_j at a share of the way from c_{j-1} to c_j, sigmoid(raw_j) but for a margin: each level in its own cell."""
    share = MARGIN + (1.0 - 2.0 * MARGIN) * torch.sigmoid(raw)
    return levels[:, :-1] + share * (levels[:, 1:] - levels[:, :-1])


def codebook_from_raw_reference(
    raw_levels: Tensor, scale: Tensor, raw_thresholds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    levels = levels_from_raw(raw_levels, scale)
    thresholds = midpoints(levels) if raw_thresholds is None else thresholds_from_raw(raw_thresholds, levels)
    return levels, thresholds, TAU_PER_GAP * gaps(levels)


def codebook_from_raw_backward_reference(
    grad_levels: Tensor,
    grad_thresholds: Tensor,
    raw_levels: Tensor,
    scale: Tensor,
    raw_thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients for the raw levels and the raw thresholds (empty without them)."""
    grad_raw_thresholds = raw_levels.new_empty(0)
    share: Tensor | float = 0.5
    if raw_thresholds is not None:
        levels, gate = levels_from_raw(raw_levels, scale), torch.sigmoid(raw_thresholds)
        share = MARGIN + (1.0 - 2.0 * MARGIN) * gate
        by_share = grad_thresholds * (levels[:, 1:] - levels[:, :-1])
        grad_raw_thresholds = by_share * (1.0 - 2.0 * MARGIN) * gate * (1.0 - gate)
    grad_levels = grad_levels + F.pad(share * grad_thresholds, (1, 0)) + F.pad((1.0 - share) * grad_thresholds, (0, 1))
    by_increment = scale * grad_levels.flip(1).cumsum(1).flip(1)
    by_gaps, first = by_increment[:, 1:], raw_levels[:, :1]
    by_first = by_increment[:, :1] + MIN_GAP * first.sign() * by_gaps.sum(1, keepdim=True)
    return torch.cat([by_first, by_gaps * torch.sigmoid(raw_levels[:, 1:])], dim=1), grad_raw_thresholds


def _fake(raw_levels: Tensor, scale: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups, num_levels = raw_levels.shape
    like = raw_levels.new_empty
    return like((groups, num_levels)), like((groups, num_levels - 1)), like((groups, num_levels))


def _fake_backward(
    grad_levels: Tensor,
    grad_thresholds: Tensor,
    raw_levels: Tensor,
    scale: Tensor,
    raw_thresholds: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    by_thresholds = raw_levels.new_empty(0 if raw_thresholds is None else raw_thresholds.shape)
    return raw_levels.new_empty(raw_levels.shape), by_thresholds


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_levels: Tensor, grad_thresholds: Tensor, _: Any) -> tuple[Any, ...]:
    by_levels, by_thresholds = call(
        "codebook_from_raw_backward", grad_levels, grad_thresholds, *ctx.saved_tensors, ctx.backend
    )
    return by_levels, None, by_thresholds if ctx.needs_input_grad[2] else None, None


def _cpu(raw_levels: Tensor, scale: Tensor, raw_thresholds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if not all_float32(raw_levels, scale, raw_thresholds):
        return codebook_from_raw_reference(raw_levels, scale, raw_thresholds)
    outputs = _fake(raw_levels, scale)
    kernels.codebook_from_raw(*_contiguous(raw_levels, scale, raw_thresholds), *outputs)
    return outputs


def _cpu_backward(
    grad_levels: Tensor,
    grad_thresholds: Tensor,
    raw_levels: Tensor,
    scale: Tensor,
    raw_thresholds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    arguments = (grad_levels, grad_thresholds, raw_levels, scale, raw_thresholds)
    if not all_float32(*arguments):
        return codebook_from_raw_backward_reference(*arguments)
    gradients = _fake_backward(*arguments)
    kernels.codebook_from_raw_backward(*_contiguous(*arguments), *gradients)
    return gradients


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


register_op(
    "codebook_from_raw_backward",
    "(Tensor grad_levels, Tensor grad_thresholds, Tensor raw_levels, Tensor scale, Tensor? raw_thresholds,"
    " str? backend=None) -> (Tensor, Tensor)",
    codebook_from_raw_backward_reference,
    _fake_backward,
)
register_op(
    "codebook_from_raw",
    "(Tensor raw_levels, Tensor scale, Tensor? raw_thresholds, str? backend=None) -> (Tensor, Tensor, Tensor)",
    codebook_from_raw_reference,
    _fake,
    _setup_context,
    _backward,
)
dispatch.register("codebook_from_raw", "cpu", _cpu)
dispatch.register("codebook_from_raw_backward", "cpu", _cpu_backward)
# On a GPU torch makes these few numbers; for "triton" too, so that a whole network can be forced to its kernels.
dispatch.register("codebook_from_raw", "triton", codebook_from_raw_reference)
dispatch.register("codebook_from_raw_backward", "triton", codebook_from_raw_backward_reference)


def codebook_from_raw(
    raw_levels: Tensor, scale: Tensor, raw_thresholds: Tensor | None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, thresholds and the prior's window widths; the first two are differentiable in the raw parameters.

    Args:
        raw_levels: [G, M]; see :func:`levels_from_raw`.
        scale: [G, 1], the spread of the levels when they were fitted.
        raw_thresholds: [G, M - 1], see :func:`thresholds_from_raw`; None: half-way between levels.

    Returns:
        levels [G, M], strictly increasing; thresholds [G, M - 1], between them; tau [G, M], a share of each level's
        distance to its nearest neighbour.
    """
    return call("codebook_from_raw", raw_levels, scale, raw_thresholds, backend)
