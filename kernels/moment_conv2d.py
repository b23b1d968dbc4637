"""moment_conv2d: mean and variance of the outputs from one load of x, as implicit matrix products.

Shapes: x [B, C, H, W] and y [B, N, H', W'], weight [N, C / groups, kh, kw]; see kernels/conv2d.py for the products.
The weight's moments E and V are made in the product, or once before it.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bqnn.core.product import LinearProduct, coarse_order
from bqnn.core.quantizer import Posterior
from bqnn.kernels import moment_linear
from bqnn.kernels.arguments import as_matrix
from bqnn.kernels.conv2d import (
    Plan,
    channels_last,
    gathered,
    images_of,
    output_parts,
    pixel_offsets,
    pixels_at,
    pixels_last,
    precision_of,
    product_launch,
    product_plan,
    row_blocks,
    sources_of,
    step_at,
    tile_of,
    weights_at,
)
from bqnn.kernels.geometry import (
    forward_axes,
    is_pointwise,
    output_of,
    places_of,
)
from bqnn.kernels.launch import architecture, flags_of_posterior, launch
from bqnn.kernels.moment import Moments, moments, moments_backward, weight_moments
from bqnn.kernels.moment_conv2d_gradients import input_gradient_of, weight_gradients_of
from bqnn.kernels.noise import add_noise, noisy
from bqnn.kernels.philox import normals_of_outputs
from bqnn.kernels.quantizer import codebook_of

# An estimate for an H200, not a measurement: with more blocks of rows, making the moments in each costs more than a
# kernel that makes them once, about 3 us.
MADE_BLOCKS = 2
# A tile is at most so large, (BN, BK): it has two sums, and the outputs' noise besides.
FORWARD_TILE = (64, 64)
# With strides or dilation, and on sm_100 always, ptxas would spill registers of a larger tile than this.
NARROW_TILE = (32, 64)


@triton.jit(do_not_specialize=["seed", "offset"])
def moment_conv2d_fwd_kernel(
    p_x,
    posterior,
    moments,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    p_slope,
    p_variance,
    geometry,
    weight_strides,
    y_strides,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Without p_variance: y, and with p_slope the slope. Otherwise parts of the variance, and with p_y of the mean.

    The moments are made here, from the posterior in the ORDER "contiguous", or were before: one of the two is None.
    """
    N = geometry.N
    i_mn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m, o_m, o_n = tile_of(geometry, i_mn, BM, BN)
    m_m, m_n = o_m < geometry.M, o_n < N
    o_row = i_g * N + o_n
    image, row, column = pixels_at(geometry, o_m)
    o_h, o_w, o_x = sources_of(geometry, image, row, column)
    p_source = p_x + i_g * geometry.C + o_x
    o_out = i_g * weight_strides.group + o_n.to(tl.int64)[:, None] * weight_strides.out
    b_mean = tl.zeros((BM, BN), tl.float32)
    b_variance = tl.zeros((BM, BN), tl.float32)
    for step in range(i_s * span, tl.minimum(steps, (i_s + 1) * span)):
        t, u, o_c, m_k = step_at(geometry, step, TAPS_H, TAPS_W, BK, ORDER)
        o_k, inside = gathered(geometry, o_h, o_w, t, u, o_c)
        b_x = tl.load(p_source + o_k, mask=inside & m_m[:, None] & m_k, other=0.0)
        m_w = m_n[:, None] & m_k
        if posterior is None:
            o_weight = o_out + weights_at(weight_strides, t, u, o_c)
            b_v = tl.load(moments.variance + o_weight, mask=m_w, other=0.0)
            if p_y is not None:
                b_e = tl.load(moments.mean + o_weight, mask=m_w, other=0.0)
        else:
            o_group = codebook_of(o_row, m_n, step, NUM_LEVELS, PER_CHANNEL)
            o_weight = o_out + (step * BK + tl.arange(0, BK))[None, :]
            b_e, b_v = weight_moments(posterior, o_weight, m_w, o_group, NUM_LEVELS, MODE)
            b_e, b_v = b_e.to(b_x.dtype), b_v.to(b_x.dtype)
        # [BM, BK] @ [BK, BN]
        if p_y is not None:
            b_mean = tl.dot(b_x, tl.trans(b_e), b_mean, input_precision=PRECISION)
        b_variance = tl.dot(b_x * b_x, tl.trans(b_v), b_variance, input_precision=PRECISION)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_row, mask=m_n, other=0.0).to(tl.float32)
        b_mean += tl.where(i_s == 0, b_bias, 0.0)[None, :]
    o_image = image.to(tl.int64) * y_strides.image
    o_y = pixel_offsets(y_strides, i_s, image, row, column)[:, None]
    o_y += (o_row * y_strides.channel)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if p_variance is None:
        size = geometry.rows * geometry.columns
        normals = normals_of_outputs(seed, offset, i_m, o_row, groups * N, size, BM, ALIGNED)
        b_mean, b_slope = add_noise(b_mean, b_variance, normals, p_slope is not None)
        if p_slope is not None:
            # Slope and y are dense, so that their images are equally far from each other.
            o_slope = (o_image + (row * geometry.columns + column) * slope_column)[:, None]
            o_slope += (o_row * slope_channel)[None, :]
            tl.store(p_slope + o_slope, b_slope, mask=m_y)
    else:
        tl.store(p_variance + o_y, b_variance, mask=m_y)
    if p_y is not None:
        tl.store(p_y + o_y, b_mean, mask=m_y)


