"""sample_conv2d: a convolution whose weight is sampled, partitioned and multiplied in one op."""

from __future__ import annotations

from torch import Tensor

from bqnn.core.check import check_bias, check_conv2d_input, check_device, check_integer
from bqnn.core.geometry import check_window, pair
from bqnn.core.philox import Noise
from bqnn.core.product import CONV2D_GEOMETRY, Conv2dProduct
from bqnn.core.quantizer import Posterior
from bqnn.ops import sampled_product
from bqnn.ops.backends import cpu_sample, triton_sample
from bqnn.ops.register import call

sampled_product.register("sample_conv2d", Conv2dProduct, CONV2D_GEOMETRY)
cpu_sample.register("sample_conv2d")
triton_sample.register("sample_conv2d")


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
    log_sigma2: Tensor | None,
    levels: Tensor,
    thresholds: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """The convolution of x with Q(mu + sigma * eps), plus bias; see :func:`bqnn.ops.sample_linear`.

    Args:
        x: [B, C, H, W] floating point, any memory format; the product is taken, and returned, in its dtype.
        weight: mu, [N, C / groups, kh, kw].
        log_sigma2: log of the posterior variance, the weight's shape, or None for sigma = 0.
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key; needed with ``log_sigma2``.
        offset: Philox call that holds the noise of the first weight.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, in pixels.

    Returns:
        [B, N, H', W'] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or no seed where one is needed.
    """
    posterior, noise = Posterior(weight, log_sigma2, levels, thresholds), Noise(seed, offset)
    sampled_product.check_sampled(posterior, 4, noise)
    check_integer("groups", groups)
    check_conv2d_input(x, weight.shape[1] * groups, weight.shape[0], groups)
    check_device("x", x, weight)
    check_bias(bias, weight.shape[0], x)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding = pair("padding", padding, 0)
    check_window(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)
    return call(
        "sample_conv2d",
        sampled_product.SampledCall(x, posterior, bias, noise, Conv2dProduct(stride, padding, dilation, groups)),
        backend,
    )
