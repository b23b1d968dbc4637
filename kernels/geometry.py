"""Where a convolution's kernels find pixels and weights: see kernels/conv2d.py for the products that these are of.

``product`` is a convolution's stride, padding, dilation and groups, a :class:`bqnn.core.product.Conv2dProduct`.
"""

from math import gcd
from typing import NamedTuple

import torch

from bqnn.kernels.launch import planned


class Axis(NamedTuple):
    """One direction of a product: pixel i of y gathers at tap t the pixel ``i * step + origin + t * delta`` of x."""

    step: int
    origin: int
    delta: int


class ImageStrides(NamedTuple):
    """Elements from one to the next of images [B, channels, rows, columns], or of parts [S, ...] of them."""

    part: int | None
    image: int
    channel: int
    row: int
    column: int


class WeightStrides(NamedTuple):
    """Elements from one to the next of a weight's groups, its channels for y (``out``) and for x (``into``), and its
    taps; and of parts [S, ...] of it."""

    part: int | None
    group: int
    out: int
    into: int
    row: int
    column: int


class Geometry(NamedTuple):
    """Where a kernel finds the pixels of x and y, and the weights; see :func:`places_of`."""

    M: int
    """Pixels of y."""
    N: int
    """y's channels of a group."""
    C: int
    """x's channels of a group."""
    K: int | None
    """Weights of an output channel, for kernels that sample them."""
    rows: int
    """Rows of pixels of an image of y."""
    columns: int
    """Columns of them."""
    height: int
    """Rows of pixels of an image of x, which is dense and channels-last."""
    width: int
    """Columns of them."""
    channels: int
    """x's channels in all groups."""
    step_h: int
    """The numbers of the Axis along rows are called ``_h``, those of the Axis along columns ``_w``."""
    step_w: int
    origin_h: int
    origin_w: int
    delta_h: int
    delta_w: int


class Places(NamedTuple):
    """A :class:`Geometry` with its strides, which reach a kernel as three arguments."""

    geometry: Geometry
    weight_strides: WeightStrides
    y_strides: ImageStrides


def forward_axes(product):
    return tuple(Axis(s, -p, d) for s, p, d in zip(product.stride, product.padding, product.dilation))


def gradient_axes(size, taps, stride, padding, dilation):
    """Pixels, taps and Axis of each product that the gradient for ``size`` rows or columns of x consists of."""
    common = gcd(stride, dilation)
    for remainder in range(min(stride, size)):
        first = next((tap for tap in range(taps) if (remainder + padding - tap * dilation) % stride == 0), taps)
        axis = Axis(1, (remainder + padding - first * dilation) // stride, -(dilation // common))
        yield slice(remainder, None, stride), slice(first, None, stride // common), axis


def gradient_products(shape, kernel, product):
    """The products that the gradient for x [B, C, H, W] consists of: indices of pixels and of their taps, and axes."""
    return _gradient_products(tuple(shape[2:]), tuple(kernel), *(tuple(each) for each in product[:3]))


@planned
def _gradient_products(size, kernel, stride, padding, dilation):
    rows, columns = (list(gradient_axes(size[i], kernel[i], stride[i], padding[i], dilation[i])) for i in (0, 1))
    return [
        ((..., rows_h, columns_w), (..., taps_h, taps_w), (axis_h, axis_w))
        for rows_h, taps_h, axis_h in rows
        for columns_w, taps_w, axis_w in columns
    ]


def image_strides(y):
    """Those of y [B, channels, rows, columns] or [S, B, channels, rows, columns]."""
    return _image_strides(y.stride())


def _image_strides(strides):
    return ImageStrides(None if len(strides) == 4 else strides[0], *strides[-4:])


def places_of(x, y, weight, axes, groups, transposed=False, K=None):
    """The places of a product of images x with a weight [N, C, kh, kw] to y [B, channels, rows, columns]; y or the
    weight may be parts [S, ...].

    x is dense and channels-last. ``transposed``: x has the outputs' channels, and y those of the images.
    """
    return _places_of(x.shape, y.shape, y.stride(), weight.shape, weight.stride(), axes, groups, transposed, K)


@planned
def _places_of(x_shape, y_shape, y_strides, weight_shape, strides, axes, groups, transposed, K):
    images, channels, rows, columns = y_shape[-4:]
    out, into, row, column = strides[-4:]
    group = weight_shape[-4] // groups * out
    if transposed:
        out, into = into, out
    part = None if len(strides) == 4 else strides[0]
    geometry = Geometry(
        M=images * rows * columns,
        N=channels // groups,
        C=x_shape[1] // groups,
        K=K,
        rows=rows,
        columns=columns,
        height=x_shape[2],
        width=x_shape[3],
        channels=x_shape[1],
        step_h=axes[0].step,
        step_w=axes[1].step,
        origin_h=axes[0].origin,
        origin_w=axes[1].origin,
        delta_h=axes[0].delta,
        delta_w=axes[1].delta,
    )
    return Places(geometry, WeightStrides(part, group, out, into, row, column), _image_strides(y_strides))


def weight_roles(grad, x, kernel, product):
    """``(gathered, at pixels, axes, transposed)`` of the sum over pixels that is a weight's gradient.

    Every tap reads what is gathered again, so it is the side with fewer channels, where the stride is 1: otherwise
    that could take several sums.
    """
    if grad.shape[1] < x.shape[1] and tuple(product.stride) == (1, 1):
        ((_, _, axes),) = gradient_products(x.shape, kernel, product)
        return grad, x, axes, True
    return x, grad, forward_axes(product), False


def output_shape(x, weight, product):
    """The shape of a convolution's output, whether or not torch would refuse it."""
    stride, padding, dilation, _ = product
    sides = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return torch.Size((x.shape[0], weight.shape[0], *sides))


def output_of(x, weight, product):
    """Shape and memory format of torch's own convolution, the latter as fakes tell it; raises where torch does."""
    stride, padding, dilation, groups = product
    arguments = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    backend = torch._C._select_conv_backend(x, weight, None, *arguments)
    memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    return output_shape(x, weight, product), memory_format


def is_pointwise(weight, product):
    """Whether the convolution is a linear layer of the pixels."""
    return (*weight.shape[2:], *product.stride, *product.padding, product.groups) == (1, 1, 1, 1, 0, 0, 1)


def pixels_of(shape):
    """The pixels of images of the shape [B, channels, H, W]."""
    return shape[0] * shape[2] * shape[3]
