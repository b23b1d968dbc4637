"""moment_linear: a linear layer that propagates the mean and variance of its quantized Gaussian weight."""

from __future__ import annotations

from torch import Tensor

from bqnn.core.check import check_bias, check_device, check_linear_input
from bqnn.core.philox import Noise
from bqnn.core.product import LinearProduct
from bqnn.core.quantizer import Posterior
from bqnn.ops import moment_product
from bqnn.ops.backends import cpu_moment, triton_moment
from bqnn.ops.register import call

moment_product.register("moment_linear", LinearProduct)
cpu_moment.register("moment_linear")
triton_moment.register("moment_linear")


def moment_linear(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    offset: int = 0,
    mode: str = "categorical",
    coarse_variance: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y ~ N(x E^T + bias, x^2 V^T): local reparameterisation (Kingma et al. 2015), each output with noise of its own.

    "categorical": E and V are the moments of Q(w), smooth in weight, log_sigma2, levels and thresholds, with true
    gradients for all four. "gaussian": of w itself (the published training). "straight_through": E = Q(mu) with a
    straight-through gradient, V = sigma^2.

    Args:
        x: [..., K] floating point; the products are taken, and returned, in its dtype.
        weight, log_sigma2: mu and log of the posterior variance, [N, K].
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key.
        offset: Philox call that holds the noise of the first output.
        mode: "categorical", "gaussian" or "straight_through".
        coarse_variance: round the variances of the outputs to bfloat16, 8 bits, and keep dy/dVar, rounded likewise, for
            backward; variances and their gradients may then be computed in bfloat16, too. Without it nothing of the
            outputs is kept, and backward computes their variances again.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    posterior, noise = Posterior(weight, log_sigma2, levels, thresholds), Noise(seed, offset)
    moment_product.check_moment(posterior, 2, noise, mode, coarse_variance)
    check_linear_input(x, weight.shape[1])
    check_device("x", x, weight)
    check_bias(bias, weight.shape[0], x)
    y, _ = call(
        "moment_linear",
        moment_product.MomentCall(x, posterior, bias, noise, mode, coarse_variance, LinearProduct()),
        backend,
    )
    return y
