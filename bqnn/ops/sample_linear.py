"""sample_linear: a linear layer whose weight is sampled, partitioned and multiplied in one op."""

from __future__ import annotations

from torch import Tensor

from bqnn.core.check import check_bias, check_device, check_linear_input
from bqnn.core.philox import Noise
from bqnn.core.product import LinearProduct
from bqnn.core.quantizer import Posterior
from bqnn.ops import sampled_product
from bqnn.ops.backends import cpu_sample, triton_sample
from bqnn.ops.register import call

sampled_product.register("sample_linear", LinearProduct)
cpu_sample.register("sample_linear")
triton_sample.register("sample_linear")


def sample_linear(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """y = x Q(mu + sigma * eps)^T + bias, with one weight sample for the whole batch.

    The gradient is straight-through for weight and log_sigma2, a sum over the cell for levels, and none for thresholds.
    Without ``log_sigma2`` sigma is 0: the deterministic M-ary layer.

    Args:
        x: [..., K] floating point; the product is taken, and returned, in its dtype.
        weight: mu, [N, K].
        log_sigma2: log of the posterior variance, [N, K], or None.
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key; needed with ``log_sigma2``.
        offset: Philox call that holds the noise of the first weight.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or no seed where one is needed.
    """
    posterior, noise = Posterior(weight, log_sigma2, levels, thresholds), Noise(seed, offset)
    sampled_product.check_sampled(posterior, 2, noise)
    check_linear_input(x, weight.shape[1])
    check_device("x", x, weight)
    check_bias(bias, weight.shape[0], x)
    return call("sample_linear", sampled_product.SampledCall(x, posterior, bias, noise, LinearProduct()), backend)
