"""sample_conv2d: an implicit matrix product with a weight that is sampled in the product, or once before it.

Shapes: x [B, C, H, W] and y [B, N, H', W'], weight [N, C / groups, kh, kw]; see kernels/conv2d.py for the product.
"""

import torch
import triton
import triton.language as tl

from bqnn.kernels import sample_linear
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
from bqnn.kernels.launch import architecture, flags_of_codebook, heuristics_of_posterior, sum_of_splits
from bqnn.kernels.quantizer import codebook_of, quantize
from bqnn.kernels.sample import sample, sample_backward, sampled_block

# Estimates for an H200, none of them measured.
SAMPLED_BLOCKS = 4  # of rows; with more, sampling in each costs more than a kernel that samples once, about 3 us
NARROW = 32  # output channels of a group; with fewer, cuDNN's tiles are mostly padding
PRODUCT_TILE, WEIGHT_TILE = (128, 64), (128, 128)  # the most (BN, BK)
PRODUCT_TILE_SM_100 = (64, 64)  # with more, ptxas spills


@heuristics_of_posterior
@triton.heuristics({"HAS_BIAS": lambda args: args["p_bias"] is not None})
@triton.jit(do_not_specialize=["seed", "offset"])
def sample_conv2d_fwd_kernel(
    p_x,
    p_weight,
    p_log_sigma2,
    p_levels,
    p_thresholds,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    M,
    N,
    C,
    K,
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
    groups,
    steps,
    span,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLED: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_mn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = i_mn // tl.cdiv(N, BN) * BM + tl.arange(0, BM)
    o_n = i_mn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    o_row = i_g * N + o_n
    image, row, column = pixels_at(o_m, rows, columns)
    o_h, o_w, o_x = sources_of(image, row, column, step_h, step_w, origin_h, origin_w, height, width, channels)
    p_source = p_x + i_g * C + o_x
    p_out = p_weight + i_g * w_group + o_n.to(tl.int64)[:, None] * w_out
    b_y = tl.zeros((BM, BN), tl.float32)
    for step in range(i_s * span, tl.minimum(steps, (i_s + 1) * span)):
        t, u, o_c, m_k = step_at(step, C, TAPS_H, TAPS_W, BK, ORDER)
        o_k, inside = gathered(o_h, o_w, t, u, o_c, delta_h, delta_w, height, width, channels)
        b_x = tl.load(p_source + o_k, mask=inside & m_m[:, None] & m_k, other=0.0)
        if SAMPLED:
            w, _ = sampled_block(
                p_weight, p_log_sigma2, seed, offset, o_row, step * BK, i_g * N + N, K, BK, STOCHASTIC, ALIGNED
            )
            o_group = codebook_of(o_row, m_n, step, NUM_LEVELS, PER_CHANNEL)
            b_w = quantize(w, p_levels, p_thresholds, o_group, NUM_LEVELS).to(b_x.dtype)
        else:
            b_w = tl.load(p_out + (t * w_h + u * w_w + o_c * w_in), mask=m_n[:, None] & m_k, other=0.0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_row, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = i_s.to(tl.int64) * y_part + image.to(tl.int64) * y_image + row * y_row + column * y_column
    tl.store(p_y + o_y[:, None] + (o_row * y_channel)[None, :], b_y, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def sample_conv2d_bwd_kernel_weight(
    p_x,
    p_y,
    p_parts,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_kn, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_kn % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    t, u, o_c, m_k = step_at(i_kn // tl.cdiv(N, BN), C, TAPS_H, TAPS_W, BK, ORDER)
    m_n = o_n < N
    p_source = p_x + i_g * C
    p_pixel = p_y + ((i_g * N + o_n) * y_channel)[None, :]
    b_w = tl.zeros((BN, BK), tl.float32)
    for first in range(i_s * span, tl.minimum(M, (i_s + 1) * span), BM):
        o_m = first + tl.arange(0, BM)
        m_m = (o_m < M)[:, None]
        image, row, column = pixels_at(o_m, rows, columns)
        o_h, o_w, o_x = sources_of(image, row, column, step_h, step_w, origin_h, origin_w, height, width, channels)
        o_k, inside = gathered(o_h, o_w, t, u, o_c, delta_h, delta_w, height, width, channels)
        b_x = tl.load(p_source + o_x + o_k, mask=inside & m_m & m_k, other=0.0)
        o_y = image.to(tl.int64) * y_image + row * y_row + column * y_column
        b_y = tl.load(p_pixel + o_y[:, None], mask=m_m & m_n[None, :], other=0.0)
        b_w = tl.dot(tl.trans(b_y), b_x, b_w, input_precision=PRECISION)  # [BN, BM] @ [BM, BK]
    o_out = i_s.to(tl.int64) * w_part + i_g * w_group + o_n[:, None] * w_out
    tl.store(p_parts + o_out + (t * w_h + u * w_w + o_c * w_in), b_w, mask=m_n[:, None] & m_k)


def is_fused(x, weight, *product):
    """Whether the kernels here, or sample_linear's, multiply; otherwise torch does, by a weight sampled before."""
    shape, _ = output_of(x, weight, *product)
    if is_pointwise(weight, *product):
        return sample_linear.is_fused(pixels_last(x), weight)
    groups = product[-1]
    outputs = weight.shape[0] // groups
    if groups > 1 and outputs < 16:
        return False  # most of a tile would be padding
    return outputs < NARROW or row_blocks(shape) <= SAMPLED_BLOCKS


def forward(x, weight, log_sigma2, levels, thresholds, bias, seed, offset, *product):
    """y in x's dtype and the memory format of torch's convolution; x is not empty, parameters are contiguous."""
    shape, memory_format = output_of(x, weight, *product)
    posterior, noise = (weight, log_sigma2, levels, thresholds), (seed, offset)
    if is_pointwise(weight, *product):
        y = sample_linear.forward(pixels_last(x), *_as_matrices(posterior), bias, *noise)
        return images_of(y, memory_format)
    sampled, taps, groups = row_blocks(shape) <= SAMPLED_BLOCKS, weight[0, 0].numel(), product[-1]
    if not sampled:
        posterior = (sample(*posterior, *noise, x.dtype, torch.channels_last), None, None, None)
    plan = product_plan(x, shape, taps, groups, _product_tile(), "contiguous" if sampled else None)
    y = output_parts(plan, shape, memory_format, x)
    _convolve(channels_last(x), y, posterior, bias, noise, forward_axes(*product[:-1]), groups, plan)
    return sum_of_splits(y, None if bias is None else bias.view(-1, 1, 1), x.dtype)


def backward(grad, x, weight, log_sigma2, levels, thresholds, seed, offset, input_gradient, *product):
    """Gradients for x (empty if not asked for), weight, log_sigma2 (empty without it) and levels; grad as y."""
    _, memory_format = output_of(x, weight, *product)
    posterior, noise = (weight, log_sigma2, levels, thresholds), (seed, offset)
    if is_pointwise(weight, *product):
        grad_x, by_weight, by_log_sigma2, by_levels = sample_linear.backward(
            pixels_last(grad), pixels_last(x), *_as_matrices(posterior), *noise, input_gradient
        )
        if input_gradient:
            grad_x = images_of(grad_x, memory_format)
        return grad_x, by_weight.view(weight.shape), by_log_sigma2.view(*by_log_sigma2.shape, 1, 1), by_levels
    grad, x, grad_x = channels_last(grad), channels_last(x), x.new_empty(0)
    if input_gradient:
        grad_x = _input_gradient(grad, x.shape, memory_format, posterior, noise, *product)
    return grad_x, *sample_backward(_weight_gradient(grad, x, weight, *product), *posterior, *noise)


def _product_tile():
    return PRODUCT_TILE_SM_100 if architecture() >= 100 else PRODUCT_TILE


def _as_matrices(posterior):
    weight, log_sigma2, *codebook = posterior
    return weight.flatten(1), None if log_sigma2 is None else log_sigma2.flatten(1), *codebook


def _convolve(x, y, posterior, bias, noise, axes, groups, plan, transposed=False):
    """Writes the product to y [S, B, channels, rows, columns]; without a codebook the weight is not sampled here."""
    weight, _, levels, _ = posterior
    places = geometry(x, y, weight, axes, groups, transposed)
    grid, cuts = product_launch(plan, places)
    sample_conv2d_fwd_kernel[grid](
        x, *posterior, bias if plan.splits == 1 else None, *noise, y, **places, y_part=y.stride(0),
        K=weight[0].numel(), SAMPLED=levels is not None, **cuts, **flags_of_codebook(levels),
        **precision_of(x),
    )  # fmt: skip


def _input_gradient(grad, shape, memory_format, posterior, noise, *product):
    # Sampled before: in a tile of this product no two weights would share a call of Philox.
    quantized = sample(*posterior, *noise, grad.dtype, torch.channels_last)
    kernel, groups = quantized.shape[2:], product[-1]
    plan = product_plan(grad, shape, kernel.numel(), groups, _product_tile())
    grad_x = output_parts(plan, shape, memory_format, grad)
    for pixels, taps, axes in gradient_products(shape, kernel, *product[:-1]):
        y, weight = grad_x[pixels], quantized[taps]
        if weight.numel():
            _convolve(grad, y, (weight, None, None, None), None, noise, axes, groups, plan, True)
        else:
            y.zero_()
    return sum_of_splits(grad_x, None, grad.dtype)


def _weight_gradient(grad, x, weight, *product):
    """The gradient for the weight as parts [S, *weight.shape], sums over S shares of the pixels."""
    kernel, groups = weight.shape[2:], product[-1]
    source, pixels, axes, transposed = weight_roles(grad, x, kernel, *product[:-1])
    plan = weight_plan(source, pixels, kernel.numel(), groups, WEIGHT_TILE)
    parts = weight_parts(plan, weight)
    places = geometry(source, pixels, parts[0], axes, groups, transposed)
    grid, cuts = weight_launch(plan, places)
    sample_conv2d_bwd_kernel_weight[grid](
        source, pixels, parts, **places, w_part=parts.stride(0), **cuts, **precision_of(x)
    )
    return parts