def is_fused(x, posterior, mode, product):
    """Whether the kernels here multiply; otherwise torch does, by moments made before."""
    groups = product.groups
    return groups == 1 or posterior.weight.shape[0] // groups >= 16  # otherwise most of a tile would be padding


def forward(x, posterior, bias, noise, mode, coarse, product):
    """y in x's dtype and the memory format of torch's convolution, and dy/dvariance in bfloat16 if ``coarse``, else an
    empty tensor. x is not empty, the posterior is contiguous, the product a Conv2dProduct."""
    shape, memory_format = output_of(x, posterior.weight, product)
    if _is_linear(x, posterior, mode, product):
        y, slope = moment_linear.forward(
            pixels_last(x), as_matrix(posterior), bias, noise, mode, coarse, LinearProduct(), shape[2] * shape[3]
        )
        slope = coarse_order(x, images_of(slope, memory_format)) if coarse else slope
        return images_of(y, memory_format), slope
    pixels = channels_last(x)
    y = torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=memory_format)
    slope = coarse_order(x, torch.empty_like(y, dtype=torch.bfloat16)) if coarse else None
    source = _source(pixels, shape, posterior, mode, product)
    multiply = partial(_multiply, pixels, source, bias, noise, mode, product)
    if source.plan.splits == 1:
        multiply(y[None], slope, None)
    else:
        mean, variance = (output_parts(source.plan, shape, memory_format, x, torch.float32) for _ in range(2))
        multiply(mean, None, variance)
        noisy(mean, variance, noise, y, slope)
    return y, y.new_empty(0) if slope is None else slope


def backward(grad, slope, x, posterior, noise, mode, input_gradient, product):
    """Gradients for x (empty if not asked for), weight, log_sigma2, levels and thresholds; grad as y.

    Without ``slope``, dy/dvariance, it is made again.
    """
    weight = posterior.weight
    _, memory_format = output_of(x, weight, product)
    if _is_linear(x, posterior, mode, product):
        grad, slope, source = (None if tensor is None else pixels_last(tensor) for tensor in (grad, slope, x))
        pixels = x.shape[2] * x.shape[3]
        grad_x, by_weight, by_log_sigma2, *codebook = moment_linear.backward(
            grad, slope, source, as_matrix(posterior), noise, mode, input_gradient, LinearProduct(), pixels
        )
        if input_gradient:
            grad_x = images_of(grad_x, memory_format)
        return grad_x, by_weight.view(weight.shape), by_log_sigma2.view(weight.shape), *codebook
    pixels = channels_last(x)
    slope = channels_last(_slope(pixels, posterior, noise, mode, product) if slope is None else slope)
    grad, grad_x = channels_last(grad), x.new_empty(0)
    if input_gradient:
        made = moments(posterior, mode, x.dtype, torch.channels_last)
        grad_x = input_gradient_of(grad, slope, pixels, memory_format, made, product)
    return grad_x, *moments_backward(weight_gradients_of(grad, slope, pixels, weight, product), posterior, mode)


def _is_linear(x, posterior, mode, product):
    """Whether the kernels of moment_linear multiply, as they would the pixels of the images."""
    pointwise = is_pointwise(posterior.weight, product)
    return pointwise and moment_linear.is_fused(pixels_last(x), posterior, mode, LinearProduct())


class Source(NamedTuple):
    """What the forward kernel multiplies with, and how it is cut up."""

    posterior: Posterior | None
    moments: Moments | None
    plan: Plan


def _source(x, shape, posterior, mode, product):
    taps, made = posterior.weight.shape[2:].numel(), row_blocks(x, posterior.weight, product) > MADE_BLOCKS
    plain = (*product.stride, *product.dilation) == (1, 1, 1, 1) and architecture() < 100
    tile = FORWARD_TILE if plain else NARROW_TILE
    plan = product_plan(x, shape, taps, product.groups, tile, None if made else "contiguous")
    if made:
        return Source(None, moments(posterior, mode, x.dtype, torch.channels_last), plan)
    return Source(posterior, None, plan)


def _multiply(x, source, bias, noise, mode, product, y, slope, variance):
    """Runs the forward kernel on y [S, ...], or without it on ``variance`` [S, ...]; x is channels-last."""
    posterior, made, plan = source
    weight, output = posterior.weight if made is None else made.mean, variance if y is None else y
    places = places_of(x, output, weight, forward_axes(product), product.groups)
    grid, cuts = product_launch(plan, places, product.groups, weight.shape[2:])
    channel, column = (0, 0) if slope is None else (slope.stride(1), slope.stride(3))
    launch(
        moment_conv2d_fwd_kernel, grid,
        x, posterior, made, bias, noise.seed, noise.offset, y, slope, variance,
        slope_channel=channel, slope_column=column, MODE=mode,
        ALIGNED=places.geometry.rows * places.geometry.columns % 4 == 0, **cuts, **flags_of_posterior(posterior),
        **precision_of(x),
    )  # fmt: skip


def _slope(x, posterior, noise, mode, product):
    """dy/dvariance, made again, in x's dtype; x is channels-last."""
    shape, memory_format = output_of(x, posterior.weight, product)
    source = _source(x, shape, posterior, mode, product)
    variance = output_parts(source.plan, shape, memory_format, x, torch.float32)
    _multiply(x, source, None, noise, mode, product, None, None, variance)
    slope = torch.empty_like(variance[0], dtype=x.dtype)
    noisy(None, variance, noise, None, slope)
    return slope
