"""moment_conv2d: mean and variance of the outputs from one load of x, as implicit matrix products.

Shapes: x [B, C, H, W] and y [B, N, H', W'], weight [N, C / groups, kh, kw]; see kernels/conv2d.py for the products.
The weight's moments E and V are made in the product, or once before it.
"""

import torch
import triton
import triton.language as tl

from bqnn.core.product import coarse_order
from bqnn.kernels import moment_linear
from bqnn.kernels.conv2d import (
    channels_last,
    forward_axes,
    gathered,
    geometry,
    gradient_products,
    images_of,
    is_pointwise,
    output_of,
    output_parts,
    pixels_at,
    pixels_last,
    precision_of,
    product_launch,
    product_plan,
    row_blocks,
    sources_of,
    step_at,
    weight_launch,
    weight_parts,
    weight_plan,
    weight_roles,
)
from bqnn.kernels.launch import architecture, flags_of_codebook, sum_of_splits
from bqnn.kernels.moment import add_noise, moments, moments_backward, noisy, weight_moments
from bqnn.kernels.philox import normals_of_outputs
from bqnn.kernels.quantizer import codebook_of

# An estimate for an H200, not a measurement: with more blocks of rows, making the moments in each costs more than a
# kernel that makes them once, about 3 us.
MADE_BLOCKS = 2
# The most (BN, BK): a tile has two sums, and the outputs' noise or a second gathered operand besides.
FORWARD_TILE, INPUT_TILE, WEIGHT_TILE = (64, 64), (64, 32), (128, 64)
NARROW_TILE = (32, 64)  # of a forward product with strides or dilation, and of all on sm_100; with more, ptxas spills


@triton.heuristics(
    {
        "ALIGNED": lambda args: args["rows"] * args["columns"] % 4 == 0,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_MEAN": lambda args: args["p_y"] is not None,
        "NOISY": lambda args: args["p_variance"] is None,
        "COARSE": lambda args: args["p_slope"] is not None,
    }
)
@triton.jit(do_not_specialize=["seed", "offset"])
def moment_conv2d_fwd_kernel(
    p_x,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    p_slope,
    p_variance,
    M,
    N,
    C,
    rows,
    columns,
    height,
    width,
    channels,
    step_h,
    step_w,
    origin_h,
    origin_w,
    delta_h,
    delta_w,
    w_group,
    w_out,
    w_in,
    w_h,
    w_w,
    y_part,
    y_image,
    y_channel,
    y_row,
    y_column,
    slope_channel,
    slope_column,
    groups,
    steps,
    span,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ORDER: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    NOISY: tl.constexpr,
    COARSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """NOISY: y, and the slope if COARSE. Otherwise parts of the variance, and of the mean, as y, if HAS_MEAN.

    MODE "loaded": p_weight and p_log_sigma2 are E and V. Otherwise they are the parameters, and ORDER is "contiguous".
    """
    i_mn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m = i_mn // tl.cdiv(N, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_mn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    o_row = i_g * N + o_n
    image, row, column = pixels_at(o_m, rows, columns)
    o_h, o_w, o_x = sources_of(image, row, column, step_h, step_w, origin_h, origin_w, height, width, channels)
    p_source = p_x + i_g * C + o_x
    o_out = i_g * w_group + o_n.to(tl.int64)[:, None] * w_out
    b_mean = tl.zeros((BM, BN), tl.float32)
    b_variance = tl.zeros((BM, BN), tl.float32)
    for step in range(i_s * span, tl.minimum(steps, (i_s + 1) * span)):
        t, u, o_c, m_k = step_at(step, C, TAPS_H, TAPS_W, BK, ORDER)
        o_k, inside = gathered(o_h, o_w, t, u, o_c, delta_h, delta_w, height, width, channels)
        b_x = tl.load(p_source + o_k, mask=inside & m_m[:, None] & m_k, other=0.0)
        m_w = m_n[:, None] & m_k
        if MODE == "loaded":
            o_weight = o_out + (t * w_h + u * w_w + o_c * w_in)
            b_v = tl.load(p_log_sigma2 + o_weight, mask=m_w, other=0.0)
            if HAS_MEAN:
                b_e = tl.load(p_weight + o_weight, mask=m_w, other=0.0)
        else:
            o_group = codebook_of(o_row, m_n, step, NUM_LEVELS, PER_CHANNEL)
            o_weight = o_out + (step * BK + tl.arange(0, BK))[None, :]
            b_e, b_v = weight_moments(
                p_weight, p_log_sigma2, p_levels, p_thresholds, o_weight, m_w, o_group, NUM_LEVELS, MODE
            )
            b_e, b_v = b_e.to(b_x.dtype), b_v.to(b_x.dtype)
        # [BM, BK] @ [BK, BN]
        if HAS_MEAN:
            b_mean = tl.dot(b_x, tl.trans(b_e), b_mean, input_precision=PRECISION)
        b_variance = tl.dot(b_x * b_x, tl.trans(b_v), b_variance, input_precision=PRECISION)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_row, mask=m_n, other=0.0).to(tl.float32)
        b_mean += tl.where(i_s == 0, b_bias, 0.0)[None, :]
    o_image = image.to(tl.int64) * y_image
    o_y = (i_s.to(tl.int64) * y_part + o_image + row * y_row + column * y_column)[:, None]
    o_y += (o_row * y_channel)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if NOISY:
        noise = normals_of_outputs(seed, offset, i_m, o_row, groups * N, rows * columns, BM, ALIGNED)
        b_mean, b_slope = add_noise(b_mean, b_variance, noise, COARSE)
        if COARSE:
            o_slope = (o_image + (row * columns + column) * slope_column)[:, None] + (o_row * slope_channel)[None, :]
            tl.store(p_slope + o_slope, b_slope, mask=m_y)
    else:
        tl.store(p_variance + o_y, b_variance, mask=m_y)
    if HAS_MEAN:
        tl.store(p_y + o_y, b_mean, mask=m_y)


