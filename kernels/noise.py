"""The noise of outputs whose mean and variance are known: a block of it, for the fused products, and all of it."""

from typing import NamedTuple

import triton
import triton.language as tl

from bqnn.kernels.launch import MATRIX_BLOCK, cdiv, launch, power_of_2
from bqnn.kernels.philox import normals_of_rows


class OutputStrides(NamedTuple):
    """Elements from an image, a channel and a pixel of outputs [B, C, H, W] to the next, in either memory format."""

    image: int
    channel: int
    column: int


@triton.jit
def add_noise(mean, variance, noise, COARSE: tl.constexpr):
    """y = mean + sqrt(variance) noise and dy/dvariance; COARSE rounds the variance to bfloat16 first."""
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if COARSE:
        variance = variance.to(tl.bfloat16).to(tl.float32)
    inverse = tl.rsqrt(tl.maximum(variance, 1e-37))  # the bound keeps it finite where there is no variance
    return mean + variance * inverse * noise, tl.where(variance > 0.0, 0.5 * inverse * noise, 0.0)


@triton.jit(do_not_specialize=["seed", "offset"])
def noise_kernel(
    p_mean,
    p_variance,
    p_bias,
    seed: tl.int64,
    offset: tl.int64,
    p_y,
    p_slope,
    parts,
    part_size,
    rows,
    columns,
    channels,
    y_strides,
    slope_strides,
    biases,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The outputs in logical order are a matrix [rows, columns], a row being a channel of an image.

    Without p_mean it writes the slopes alone, without p_slope y alone.
    """
    blocks = tl.cdiv(columns, BC)
    i_r, i_c = tl.program_id(0) // blocks, (tl.program_id(0) % blocks).to(tl.int64)
    o_r, o_c = i_r.to(tl.int64) * BR + tl.arange(0, BR), i_c * BC + tl.arange(0, BC)
    m_y = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    image, channel = o_r // channels, o_r % channels
    o_y = (image * y_strides.image + channel * y_strides.channel)[:, None] + (o_c * y_strides.column)[None, :]
    mean = tl.zeros((BR, BC), tl.float32)
    variance = tl.zeros((BR, BC), tl.float32)
    o_part = o_y
    for _ in range(parts):
        variance += tl.load(p_variance + o_part, mask=m_y, other=0.0).to(tl.float32)
        if p_mean is not None:
            mean += tl.load(p_mean + o_part, mask=m_y, other=0.0).to(tl.float32)
        o_part += part_size
    if p_bias is not None:
        mean += tl.load(p_bias + channel[:, None] + (o_c % biases)[None, :]).to(tl.float32)
    normals = normals_of_rows(seed, offset, o_r, i_c * BC, columns, BC, ALIGNED)
    y, slope = add_noise(mean, variance, normals, p_mean is not None and p_slope is not None)
    if p_mean is not None:
        tl.store(p_y + o_y, y, mask=m_y)
    if p_slope is not None:
        o_slope = (image * slope_strides.image + channel * slope_strides.channel)[:, None]
        tl.store(p_slope + o_slope + (o_c * slope_strides.column)[None, :], slope, mask=m_y)


def noisy(mean, variance, noise, y, slope, bias=None):
    """Writes y = mean + bias + sqrt(variance) eps and slope = dy/dvariance, or one of the two.

    If it writes both, it rounds the variance to bfloat16 first.

    Args:
        mean, variance: with the strides of y (without it, of slope), or contiguous parts [S, *y.shape] to be added up;
            mean may be y itself, and is None without y.
        y, slope: what is written, or None; contiguous or, an image's, channels-last.
        bias: [N] for y [..., N], or where y is an image that is not contiguous, for its channels; or None.
    """
    output = slope if y is None else y
    parts = variance.shape[0] if variance.dim() > output.dim() else 1
    flat = output.is_contiguous() and (slope is None or slope.is_contiguous())
    # The outputs in logical order are a matrix of a single row, or of a row for each channel of each image.
    rows, columns, channels = 1, output.numel(), 1
    y_strides = slope_strides = OutputStrides(0, 0, 1)
    if not flat:
        (B, channels, H, W) = output.shape
        rows, columns = B * channels, H * W
        y_strides = _image_strides(output)
        slope_strides = y_strides if slope is None else _image_strides(slope)
    BC = min(power_of_2(max(columns, 4)), MATRIX_BLOCK if flat else 32)
    BR = 1 if flat else MATRIX_BLOCK // BC
    launch(
        noise_kernel, (cdiv(rows, BR) * cdiv(columns, BC),),
        mean, variance, bias, noise.seed, noise.offset, y, slope, parts, output.numel(), rows, columns, channels,
        y_strides, slope_strides, 1 if bias is None or not flat else bias.shape[0],
        ALIGNED=rows == 1 or columns % 4 == 0, BR=BR, BC=BC,
    )  # fmt: skip


def _image_strides(y):
    _, C, H, W = y.shape
    return OutputStrides(C * H * W, H * W, 1) if y.is_contiguous() else OutputStrides(C * H * W, 1, C)
