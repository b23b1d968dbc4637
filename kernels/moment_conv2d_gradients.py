"""moment_conv2d, backward: the gradient for x, and those for the weight's moments, as implicit matrix products.

Shapes as in kernels/moment_conv2d.py; images are channels-last, slope is dy/dvariance.
"""

import triton
import triton.language as tl

from bqnn.kernels.conv2d import (
    gathered,
    output_parts,
    pixel_offsets,
    pixels_at,
    precision_of,
    product_launch,
    product_plan,
    sources_of,
    step_at,
    tile_of,
    weight_launch,
    weight_parts,
    weight_plan,
    weights_at,
)
from bqnn.kernels.geometry import (
    gradient_products,
    image_strides,
    places_of,
    weight_roles,
)
from bqnn.kernels.launch import launch, sum_of_splits
from bqnn.kernels.moment import Moments

# Tiles are at most so large, (BN, BK): each has two sums, and a second gathered operand.
INPUT_TILE, WEIGHT_TILE = (64, 32), (128, 64)


@triton.jit
def moment_conv2d_bwd_kernel_input(
    p_grad,
    p_slope,
    p_x,
    moments,
    p_grad_x,
    geometry,
    weight_strides,
    y_strides,
    x_strides,
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
    N = geometry.N
    i_mn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m, o_m, o_n = tile_of(geometry, i_mn, BM, BN)
    m_m, m_n = o_m < geometry.M, o_n < N
    image, row, column = pixels_at(geometry, o_m)
    o_h, o_w, o_source = sources_of(geometry, image, row, column)
    o_source += i_g * geometry.C
    o_out = i_g * weight_strides.group + o_n.to(tl.int64)[:, None] * weight_strides.out
    b_by_mean = tl.zeros((BM, BN), tl.float32)
    b_by_variance = tl.zeros((BM, BN), tl.float32)
    for step in range(i_s * span, tl.minimum(steps, (i_s + 1) * span)):
        t, u, o_c, m_k = step_at(geometry, step, TAPS_H, TAPS_W, BK, ORDER)
        o_k, inside = gathered(geometry, o_h, o_w, t, u, o_c)
        m_grad = inside & m_m[:, None] & m_k
        b_grad = tl.load(p_grad + o_source + o_k, mask=m_grad, other=0.0)
        b_slope = tl.load(p_slope + o_source + o_k, mask=m_grad, other=0.0)
        o_weight, m_w = o_out + weights_at(weight_strides, t, u, o_c), m_n[:, None] & m_k
        b_e = tl.load(moments.mean + o_weight, mask=m_w, other=0.0)
        b_v = tl.load(moments.variance + o_weight, mask=m_w, other=0.0)
        # [BM, BK] @ [BK, BN]
        b_by_mean = tl.dot(b_grad, tl.trans(b_e), b_by_mean, input_precision=PRECISION)
        b_scaled = (b_grad.to(tl.float32) * b_slope.to(tl.float32)).to(b_grad.dtype)
        b_by_variance = tl.dot(b_scaled, tl.trans(b_v), b_by_variance, input_precision=PRECISION)
    o_row, m_y = (i_g * N + o_n)[None, :], m_m[:, None] & m_n[None, :]
    o_x = pixel_offsets(x_strides, i_s, image, row, column)[:, None] + o_row
    b_x = tl.load(p_x + o_x, mask=m_y, other=0.0).to(tl.float32)
    o_y = pixel_offsets(y_strides, i_s, image, row, column)[:, None]
    tl.store(p_grad_x + o_y + o_row * y_strides.channel, b_by_mean + 2.0 * b_x * b_by_variance, mask=m_y)


@triton.jit
def moment_conv2d_bwd_kernel_weight(
    p_x,
    p_y,
    p_slope,
    parts,
    geometry,
    weight_strides,
    y_strides,
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
    M, N = geometry.M, geometry.N
    i_kn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_kn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    t, u, o_c, m_k = step_at(geometry, i_kn // tl.cdiv(N, BN), TAPS_H, TAPS_W, BK, ORDER)
    m_n = o_n < N
    b_by_mean = tl.zeros((BN, BK), tl.float32)
    b_by_variance = tl.zeros((BN, BK), tl.float32)
    for first in range(i_s * span, tl.minimum(M, (i_s + 1) * span), BM):
        o_m = first + tl.arange(0, BM)
        m_m = (o_m < M)[:, None]
        image, row, column = pixels_at(geometry, o_m)
        o_h, o_w, o_x = sources_of(geometry, image, row, column)
        o_k, inside = gathered(geometry, o_h, o_w, t, u, o_c)
        o_x, m_x = i_g * geometry.C + o_x + o_k, inside & m_m & m_k
        o_y = pixel_offsets(y_strides, i_s, image, row, column)[:, None]
        o_y, m_y = o_y + ((i_g * N + o_n) * y_strides.channel)[None, :], m_m & m_n[None, :]
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
    o_out = i_s.to(tl.int64) * weight_strides.part + i_g * weight_strides.group
    o_out += o_n[:, None] * weight_strides.out
    o_weight, m_w = o_out + weights_at(weight_strides, t, u, o_c), m_n[:, None] & m_k
    tl.store(parts.mean + o_weight, b_by_mean, mask=m_w)
    tl.store(parts.variance + o_weight, b_by_variance, mask=m_w)


def input_gradient_of(grad, slope, x, memory_format, made, product):
    """The gradient for x, in this memory format, with the weight's Moments."""
    kernel, groups = made.mean.shape[2:], product.groups
    plan = product_plan(grad, x.shape, kernel.numel(), groups, INPUT_TILE)
    grad_x = output_parts(plan, x.shape, memory_format, grad)
    for pixels, taps, axes in gradient_products(x.shape, kernel, product):
        y, there, weights = grad_x[pixels], x[pixels], Moments(made.mean[taps], made.variance[taps])
        if weights.mean.numel() == 0:
            y.zero_()
            continue
        places = places_of(grad, y, weights.mean, axes, groups, transposed=True)
        grid, cuts = product_launch(plan, places, groups, weights.mean.shape[2:])
        launch(
            moment_conv2d_bwd_kernel_input, grid,
            grad, slope, there, weights, y, x_strides=image_strides(there), **cuts, **precision_of(x),
        )  # fmt: skip
    return sum_of_splits(grad_x, None, grad.dtype)


def weight_gradients_of(grad, slope, x, weight, product):
    """The gradients for E and V as parts [S, *weight.shape], sums over S shares of the pixels."""
    kernel, groups = weight.shape[2:], product.groups
    source, pixels, axes, transposed = weight_roles(grad, x, kernel, product)
    plan = weight_plan(source, pixels, kernel.numel(), groups, WEIGHT_TILE)
    parts = Moments(weight_parts(plan, weight), weight_parts(plan, weight))
    places = places_of(source, pixels, parts.mean, axes, groups, transposed)
    grid, cuts = weight_launch(plan, places, groups, kernel)
    launch(
        moment_conv2d_bwd_kernel_weight, grid,
        source, pixels, slope, parts, TRANSPOSED=transposed, **cuts, **precision_of(x),
    )  # fmt: skip
    return parts
