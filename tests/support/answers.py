"""The right answers of the ops of the extension, in float64: functions of the arguments, by the name of the op.

The arguments may be hostile ones that the op has taken: whatever it takes, it has to answer, by their meaning and not
their shape. An answer is left out where rounding decides it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bqnn.core import quantizer
from bqnn.core.codes import pack_codes
from bqnn.core.quantizer import MODES, Posterior
from bqnn.ops.codebook_from_raw import (
    RawCodebook,
    RawCodebookBackward,
    codebook_from_raw_backward_reference,
    codebook_from_raw_reference,
)
from bqnn.ops.mixture_kl import (
    MixturePrior,
    MixturePriorBackward,
    mixture_kl_backward_reference,
    mixture_kl_reference,
)
from bqnn.ops.moment_product import weight_moments, weight_moments_backward
from bqnn.ops.packed_product import decode
from bqnn.ops.spike_slab_kl import Prior, PriorBackward, spike_slab_kl_backward_reference, spike_slab_kl_reference
from tests.support import formulas

if TYPE_CHECKING:
    from tests.support.draws import Draw

NEAR = 1e-3  # to a threshold or a level, rounding may decide
RETURNED = "the result"


class Answer(NamedTuple):
    """What an output has to be: ``value``, in row-major order, or between ``value`` and ``high``."""

    value: Tensor
    slack: float = 1e-4
    """The distance that rounding may make, a share of the largest magnitude of ``value``; 0: the same bits."""
    high: Tensor | None = None


Arguments = dict[str, Any]
Answers = dict[str, Answer]
MASK = 2**64 - 1


def exact(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double()


def slack_of(*tensors: Tensor) -> float:
    """bfloat16 keeps 8 bits; sums of such numbers are as far off as the largest of them."""
    return 2e-2 if any(each.dtype == torch.bfloat16 for each in tensors) else 1e-4


def noise_of(given: Arguments, shape: Any) -> Tensor:
    """What the seed and the offset make, in independent arithmetic."""
    return formulas.noise(int(given["seed"]) & MASK, int(given["offset"]) & MASK, shape)


def isa(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {}


def random_words(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    calls = given["out"].numel() // 4
    first = np.arange(calls, dtype=np.uint64) + np.uint64(int(given["first"]) & MASK)
    words = formulas.philox_words(int(given["seed"]) & MASK, first).astype(np.uint32).view(np.int32)
    return {"out": Answer(torch.from_numpy(words), 0.0)}


def add_noise(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    mean, variance = exact(given["mean"]), exact(given["variance"]).clamp(min=0.0)
    normal = noise_of(given, mean.shape)
    slack = slack_of(given["mean"], given["variance"])
    found = {"mean": Answer(mean + variance.sqrt() * normal, slack)}
    if given["keep_slope"]:
        found["variance"] = Answer(_slope(variance, normal), slack)
    return found


def _slope(variance: Tensor, normal: Tensor) -> Tensor:
    return torch.where(variance > 0.0, 0.5 * normal / variance.sqrt(), 0.0)


def multiply(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {"out": Answer(exact(given["grad"]) * exact(given["slope"]), slack_of(*given.values()))}


def noise_gradient(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    grad, variance, out = given["grad"], given["variance"], given["out"]
    value = exact(grad) * _slope(exact(variance), noise_of(given, grad.shape))
    return {"out": Answer(value, slack_of(grad, variance, out))}


def square(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {"out": Answer(exact(given["x"]).square(), slack_of(*given.values()))}


def add_square_gradient(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    grad, x, grad_square = map(exact, given.values())
    return {"grad": Answer(grad + 2.0 * x * grad_square, slack_of(*given.values()))}


def _rows(given: Arguments, *names: str) -> list[Any]:
    """The weight [N, K], and others of as many numbers, in float64."""
    shape = given["weight"].shape
    columns = math.prod(shape[1:])
    tensors = (exact(given[name]) for name in names)
    return [None if each is None else each.reshape(shape[0], columns) for each in tensors]


def _posterior(given: Arguments) -> Posterior:
    return Posterior(*_rows(given, "weight", "log_sigma2"), exact(given["levels"]), exact(given["thresholds"]))


def _codes(given: Arguments, posterior: Posterior) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lowest and the highest code that rounding may give a weight, and the shift of its sample."""
    shift = None
    if posterior.log_sigma2 is not None:
        shift = noise_of(given, posterior.weight.shape) * (0.5 * posterior.log_sigma2).exp()
    sample = posterior.weight if shift is None else posterior.weight + shift
    near = 1e-4 * (1.0 + sample.abs())
    low, high = (quantizer.assign(sample + each, posterior.thresholds) for each in (-near, near))
    return low, high, shift


