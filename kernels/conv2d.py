"""Convolutions as implicit matrix products: what the kernels of sample_conv2d and moment_conv2d share.

A convolution and the gradient for its input are one product here. The pixel (i, j) of an output y gathers at each tap
(t, u) the channels of the pixel (i step + origin + t delta, likewise in the other direction) of a source x, which is
dense and channels-last. Forward, these are the images and the outputs. Backward, the source is the gradient of the
outputs, and the pixels of an image that leave the same remainder modulo the stride see the same taps: they are one
product. The gradient for the weight is the sum over pixels of what one side has there times what the other gathers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bqnn.kernels.geometry import output_shape, pixels_of
from bqnn.kernels.launch import architecture, cdiv, planned, power_of_2, processors, splits_of, tile_limits

# A tile of outputs has no more pixels than these.
ROWS = 128


@triton.jit
def in_channels_last(o_k, K, taps):
    """Where element o_k of a row [C, taps] of K elements stands in [taps, C]; the same where there is one tap."""
    return o_k % taps * (K // taps) + o_k // taps


@triton.jit
def tile_of(geometry, i_mn, BM: tl.constexpr, BN: tl.constexpr):
    """The i_mn-th tile of a product: its number among those of pixels, its pixels [BM], and its channels of a group
    [BN]."""
    i_m = i_mn // tl.cdiv(geometry.N, BN)
    return i_m, i_m * BM + tl.arange(0, BM), i_mn % tl.cdiv(geometry.N, BN) * BN + tl.arange(0, BN)


@triton.jit
def pixels_at(geometry, o_m):
    """Image, row and column of pixels counted through the images."""
    size = geometry.rows * geometry.columns
    o_p = o_m % size
    return o_m // size, o_p // geometry.columns, o_p % geometry.columns


@triton.jit
def pixel_offsets(strides, i_s, image, row, column):
    """Offsets of pixels [BM] in the i_s-th part of images with these ImageStrides, int64."""
    if strides.part is None:
        o_image = image.to(tl.int64) * strides.image
    else:
        o_image = i_s.to(tl.int64) * strides.part + image.to(tl.int64) * strides.image
    return o_image + row * strides.row + column * strides.column


@triton.jit
def step_at(geometry, step, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, BK: tl.constexpr, ORDER: tl.constexpr):
    """What a step of the contraction goes over: taps t and u, channels [1, BK], and which of them exist.

    ORDER is "blocks": BK channels at one tap, t and u are scalars, and a block of channels meets every tap before the
    next; or all of it in one dimension, [1, BK] each: "channels_last" as in a weight [N, TAPS_H, TAPS_W, C],
    "contiguous" as in one [N, C, TAPS_H, TAPS_W].
    """
    C = geometry.C
    TAPS: tl.constexpr = TAPS_H * TAPS_W
    if ORDER == "blocks":
        tap = step % TAPS
        o_c = (step // TAPS * BK + tl.arange(0, BK))[None, :]
        m_k = o_c < C
    else:
        o_k = (step * BK + tl.arange(0, BK))[None, :]
        if ORDER == "contiguous":
            tap, o_c = o_k % TAPS, o_k // TAPS
        else:
            tap, o_c = o_k // C, o_k % C
        m_k = o_k < C * TAPS
    return tap // TAPS_W, tap % TAPS_W, o_c, m_k


@triton.jit
def sources_of(geometry, image, row, column):
    """Row, column and offset of the pixels' sources at the first tap, which may lie outside the image: [BM, 1]."""
    o_h = (row * geometry.step_h + geometry.origin_h)[:, None]
    o_w = (column * geometry.step_w + geometry.origin_w)[:, None]
    o_row = image.to(tl.int64)[:, None] * geometry.height + o_h
    return o_h, o_w, (o_row * geometry.width + o_w) * geometry.channels


