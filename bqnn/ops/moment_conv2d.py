"""moment_conv2d: a convolution that propagates the mean and variance of its quantized Gaussian weight."""

from __future__ import annotations

from torch import Tensor

from bqnn.core.check import check_bias, check_conv2d_input, check_device, check_integer
from bqnn.core.geometry import check_window, pair
from bqnn.core.philox import Noise
from bqnn.core.product import CONV2D_GEOMETRY, Conv2dProduct
from bqnn.core.quantizer import Posterior
from bqnn.ops import moment_product
from bqnn.ops.backends import cpu_moment, triton_moment
from bqnn.ops.register import call

moment_product.register("moment_conv2d", Conv2dProduct, CONV2D_GEOMETRY)
cpu_moment.register("moment_conv2d")
triton_moment.register("moment_conv2d")


def moment_conv2d(
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
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """The convolution with mean and variance propagated; see :func:`bqnn.ops.moment_linear` for modes and gradients.

    Args:
        x: [B, C, H, W] floating point, any memory format; the products are taken, and returned, in its dtype.
        weight, log_sigma2: mu and log of the posterior variance, [N, C / groups, kh, kw].
        levels: [1 or N, M], increasing.
        thresholds: [1 or N, M - 1], increasing.
        bias: [N] or None.
        seed: int64 scalar tensor, the Philox key.
        offset: Philox call that holds the noise of the first output; outputs count in [B, N, H', W'] order.
        mode: "categorical", "gaussian" or "straight_through".
        coarse_variance: as :func:`bqnn.ops.moment_linear` takes it.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, in pixels.

    Returns:
        [B, N, H', W'] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    posterior, noise = Posterior(weight, log_sigma2, levels, thresholds), Noise(seed, offset)
    moment_product.check_moment(posterior, 4, noise, mode, coarse_variance)
    check_integer("groups", groups)
    check_conv2d_input(x, weight.shape[1] * groups, weight.shape[0], groups)
    check_device("x", x, weight)
    check_bias(bias, weight.shape[0], x)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    padding = pair("padding", padding, 0)
    check_window(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)
    y, _ = call(
        "moment_conv2d",
        moment_product.MomentCall(
            x,
            posterior,
            bias,
            noise,
            mode,
            coarse_variance,
            Conv2dProduct(stride, padding, dilation, groups),
        ),
        backend,
    )
    return y