@triton.jit
def moment_conv2d_bwd_kernel_input(
    p_grad,
    p_slope,
    p_x,
    p_mean,
    p_variance,
    p_grad_x,
    M,
    N,
    C,
    rows,
    columns,
    height,
    width,
    channels,
    step_h,
    step_w,
    origin_h,
    origin_w,
    delta_h,
    delta_w,
    w_group,
    w_out,
    w_in,
    w_h,
    w_w,
    y_part,
    y_image,
    y_channel,
    y_row,
    y_column,
    x_image,
    x_row,
    x_column,
    groups,
    steps,
    span,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gathered images are the outputs' gradient and slope, and y is the gradient for x."""
    i_mn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = i_mn // tl.cdiv(N, BN) * BM + tl.arange(0, BM)
    o_n = i_mn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    image, row, column = pixels_at(o_m, rows, columns)
    o_h, o_w, o_source = sources_of(image, row, column, step_h, step_w, origin_h, origin_w, height, width, channels)
    o_source += i_g * C
    o_out = i_g * w_group + o_n.to(tl.int64)[:, None] * w_out
    b_by_mean = tl.zeros((BM, BN), tl.float32)
    b_by_variance = tl.zeros((BM, BN), tl.float32)
    for step in range(i_s * span, tl.minimum(steps, (i_s + 1) * span)):
        t, u, o_c, m_k = step_at(step, C, TAPS_H, TAPS_W, BK, ORDER)
        o_k, inside = gathered(o_h, o_w, t, u, o_c, delta_h, delta_w, height, width, channels)
        m_grad = inside & m_m[:, None] & m_k
        b_grad = tl.load(p_grad + o_source + o_k, mask=m_grad, other=0.0)
        b_slope = tl.load(p_slope + o_source + o_k, mask=m_grad, other=0.0)
        o_weight, m_w = o_out + (t * w_h + u * w_w + o_c * w_in), m_n[:, None] & m_k
        b_e = tl.load(p_mean + o_weight, mask=m_w, other=0.0)
        b_v = tl.load(p_variance + o_weight, mask=m_w, other=0.0)
        # [BM, BK] @ [BK, BN]
        b_by_mean = tl.dot(b_grad, tl.trans(b_e), b_by_mean, input_precision=PRECISION)
        b_scaled = (b_grad.to(tl.float32) * b_slope.to(tl.float32)).to(b_grad.dtype)
        b_by_variance = tl.dot(b_scaled, tl.trans(b_v), b_by_variance, input_precision=PRECISION)
    o_row, m_y = (i_g * N + o_n)[None, :], m_m[:, None] & m_n[None, :]
    o_image = image.to(tl.int64)
    o_x = (o_image * x_image + row * x_row + column * x_column)[:, None] + o_row
    b_x = tl.load(p_x + o_x, mask=m_y, other=0.0).to(tl.float32)
    o_y = (i_s.to(tl.int64) * y_part + o_image * y_image + row * y_row + column * y_column)[:, None]
    tl.store(p_grad_x + o_y + o_row * y_channel, b_by_mean + 2.0 * b_x * b_by_variance, mask=m_y)


@triton.jit
def moment_conv2d_bwd_kernel_weight(
    p_x,
    p_y,
    p_slope,
    p_grad_mean,
    p_grad_variance,
    M,
    N,
    C,
    rows,
    columns,
    height,
    width,
    channels,
    step_h,
    step_w,
    origin_h,
    origin_w,
    delta_h,
    delta_w,
    w_part,
    w_group,
    w_out,
    w_in,
    w_h,
    w_w,
    y_image,
    y_channel,
    y_row,
    y_column,
    groups,
    span,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ORDER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x is gathered and y, with the slope beside it, is the outputs' gradient; TRANSPOSED, the other way round."""
    i_kn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_kn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    t, u, o_c, m_k = step_at(i_kn // tl.cdiv(N, BN), C, TAPS_H, TAPS_W, BK, ORDER)
    m_n = o_n < N
    b_by_mean = tl.zeros((BN, BK), tl.float32)
    b_by_variance = tl.zeros((BN, BK), tl.float32)
    for first in range(i_s * span, tl.minimum(M, (i_s + 1) * span), BM):
        o_m = first + tl.arange(0, BM)
        m_m = (o_m < M)[:, None]
        image, row, column = pixels_at(o_m, rows, columns)
        o_h, o_w, o_x = sources_of(image, row, column, step_h, step_w, origin_h, origin_w, height, width, channels)
        o_k, inside = gathered(o_h, o_w, t, u, o_c, delta_h, delta_w, height, width, channels)
        o_x, m_x = i_g * C + o_x + o_k, inside & m_m & m_k
        o_y = (image.to(tl.int64) * y_image + row * y_row + column * y_column)[:, None]
        o_y, m_y = o_y + ((i_g * N + o_n) * y_channel)[None, :], m_m & m_n[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
        b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
        b_by_mean = tl.dot(tl.trans(b_y), b_x, b_by_mean, input_precision=PRECISION)  # [BN, BM] @ [BM, BK]
        if TRANSPOSED:
            b_slope = tl.load(p_slope + o_x, mask=m_x, other=0.0)
            b_x = (b_x.to(tl.float32) * b_slope.to(tl.float32)).to(b_x.dtype)
            b_y = b_y * b_y
        else:
            b_slope = tl.load(p_slope + o_y, mask=m_y, other=0.0)
            b_y = (b_y.to(tl.float32) * b_slope.to(tl.float32)).to(b_y.dtype)
            b_x = b_x * b_x
        b_by_variance = tl.dot(tl.trans(b_y), b_x, b_by_variance, input_precision=PRECISION)
    o_out = i_s.to(tl.int64) * w_part + i_g * w_group + o_n[:, None] * w_out
    o_weight, m_w = o_out + (t * w_h + u * w_w + o_c * w_in), m_n[:, None] & m_k
    tl.store(p_grad_mean + o_weight, b_by_mean, mask=m_w)
    tl.store(p_grad_variance + o_weight, b_by_variance, mask=m_w)


def is_fused(x, weight, levels, mode, *product):
    """Whether the kernels here multiply; otherwise torch does, by moments made before."""
    output_of(x, weight, *product)  # refuses what torch refuses
    groups = product[-1]
    return groups == 1 or weight.shape[0] // groups >= 16  # otherwise most of a tile would be padding


def forward(x, weight, log_sigma2, levels, thresholds, bias, seed, offset, mode, coarse, *product):
    """y in x's dtype and the memory format of torch's convolution, and dy/dvariance in bfloat16 if ``coarse``, else an
    empty tensor. x is not empty, the parameters are contiguous."""
    shape, memory_format = output_of(x, weight, *product)
    posterior, noise = (weight, log_sigma2, levels, thresholds), (seed, offset)
    if _is_linear(x, weight, levels, mode, *product):
        y, slope = moment_linear.forward(
            pixels_last(x), *_as_matrices(posterior), bias, *noise, mode, coarse, shape[2] * shape[3]
        )
        slope = coarse_order(x, images_of(slope, memory_format)) if coarse else slope
        return images_of(y, memory_format), slope
    pixels = channels_last(x)
    y = torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=memory_format)
    slope = coarse_order(x, torch.empty_like(y, dtype=torch.bfloat16)) if coarse else None
    source, mode, plan = _prepared(x, shape, posterior, mode, *product)
    if plan.splits == 1:
        _products(pixels, y[None], slope, None, source, mode, bias, noise, plan, *product)
    else:
        mean, variance = (output_parts(plan, shape, memory_format, x, torch.float32) for _ in range(2))
        _products(pixels, mean, None, variance, source, mode, bias, noise, plan, *product)
        noisy(mean, variance, *noise, y, slope)
    return y, y.new_empty(0) if slope is None else slope


def backward(grad, slope, x, weight, log_sigma2, levels, thresholds, seed, offset, mode, input_gradient, *product):
    """Gradients for x (empty if not asked for), weight, log_sigma2, levels and thresholds; grad as y.

    Without ``slope``, dy/dvariance, it is made again.
    """
    _, memory_format = output_of(x, weight, *product)
    posterior, noise = (weight, log_sigma2, levels, thresholds), (seed, offset)
    if _is_linear(x, weight, levels, mode, *product):
        grad, slope, source = (None if tensor is None else pixels_last(tensor) for tensor in (grad, slope, x))
        grad_x, by_weight, by_log_sigma2, *codebook = moment_linear.backward(
            grad, slope, source, *_as_matrices(posterior), *noise, mode, input_gradient, x.shape[2] * x.shape[3]
        )
        if input_gradient:
            grad_x = images_of(grad_x, memory_format)
        return grad_x, by_weight.view(weight.shape), by_log_sigma2.view(weight.shape), *codebook
    pixels = channels_last(x)
    slope = channels_last(_slope(pixels, posterior, noise, mode, *product) if slope is None else slope)
    grad, grad_x = channels_last(grad), x.new_empty(0)
    if input_gradient:
        weights = moments(*posterior, mode, x.dtype, torch.channels_last)
        grad_x = _input_gradient(grad, slope, pixels, memory_format, weights, *product)
    parts = _weight_gradients(grad, slope, pixels, weight, *product)
    return grad_x, *moments_backward(*parts, *posterior, mode)


def _is_linear(x, weight, levels, mode, *product):
    """Whether the kernels of moment_linear multiply, as they would the pixels of the images."""
    return is_pointwise(weight, *product) and moment_linear.is_fused(pixels_last(x), weight, levels, mode)


def _as_matrices(posterior):
    weight, log_sigma2, *codebook = posterior
    return weight.flatten(1), log_sigma2.flatten(1), *codebook


def _prepared(x, shape, posterior, mode, stride, padding, dilation, groups):
    """What the forward kernel takes as its weight and its mode, and how it is cut up."""
    weight, _, levels, _ = posterior
    taps, made = weight[0, 0].numel(), row_blocks(shape) <= MADE_BLOCKS
    if not made:
        posterior = (*moments(*posterior, mode, x.dtype, torch.channels_last), None, None)
    tile = FORWARD_TILE if (*stride, *dilation) == (1, 1, 1, 1) and architecture() < 100 else NARROW_TILE
    plan = product_plan(x, shape, taps, groups, tile, "contiguous" if made else None)
    return posterior, mode if made else "loaded", plan


def _products(x, y, slope, variance, source, mode, bias, noise, plan, stride, padding, dilation, groups):
    """Runs the forward kernel on y [S, ...], or without it on ``variance`` [S, ...]; x is channels-last."""
    weight, _, levels, _ = source
    output = variance if y is None else y
    places = geometry(x, output, weight, forward_axes(stride, padding, dilation), groups)
    grid, cuts = product_launch(plan, places)
    channel, column = (0, 0) if slope is None else (slope.stride(1), slope.stride(3))
    moment_conv2d_fwd_kernel[grid](
        x, *source, bias, *noise, y, slope, variance, **places, y_part=output.stride(0),
        slope_channel=channel, slope_column=column, MODE=mode, **cuts, **flags_of_codebook(levels), **precision_of(x),
    )  # fmt: skip


def _slope(x, posterior, noise, mode, *product):
    """dy/dvariance, made again, in x's dtype; x is channels-last."""
    shape, memory_format = output_of(x, posterior[0], *product)
    source, mode, plan = _prepared(x, shape, posterior, mode, *product)
    variance = output_parts(plan, shape, memory_format, x, torch.float32)
    _products(x, None, None, variance, source, mode, None, noise, plan, *product)
    slope = torch.empty_like(variance[0], dtype=x.dtype)
    noisy(None, variance, *noise, None, slope)
    return slope


def _input_gradient(grad, slope, x, memory_format, weights, *product):
    kernel, groups = weights[0].shape[2:], product[-1]
    plan = product_plan(grad, x.shape, kernel.numel(), groups, INPUT_TILE)
    grad_x = output_parts(plan, x.shape, memory_format, grad)
    for pixels, taps, axes in gradient_products(x.shape, kernel, *product[:-1]):
        y, there, (mean, variance) = grad_x[pixels], x[pixels], [weight[taps] for weight in weights]
        if mean.numel() == 0:
            y.zero_()
            continue
        places = geometry(grad, y, mean, axes, groups, transposed=True)
        grid, cuts = product_launch(plan, places)
        moment_conv2d_bwd_kernel_input[grid](
            grad, slope, there, mean, variance, y, **places, y_part=y.stride(0), x_image=there.stride(0),
            x_row=there.stride(2), x_column=there.stride(3), **cuts, **precision_of(x),
        )  # fmt: skip
    return sum_of_splits(grad_x, None, grad.dtype)


def _weight_gradients(grad, slope, x, weight, *product):
    """The gradients for E and V as parts [S, *weight.shape], sums over S shares of the pixels."""
    kernel, groups = weight.shape[2:], product[-1]
    source, pixels, axes, transposed = weight_roles(grad, x, kernel, *product[:-1])
    plan = weight_plan(source, pixels, kernel.numel(), groups, WEIGHT_TILE)
    parts = weight_parts(plan, weight), weight_parts(plan, weight)
    places = geometry(source, pixels, parts[0][0], axes, groups, transposed)
    grid, cuts = weight_launch(plan, places)
    moment_conv2d_bwd_kernel_weight[grid](
        source, pixels, slope, *parts, **places, w_part=parts[0].stride(0), TRANSPOSED=transposed, **cuts,
        **precision_of(x),
    )  # fmt: skip
    return parts