@triton.jit
def gathered(geometry, o_h, o_w, t, u, o_c):
    """Offsets of a tap's channels from the sources, [1, BK], and which sources lie in their image, [BM, 1 or BK]."""
    o_h, o_w = o_h + t * geometry.delta_h, o_w + u * geometry.delta_w
    inside = (o_h >= 0) & (o_h < geometry.height) & (o_w >= 0) & (o_w < geometry.width)
    o_tap = t * geometry.delta_h * geometry.width + u * geometry.delta_w
    return o_tap * geometry.channels + o_c, inside


@triton.jit
def weights_at(strides, t, u, o_c):
    """Offsets of a tap's channels, [1, BK], from those of an output channel, in a weight with these WeightStrides."""
    return t * strides.row + u * strides.column + o_c * strides.into


def taps_of(weight):
    """The ``taps`` of :func:`in_channels_last` for a weight's own order, contiguous or channels-last."""
    return 1 if weight.is_contiguous() else weight.shape[2:].numel()


def parts_of(gradient, weight):
    """How many parts [S, *weight.shape] a weight's gradient is, 1 in the weight's own shape, and their ``taps``."""
    if gradient.dim() == weight.dim():
        return 1, taps_of(gradient)
    return gradient.shape[0], taps_of(gradient[0])


class Plan(NamedTuple):
    """How a kernel cuts a product up."""

    order: str
    """The ORDER of ``step_at``."""
    tiles: dict[str, int]
    """Tile sizes, warps, stages and registers, as a launch takes them."""
    splits: int
    """The parts of what is summed over."""


def tile_side(size, largest):
    """The largest power of two, from 16 on, that pads ``size`` by at most a quarter more than the best does."""
    padded = {side: cdiv(size, side) * side for side in (16, 32, 64, 128) if side <= largest}
    return max(side for side in padded if padded[side] <= 1.25 * min(padded.values()))


def depth_of(channels, taps, order):
    return channels if order == "blocks" else channels * taps


def order_of(channels, taps):
    """Fewer channels than a tile is deep share it with those of other taps."""
    return "channels_last" if channels < 16 and taps > 1 else "blocks"


def steps_of(channels, taps, order, BK):
    return cdiv(depth_of(channels, taps, order), BK) * (taps if order == "blocks" else 1)


