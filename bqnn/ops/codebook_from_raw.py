"""codebook_from_raw: a layer's levels and thresholds, in order whatever its raw parameters are, in one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bqnn.core.check import MAX_LEVELS, MIN_LEVELS, check_device, check_floating
from bqnn.core.codebook import MARGIN, MIN_GAP, TAU_PER_GAP, gaps, levels_from_raw, thresholds_from_raw
from bqnn.core.precision import narrowed, wide, wide_dtype
from bqnn.core.product import contiguous
from bqnn.core.quantizer import midpoints
from bqnn.core.structure import Structure, only
from bqnn.ops import dispatch
from bqnn.ops.backends.cpu import kernels, serves
from bqnn.ops.register import call, register_op


class RawCodebook(NamedTuple):
    """The arguments of the op."""

    raw_levels: Tensor
    scale: Tensor
    raw_thresholds: Tensor | None

    def wide(self) -> RawCodebook:
        """With float32 in place of float16 and bfloat16, which do not tell the levels of a narrow codebook apart."""
        return RawCodebook(*(None if tensor is None else wide(tensor) for tensor in self))  # type: ignore[arg-type]


class RawCodebookBackward(NamedTuple):
    """The arguments of its backward op."""

    grad_levels: Tensor
    grad_thresholds: Tensor
    raw: RawCodebook


def codebook_from_raw_reference(raw: RawCodebook) -> tuple[Tensor, Tensor, Tensor]:
    raw = raw.wide()
    levels = levels_from_raw(raw.raw_levels, raw.scale)
    if raw.raw_thresholds is None:
        thresholds = midpoints(levels)
    else:
        thresholds = thresholds_from_raw(raw.raw_thresholds, levels)
    return levels, thresholds, TAU_PER_GAP * gaps(levels)


def codebook_from_raw_backward_reference(call: RawCodebookBackward) -> tuple[Tensor, Tensor]:
    """Gradients for the raw levels and the raw thresholds (empty without them)."""
    grad_levels, grad_thresholds, raw = call
    raw_levels, scale, raw_thresholds = raw.wide()
    by_raw_thresholds = raw_levels.new_empty(0)
    share: Tensor | float = 0.5
    if raw_thresholds is not None:
        levels, gate = levels_from_raw(raw_levels, scale), torch.sigmoid(raw_thresholds)
        share = MARGIN + (1.0 - 2.0 * MARGIN) * gate
        by_share = grad_thresholds * (levels[:, 1:] - levels[:, :-1])
        by_raw_thresholds = by_share * (1.0 - 2.0 * MARGIN) * gate * (1.0 - gate)
    grad_levels = grad_levels + F.pad(share * grad_thresholds, (1, 0)) + F.pad((1.0 - share) * grad_thresholds, (0, 1))
    by_increment = scale * grad_levels.flip(1).cumsum(1).flip(1)
    by_gaps, first = by_increment[:, 1:], raw_levels[:, :1]
    by_first = by_increment[:, :1] + MIN_GAP * first.sign() * by_gaps.sum(1, keepdim=True)
    by_raw_levels = torch.cat([by_first, by_gaps * torch.sigmoid(raw_levels[:, 1:])], dim=1)
    dtype = raw.raw_levels.dtype
    return narrowed(by_raw_levels, dtype), narrowed(by_raw_thresholds, dtype)


def _fake(raw: RawCodebook) -> tuple[Tensor, Tensor, Tensor]:
    groups, num_levels = raw.raw_levels.shape
    raw_levels, dtype = raw.raw_levels, wide_dtype(raw.raw_levels.dtype)
    shapes = (groups, num_levels), (groups, num_levels - 1), (groups, num_levels)
    levels, thresholds, tau = (raw_levels.new_empty(shape, dtype=dtype) for shape in shapes)
    return levels, thresholds, tau


def _fake_backward(call: RawCodebookBackward) -> tuple[Tensor, Tensor]:
    raw_levels, _, raw_thresholds = call.raw
    by_thresholds = raw_levels.new_empty(0 if raw_thresholds is None else raw_thresholds.shape)
    return raw_levels.new_empty(raw_levels.shape), by_thresholds


def _save(ctx: Any, raw: RawCodebook, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*raw)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_levels: Tensor, grad_thresholds: Tensor, _: Any) -> Any:
    arguments = RawCodebookBackward(grad_levels, grad_thresholds, RawCodebook(*ctx.saved_tensors))
    by_levels, by_thresholds = call("codebook_from_raw_backward", arguments, ctx.backend)
    wanted = by_thresholds if ctx.wants.raw_thresholds else None
    return only(RawCodebook, raw_levels=by_levels, raw_thresholds=wanted)


def _cpu(raw: RawCodebook) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake(raw)
    kernels.codebook_from_raw(*contiguous(*raw), *outputs)
    return outputs


def _cpu_backward(call: RawCodebookBackward) -> tuple[Tensor, Tensor]:
    gradients = _fake_backward(call)
    kernels.codebook_from_raw_backward(*contiguous(call.grad_levels, call.grad_thresholds, *call.raw), *gradients)
    return gradients


register_op(
    "codebook_from_raw_backward",
    "(Tensor grad_levels, Tensor grad_thresholds, Tensor raw_levels, Tensor scale, Tensor? raw_thresholds,"
    " str? backend=None) -> (Tensor, Tensor)",
    Structure(RawCodebookBackward),
    codebook_from_raw_backward_reference,
    _fake_backward,
)
register_op(
    "codebook_from_raw",
    "(Tensor raw_levels, Tensor scale, Tensor? raw_thresholds, str? backend=None) -> (Tensor, Tensor, Tensor)",
    Structure(RawCodebook),
    codebook_from_raw_reference,
    _fake,
    _save,
    _backward,
)
dispatch.register("codebook_from_raw", "cpu", _cpu, serves)
dispatch.register("codebook_from_raw_backward", "cpu", _cpu_backward, serves)
# On a GPU torch makes these few numbers; for "triton" too, so that a whole network can be forced to its kernels.
dispatch.register("codebook_from_raw", "triton", codebook_from_raw_reference)
dispatch.register("codebook_from_raw_backward", "triton", codebook_from_raw_backward_reference)


def _check_like(raw_levels: Tensor, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, raw_levels)


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
        distance to its nearest neighbour. All in the dtype of ``raw_levels``, but float32 for float16 and bfloat16.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_floating("raw_levels", raw_levels)
    if raw_levels.dim() != 2 or not MIN_LEVELS <= raw_levels.shape[1] <= MAX_LEVELS:
        raise ValueError(
            f"raw_levels must have the shape [groups, {MIN_LEVELS} to {MAX_LEVELS}], got {list(raw_levels.shape)}"
        )
    groups, num_levels = raw_levels.shape
    _check_like(raw_levels, "scale", scale, (groups, 1))
    if raw_thresholds is not None:
        _check_like(raw_levels, "raw_thresholds", raw_thresholds, (groups, num_levels - 1))
    return call("codebook_from_raw", RawCodebook(raw_levels, scale, raw_thresholds), backend)
