"""sample_conv2d: an implicit matrix product with a weight that is sampled in the product, or once before it.

Shapes: x [B, C, H, W] and y [B, N, H', W'], weight [N, C / groups, kh, kw]; see kernels/conv2d.py for the product.
"""

import torch
import triton
import triton.language as tl

from bqnn.core.product import LinearProduct
from bqnn.kernels import sample_linear
from bqnn.kernels.arguments import Noise, as_matrix
from bqnn.kernels.conv2d import (
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
    weight_launch,
    weight_parts,
    weight_plan,
    weights_at,
)
from bqnn.kernels.geometry import (
    forward_axes,
    gradient_products,
    is_pointwise,
    output_of,
    places_of,
    weight_roles,
)
from bqnn.kernels.launch import architecture, flags_of_sample, launch, sum_of_splits
from bqnn.kernels.quantizer import codebook_of, quantize
from bqnn.kernels.sample import sample, sample_backward, sampled_block

# Estimates for an H200, none of them measured: with more blocks of rows than SAMPLED_BLOCKS, sampling in each of them
# costs more than a kernel that samples once, about 3 us; with fewer output channels of a group than NARROW, cuDNN's
# tiles are mostly padding.
SAMPLED_BLOCKS = 4
NARROW = 32
# Tiles are at most so large, (BN, BK). On sm_100 ptxas would spill registers of a larger product's tile.
PRODUCT_TILE, WEIGHT_TILE = (128, 64), (128, 128)
PRODUCT_TILE_SM_100 = (64, 64)


