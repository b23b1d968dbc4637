"""What the backends "cpu" multiply: torch's products with weights that kernels make for them.

The weight of a linear layer is made some channels at a time and multiplied while it is in a cache: however large the
layer is, no memory holds the whole of it, and none is fetched from the system for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bqnn.core.product import LinearProduct, Product, dense, matrix

WEIGHTS = 1 << 21  # of a linear layer that are made at once: 12 MiB of moments
CHANNELS = 256  # that are made at once at least: products of fewer take longer
WHOLE = slice(None)

Weights = tuple[Tensor, ...]  # of some channels, one for each product
Make = Callable[[slice, "Weights | None"], Weights]  # of these channels, in the memory of others that have served
Finish = Callable[..., None]  # takes the channels, and the gradients of those weights, which it may write to


def outputs(product: Product, inputs: Sequence[Tensor], channels: int, make: Make, bias: Tensor | None) -> list[Tensor]:
    """Each input times its weight, in an order of elements that kernels know; the first with the bias.

    Fewer inputs than weights are multiplied with the last ones.
    """
    biases = [bias, *[None] * (len(inputs) - 1)]
    if not isinstance(product, LinearProduct):
        weights = make(WHOLE, None)[-len(inputs) :]
        return [dense(product.forward(*operands)) for operands in zip(inputs, weights, biases, strict=True)]
    results = [x.new_empty((*x.shape[:-1], channels)) for x in inputs]
    made: Weights | None = None
    for some in _blocks(channels, inputs[0].shape[-1]):
        made = make(some, made)
        for x, weight, added, y in zip(inputs, made[-len(inputs) :], biases, results, strict=True):
            if added is None:
                torch.mm(matrix(x), weight.t(), out=matrix(y)[:, some])
            else:
                torch.addmm(added[some], matrix(x), weight.t(), out=matrix(y)[:, some])
    return results


def gradients(
    product: Product,
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    shape: torch.Size,
    make: Make,
    finish: Finish,
    input_gradient: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients for the inputs, empty unless asked for, and for a weight of this shape.

    ``finish`` gets the gradient of each input's weight, and leaves that of the weight in the first.
    """
    if not isinstance(product, LinearProduct):
        # Without a gradient for the inputs only the shape of a weight is looked at.
        weights = make(WHOLE, None) if input_gradient else [x.new_empty(shape) for x in inputs]
        operands = zip(grads, inputs, weights, strict=True)
        pairs = [product.backward(*three, input_gradient) for three in operands]
        by_weights = [by_weight.contiguous() for _, by_weight in pairs]
        finish(WHOLE, *by_weights)
        return [by_input for by_input, _ in pairs], by_weights[0]
    by_inputs = [x.new_empty(x.shape if input_gradient else 0) for x in inputs]
    grad_weight = inputs[0].new_empty(shape)
    made: Weights | None = None
    others: list[Tensor | None] = [None] * (len(inputs) - 1)
    for some in _blocks(*shape):
        if input_gradient:
            made = make(some, made)
            for grad, weight, by_input in zip(grads, made, by_inputs, strict=True):
                added = int(some.start > 0)
                torch.addmm(matrix(by_input), matrix(grad)[:, some], weight, beta=added, out=matrix(by_input))
        first = grad_weight[some]
        by_weights = [first, *(reuse(memory, first, x.dtype) for memory, x in zip(others, inputs[1:], strict=True))]
        for grad, x, by_weight in zip(grads, inputs, by_weights, strict=True):
            torch.mm(matrix(grad)[:, some].t(), matrix(x), out=by_weight)
        finish(some, *by_weights)
        others[:] = by_weights[1:]
    return by_inputs, grad_weight


def reuse(memory: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first rows of ``memory``, as many as ``like`` has; without it, new memory."""
    return torch.empty_like(like, dtype=dtype) if memory is None else memory[: like.shape[0]]


def _blocks(channels: int, columns: int) -> Iterator[slice]:
    """Of all channels, one at least; each begins at a multiple of CHANNELS, so that no call of Philox is cut."""
    step = max(1, WEIGHTS // max(1, columns) // CHANNELS) * CHANNELS
    for first in range(0, max(1, channels), step):
        yield slice(first, min(channels, first + step))