def _tiles(outputs, depth, largest, order, dtype):
    """BN and BK. Products of float32 take registers for their operands too, as all do before sm_90, and where taps
    share a tile, the address and the mask of every gathered element do."""
    BN, BK = largest if dtype.itemsize == 2 else (32, 32)
    if dtype.itemsize == 2 and architecture() < 90:
        BN //= 2
    shared = 1 if order == "blocks" else 2
    return tile_side(outputs, max(16, BN // shared)), tile_side(depth, BK // shared)


def _needs_warps(tile, gathered, order):
    return tile >= (8192 if architecture() >= 90 else 4096) or (order != "blocks" and gathered >= 2048)


def product_plan(x, shape, taps, groups, largest, order=None):
    """The plan of a product y of this shape with so many taps; ``largest`` is the most (BN, BK), of 2 bytes each."""
    N, C = shape[1] // groups, x.shape[1] // groups
    order = order or order_of(C, taps)
    tiles = _product_tiles(pixels_of(shape), N, C, taps, largest, order, x.dtype, architecture())
    blocks = (cdiv(pixels_of(shape), tiles["BM"]), cdiv(N, tiles["BN"]), groups)
    splits, _ = splits_of(blocks, steps_of(C, taps, order, tiles["BK"]), 1, x.device)
    return Plan(order, tiles, splits)


@planned
def _product_tiles(pixels, N, C, taps, largest, order, dtype, architecture):
    BN, BK = _tiles(N, depth_of(C, taps, order), largest, order, dtype)
    BM = min(ROWS if dtype.itemsize == 2 else 64, max(16, power_of_2(pixels)))
    num_warps = 8 if dtype.itemsize == 4 or _needs_warps(BM * BN, BM * BK, order) else 4
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": num_warps, **tile_limits(order == "blocks", dtype)}


def product_launch(plan, places, groups, kernel):
    """Grid and arguments of one of a plan's products, for a weight of ``kernel`` taps, rows and columns."""
    geometry, weight_strides, y_strides = places
    steps = steps_of(geometry.C, kernel[0] * kernel[1], plan.order, plan.tiles["BK"])
    blocks = cdiv(geometry.M, plan.tiles["BM"]) * cdiv(geometry.N, plan.tiles["BN"])
    flags = {"TAPS_H": kernel[0], "TAPS_W": kernel[1], "ORDER": plan.order}
    return (blocks, groups, plan.splits), {
        "geometry": geometry,
        "weight_strides": weight_strides,
        "y_strides": y_strides,
        "groups": groups,
        "steps": steps,
        "span": cdiv(steps, plan.splits),
        **flags,
        **plan.tiles,
    }


def weight_plan(x, y, taps, groups, largest):
    """The plan of the sum over the pixels of y [B, ...] of what y has there times what is gathered from x; ``largest``
    as for the product."""
    N, C = y.shape[1] // groups, x.shape[1] // groups
    order = order_of(C, taps)
    tiles = _weight_tiles(N, C, taps, largest, order, x.dtype, architecture())
    blocks = (cdiv(N, tiles["BN"]), steps_of(C, taps, order, tiles["BK"]), groups)
    splits, _ = splits_of(blocks, pixels_of(y.shape), tiles["BM"], x.device, most=processors(x.device))
    return Plan(order, tiles, splits)


@planned
def _weight_tiles(N, C, taps, largest, order, dtype, architecture):
    BN, BK = _tiles(N, depth_of(C, taps, order), largest, order, dtype)
    BM = (64 if dtype.itemsize == 2 else 32) // (1 if order == "blocks" else 2)
    num_warps = 8 if _needs_warps(BN * BK, BM * BK, order) else 4
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": num_warps, **tile_limits(order == "blocks", dtype)}


def weight_launch(plan, places, groups, kernel):
    """Grid and arguments of a plan's sum, likewise."""
    geometry, weight_strides, y_strides = places
    tiles = plan.tiles
    steps = steps_of(geometry.C, kernel[0] * kernel[1], plan.order, tiles["BK"])
    span = cdiv(cdiv(geometry.M, tiles["BM"]), plan.splits) * tiles["BM"]
    flags = {"TAPS_H": kernel[0], "TAPS_W": kernel[1], "ORDER": plan.order}
    grid = (steps * cdiv(geometry.N, tiles["BN"]), groups, plan.splits)
    strides = {"weight_strides": weight_strides, "y_strides": y_strides}
    return grid, {"geometry": geometry, **strides, "groups": groups, "span": span, **flags, **tiles}


def row_blocks(x, weight, product):
    """Blocks of ROWS pixels of the product's output."""
    return cdiv(pixels_of(output_shape(x, weight, product)), ROWS)


def output_parts(plan, shape, memory_format, x, dtype=None):
    """What a product writes, [splits, *shape], every part in this memory format; a single one has x's dtype."""
    dtype = dtype or (x.dtype if plan.splits == 1 else torch.float32)
    size = (plan.splits * shape[0], *shape[1:])
    return torch.empty(size, device=x.device, dtype=dtype, memory_format=memory_format).unflatten(0, (-1, shape[0]))


def weight_parts(plan, weight):
    """What a sum over pixels writes: float32 [splits, *weight.shape], every part in channels-last order."""
    N, C, kh, kw = weight.shape
    return torch.empty((plan.splits, N, kh, kw, C), device=weight.device).permute(0, 1, 4, 2, 3)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def pixels_last(x):
    """Images [B, C, H, W] as pixels [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def images_of(pixels, memory_format):
    """Pixels [B, H, W, C] as images [B, C, H, W] in this memory format."""
    return pixels.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


def precision_of(x):
    """float32 is multiplied as torch's own convolutions are."""
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee"}