@triton.jit(do_not_specialize=["seed", "offset"])
def sample_conv2d_fwd_kernel(
    p_x,
    posterior,
    p_quantized,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    geometry,
    weight_strides,
    y_strides,
    groups,
    steps,
    span,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ORDER: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The weight is sampled here, from the posterior in the ORDER "contiguous", or was before: one of posterior and
    p_quantized is None."""
    noise = Noise(seed, offset)
    N = geometry.N
    i_mn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_m, o_m, o_n = tile_of(geometry, i_mn, BM, BN)
    m_m, m_n = o_m < geometry.M, o_n < N
    o_row = i_g * N + o_n
    image, row, column = pixels_at(geometry, o_m)
    o_h, o_w, o_x = sources_of(geometry, image, row, column)
    p_source = p_x + i_g * geometry.C + o_x
    if posterior is None:
        p_out = p_quantized + i_g * weight_strides.group + o_n.to(tl.int64)[:, None] * weight_strides.out
    b_y = tl.zeros((BM, BN), tl.float32)
    for step in range(i_s * span, tl.minimum(steps, (i_s + 1) * span)):
        t, u, o_c, m_k = step_at(geometry, step, TAPS_H, TAPS_W, BK, ORDER)
        o_k, inside = gathered(geometry, o_h, o_w, t, u, o_c)
        b_x = tl.load(p_source + o_k, mask=inside & m_m[:, None] & m_k, other=0.0)
        if posterior is not None:
            w, _ = sampled_block(posterior, noise, o_row, step * BK, i_g * N + N, geometry.K, BK, ALIGNED)
            o_group = codebook_of(o_row, m_n, step, NUM_LEVELS, PER_CHANNEL)
            b_w = quantize(w, posterior, o_group, NUM_LEVELS).to(b_x.dtype)
        else:
            b_w = tl.load(p_out + weights_at(weight_strides, t, u, o_c), mask=m_n[:, None] & m_k, other=0.0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_row, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = pixel_offsets(y_strides, i_s, image, row, column)
    tl.store(p_y + o_y[:, None] + (o_row * y_strides.channel)[None, :], b_y, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def sample_conv2d_bwd_kernel_weight(
    p_x,
    p_y,
    p_parts,
    geometry,
    weight_strides,
    y_strides,
    groups,
    span,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    M, N = geometry.M, geometry.N
    i_kn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_kn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    t, u, o_c, m_k = step_at(geometry, i_kn // tl.cdiv(N, BN), TAPS_H, TAPS_W, BK, ORDER)
    m_n = o_n < N
    p_source = p_x + i_g * geometry.C
    p_channel = p_y + ((i_g * N + o_n) * y_strides.channel)[None, :]
    b_w = tl.zeros((BN, BK), tl.float32)
    for first in range(i_s * span, tl.minimum(M, (i_s + 1) * span), BM):
        o_m = first + tl.arange(0, BM)
        m_m = (o_m < M)[:, None]
        image, row, column = pixels_at(geometry, o_m)
        o_h, o_w, o_x = sources_of(geometry, image, row, column)
        o_k, inside = gathered(geometry, o_h, o_w, t, u, o_c)
        b_x = tl.load(p_source + o_x + o_k, mask=inside & m_m & m_k, other=0.0)
        o_y = pixel_offsets(y_strides, i_s, image, row, column)
        b_y = tl.load(p_channel + o_y[:, None], mask=m_m & m_n[None, :], other=0.0)
        b_w = tl.dot(tl.trans(b_y), b_x, b_w, input_precision=PRECISION)  # [BN, BM] @ [BM, BK]
    o_out = i_s.to(tl.int64) * weight_strides.part + i_g * weight_strides.group
    o_out += o_n[:, None] * weight_strides.out
    tl.store(p_parts + o_out + weights_at(weight_strides, t, u, o_c), b_w, mask=m_n[:, None] & m_k)


def is_fused(x, posterior, product):
    """Whether the kernels here, or sample_linear's, multiply; otherwise torch does, by a weight sampled before."""
    weight = posterior.weight
    if is_pointwise(weight, product):
        return sample_linear.is_fused(pixels_last(x), posterior, LinearProduct())
    outputs = weight.shape[0] // product.groups
    if product.groups > 1 and outputs < 16:
        return False  # most of a tile would be padding
    return outputs < NARROW or row_blocks(x, weight, product) <= SAMPLED_BLOCKS


def forward(x, posterior, bias, noise, product):
    """y in x's dtype and the memory format of torch's convolution; x is not empty, the posterior is contiguous, the
    product a Conv2dProduct."""
    weight = posterior.weight
    shape, memory_format = output_of(x, weight, product)
    if is_pointwise(weight, product):
        y = sample_linear.forward(pixels_last(x), as_matrix(posterior), bias, noise, LinearProduct())
        return images_of(y, memory_format)
    sampled, taps = row_blocks(x, weight, product) <= SAMPLED_BLOCKS, weight.shape[2:].numel()
    plan = product_plan(x, shape, taps, product.groups, _product_tile(), "contiguous" if sampled else None)
    y = output_parts(plan, shape, memory_format, x)
    source = (posterior, None) if sampled else (None, sample(posterior, noise, x.dtype, torch.channels_last))
    _convolve(channels_last(x), y, *source, bias, noise, forward_axes(product), product.groups, plan)
    return sum_of_splits(y, None if bias is None else bias.view(-1, 1, 1), x.dtype)


def backward(grad, x, posterior, noise, input_gradient, product):
    """Gradients for x (empty if not asked for), weight, log_sigma2 (empty without it) and levels; grad as y."""
    weight = posterior.weight
    _, memory_format = output_of(x, weight, product)
    if is_pointwise(weight, product):
        grad_x, by_weight, by_log_sigma2, by_levels = sample_linear.backward(
            pixels_last(grad), pixels_last(x), as_matrix(posterior), noise, input_gradient, LinearProduct()
        )
        if input_gradient:
            grad_x = images_of(grad_x, memory_format)
        return grad_x, by_weight.view(weight.shape), by_log_sigma2.view(*by_log_sigma2.shape, 1, 1), by_levels
    grad, x, grad_x = channels_last(grad), channels_last(x), x.new_empty(0)
    if input_gradient:
        grad_x = _input_gradient(grad, x.shape, memory_format, posterior, noise, product)
    return grad_x, *sample_backward(_weight_gradient(grad, x, weight, product), posterior, noise)


def _product_tile():
    return PRODUCT_TILE_SM_100 if architecture() >= 100 else PRODUCT_TILE


def _convolve(x, y, posterior, quantized, bias, noise, axes, groups, plan, transposed=False):
    """Writes the product to y [S, B, channels, rows, columns]; one of posterior and quantized weight is None."""
    weight = quantized if posterior is None else posterior.weight
    places = places_of(x, y, weight, axes, groups, transposed, weight.shape[1:].numel())
    grid, cuts = product_launch(plan, places, groups, weight.shape[2:])
    launch(
        sample_conv2d_fwd_kernel, grid,
        x, posterior, quantized, bias if plan.splits == 1 else None, noise.seed, noise.offset, y,
        **cuts, **flags_of_sample(posterior), **precision_of(x),
    )  # fmt: skip


def _input_gradient(grad, shape, memory_format, posterior, noise, product):
    # The weight is sampled before, since in a tile of this product no two weights would share a call of Philox.
    quantized = sample(posterior, noise, grad.dtype, torch.channels_last)
    kernel, groups = quantized.shape[2:], product.groups
    plan = product_plan(grad, shape, kernel.numel(), groups, _product_tile())
    grad_x = output_parts(plan, shape, memory_format, grad)
    for pixels, taps, axes in gradient_products(shape, kernel, product):
        y, weight = grad_x[pixels], quantized[taps]
        if weight.numel():
            _convolve(grad, y, None, weight, None, noise, axes, groups, plan, transposed=True)
        else:
            y.zero_()
    return sum_of_splits(grad_x, None, grad.dtype)


def _weight_gradient(grad, x, weight, product):
    """The gradient for the weight as parts [S, *weight.shape], sums over S shares of the pixels."""
    kernel, groups = weight.shape[2:], product.groups
    source, pixels, axes, transposed = weight_roles(grad, x, kernel, product)
    plan = weight_plan(source, pixels, kernel.numel(), groups, WEIGHT_TILE)
    parts = weight_parts(plan, weight)
    places = places_of(source, pixels, parts, axes, groups, transposed)
    grid, cuts = weight_launch(plan, places, groups, kernel)
    launch(sample_conv2d_bwd_kernel_weight, grid, source, pixels, parts, **cuts, **precision_of(x))
    return parts