def sample(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    posterior = _posterior(given)
    low, high, _ = _codes(given, posterior)
    low, high = (quantizer.look_up(posterior.levels, each) for each in (low, high))
    return {"quantized": Answer(low, 1e-6, high)}


def sample_backward(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    posterior, (grad,) = _posterior(given), _rows(given, "grad")
    low, high, shift = _codes(given, posterior)
    found = {} if shift is None else {"grad_log_sigma2": Answer(0.5 * grad * shift)}
    if torch.equal(low, high):
        found["grad_levels"] = Answer(quantizer.level_gradient(grad, low, posterior.levels))
    return found


def _is_near_a_threshold(posterior: Posterior) -> bool:
    """Rounding may decide which cell a mean is in."""
    weight, cuts = posterior.weight, posterior.thresholds
    gaps = [weight - quantizer.column(cuts, j, weight) for j in range(cuts.shape[1])]
    return any(bool((gap.abs() < NEAR).any()) for gap in gaps)


def moments(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    posterior, mode = _posterior(given), MODES[int(given["mode"])]
    mean, variance = weight_moments(posterior, mode)
    found = {"variance": Answer(variance, slack_of(given["variance"]))}
    if mode == "categorical" or (mode == "straight_through" and not _is_near_a_threshold(posterior)):
        found["mean"] = Answer(mean)
    return found


def moments_backward(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    posterior, mode = _posterior(given), MODES[int(given["mode"])]
    gradients = weight_moments_backward(*_rows(given, "grad_mean", "grad_variance"), posterior, mode)
    names = ("grad_mean", "grad_log_sigma2", "grad_levels", "grad_thresholds")
    found = dict(zip(names, map(Answer, gradients)))
    if mode == "categorical":
        return {name: answer._replace(slack=1e-3) for name, answer in found.items()}
    del found["grad_thresholds"]  # what a mode gives no gradient to is not written
    if mode == "gaussian" or _is_near_a_threshold(posterior):
        del found["grad_levels"]
    return found


def _raw(given: Arguments) -> RawCodebook:
    levels = exact(given["raw_levels"])
    shape = len(levels), levels.shape[1] - 1
    cuts = None if given["raw_thresholds"] is None else exact(given["raw_thresholds"]).reshape(shape)
    return RawCodebook(levels, exact(given["scale"]).reshape(len(levels), 1), cuts)


def codebook_from_raw(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    made = codebook_from_raw_reference(_raw(given))
    return dict(zip(("levels", "thresholds", "tau"), map(Answer, made)))


def codebook_from_raw_backward(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    raw = _raw(given)
    groups, num_levels = raw.raw_levels.shape
    grad_levels = exact(given["grad_levels"]).reshape(groups, num_levels)
    grad_thresholds = exact(given["grad_thresholds"]).reshape(groups, num_levels - 1)
    call = RawCodebookBackward(grad_levels, grad_thresholds, raw)
    made = codebook_from_raw_backward_reference(call)
    return dict(zip(("grad_raw_levels", "grad_raw_thresholds"), map(Answer, made)))


def assign_codes(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    (weight,), thresholds = _rows(given, "weight"), exact(given["thresholds"])
    codes = quantizer.assign(weight, thresholds)
    return {"out": Answer(pack_codes(codes, thresholds.shape[1] + 1) if given["packed"] else codes, 0.0)}


def _prior(given: Arguments) -> Prior:
    return Prior(*_rows(given, "weight", "log_sigma2"), exact(given["levels"]), exact(given["tau"]))


def spike_slab_kl(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {"out": Answer(spike_slab_kl_reference(_prior(given)), 1e-3)}


def spike_slab_kl_backward(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    prior = _prior(given)
    cuts = torch.cat([prior.levels, quantizer.midpoints(prior.levels)], 1)
    if _is_near_a_threshold(Posterior(prior.weight, None, prior.levels, cuts)):
        return {}
    call = PriorBackward(exact(given["grad"]).reshape(()), prior)
    made = spike_slab_kl_backward_reference(call)
    names = ("grad_weight", "grad_log_sigma2", "grad_levels")
    return {name: Answer(each, 1e-3) for name, each in zip(names, made)}


def _mixture(given: Arguments) -> MixturePrior:
    numbers = float(given["spike_width"]), float(given["slab_share"])
    posterior = *_rows(given, "weight", "log_sigma2"), exact(given["levels"])
    return MixturePrior(*posterior, exact(given["slab_sigma2"]).reshape(()), *numbers)


def mixture_kl(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {"out": Answer(mixture_kl_reference(_mixture(given)), 1e-3)}


def mixture_kl_backward(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    call = MixturePriorBackward(exact(given["grad"]).reshape(()), _mixture(given))
    made = mixture_kl_backward_reference(call)
    names = ("grad_weight", "grad_log_sigma2", "grad_levels")
    return {name: Answer(each, 1e-3) for name, each in zip(names, made)}


# --- packed weights ---------------------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, given: Arguments, steps: tuple[Any, ...], groups: int) -> Tensor:
    bias = given.get("bias")
    bias = None if bias is None else exact(bias).reshape(-1)
    if not steps:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = torch.nn.functional.conv2d(x, weight, bias, *steps, groups)
    return y.relu() if given.get("relu") else y


def packed_layout(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    """Of the layout, a product with it is what has to be right: see :mod:`tests.support.hostile`."""
    return {}


def _packed(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    if "layout" in changed:
        return {}  # another weight
    own, x = draw.facts["geometry"], exact(given["x"])
    steps = tuple(given[name] for name in ("stride", "padding", "dilation") if name in given)
    if any(max(each) > 2**20 for each in steps):
        return {}  # more than torch takes
    weight = decode(draw.facts["codes"], exact(draw.facts["levels"]), own.columns)
    if steps:
        weight = weight.view(len(weight), own.inputs, *own.kernel)
    y = _product(x, weight, given, steps, own.groups)
    # Rounded activations and levels: a share of the sum of magnitudes, which is what y is without cancellation.
    scale = float(_product(x.abs(), weight.abs(), {}, steps, own.groups).amax()) if y.numel() else 1.0
    largest = float(y.abs().amax()) if y.numel() else 1.0
    share = 1e-4 if own.precision == "fp32" and x.dtype == torch.float32 else 3e-2
    if given["x"].dtype == torch.bfloat16:
        share = 3e-2
    return {RETURNED: Answer(y, share * max(scale, largest, 1e-30) / max(largest, 1e-30))}


packed_linear = packed_conv2d = _packed


def packed_linear_kernel(draw: Draw, given: Arguments, changed: set[str]) -> Answers:
    return {}


packed_conv2d_kernel = packed_linear_kernel
