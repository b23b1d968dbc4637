"""What the benches of the packed ops share: random packed weights, and when a result is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.core.codes import pack_codes
from bqnn.ops.packed_product import decode
from tests.support.helpers import make_codebook
from tests.support.packed_products import relative_error

PRECISIONS = ("fp32", "bf16", "int8")

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""product(x, weight, bias) of a dense layer."""


class Weight(NamedTuple):
    """A packed weight with one random codebook, every code equally often, and the same weight decoded."""

    codes: Tensor
    levels: Tensor
    bias: Tensor
    dense: Tensor

    @property
    def packed_bytes(self) -> int:
        return self.codes.nbytes + self.levels.nbytes


def random_weight(shape: tuple[int, ...], num_levels: int) -> Weight:
    """A weight of ``shape`` = (outputs, ...), the same one at every call."""
    generator = torch.Generator().manual_seed(num_levels)
    columns = math.prod(shape[1:])
    levels, _ = make_codebook(num_levels, "tensor", shape[0], generator)
    index = torch.randint(num_levels, (shape[0], columns), generator=generator, dtype=torch.uint8)
    codes = pack_codes(index, num_levels)
    bias = torch.randn(shape[0], generator=generator)
    return Weight(codes, levels, bias, decode(codes, levels, columns).view(shape))


class Expected:
    """What each precision has to give for ``x``, computed where it is asked for and then kept.

    Args:
        product: the dense layer, run in float64.
        reference: the packed op of the reference backend at precision "int8".
    """

    def __init__(self, product: Product, reference: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> None:
        self._product, self._reference, self._x, self._weight = product, reference, x, weight

    @cached_property
    def exact(self) -> Tensor:
        """The float64 product of the operands as they are."""
        return self._product(self._x.double(), self._weight.dense.double(), self._weight.bias.double())

    @cached_property
    def bf16(self) -> Tensor:
        """The float64 product of the operands rounded to bfloat16; the bias is not."""
        x, dense = self._x.bfloat16(), self._weight.dense.bfloat16()
        return self._product(x.double(), dense.double(), self._weight.bias.double())

    @cached_property
    def int8(self) -> Tensor:
        return self._reference(self._x.float())

    def check(self, y: Tensor, precision: str, execution: str) -> dict[str, Any]:
        """Raises AssertionError where ``y`` is not what ``precision`` promises; returns its relative error.

        An output in bfloat16 may differ by that rounding. A dense product of 8-bit integers, which "auto" may choose,
        adds them in float32 and in another order, so it is compared as a whole.
        """
        rounding = 2.0**-8 if y.dtype == torch.bfloat16 else 1e-5
        distance = relative_error(y, self.exact)
        if precision == "fp32":
            assert distance <= rounding, f"fp32: relative error {distance:.2g}"
        elif precision == "bf16":
            rounded = relative_error(y, self.bf16)
            assert distance <= 1e-2, f"bf16: relative error {distance:.2g}"
            assert rounded <= rounding, f"bf16: relative error {rounded:.2g} of the product of rounded operands"
        elif y.dtype == torch.float32 and execution == "packed":
            assert torch.allclose(y, self.int8, rtol=1e-5), f"int8: off by {(y - self.int8).abs().max():.2g}"
        else:
            off = relative_error(y, self.int8)
            assert off <= rounding, f"int8: relative error {off:.2g} against the reference"
        return {"distance": distance}


def check_rival(name: str, y: Tensor, expected: Tensor, allowed: float) -> dict[str, Any]:
    """A rival has to be right too; raises AssertionError where it is not."""
    distance = relative_error(y, expected)
    assert distance <= allowed, f"{name}: relative error {distance:.2g}"
    return {"distance": distance}
