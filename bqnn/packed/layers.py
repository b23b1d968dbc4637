"""PackedLinear: a linear layer for inference whose weight is codes in bytes and a codebook."""

from __future__ import annotations

from torch import Tensor

from bqnn.core.check import check_integer, check_linear_input
from bqnn.core.geometry import LinearGeometry
from bqnn.ops.packed_product import check_codes
from bqnn.packed.base import PackedLayer


class PackedLinear(PackedLayer):
    """A linear layer with a packed weight [out_features, in_features]; made by bqnn.pack and bqnn.load.

    Args:
        in_features: K.
        codes: uint8 [N, packed_width(K, M)].
        levels: float32 [1 or N, M], finite and increasing.
        bias: [N] or None.
        precision: "fp32", "bf16" or "int8".
        execution: "auto", "packed" or "dense".
        relu: whether negative outputs become 0; NaN stays.
        chances: float32 [M, M] or None: row m has the chances of the codes that :func:`bqnn.sample` draws for a weight
            with code m.

    Raises:
        TypeError, ValueError: an argument is wrong; the message starts with its name.
    """

    op = "packed_linear"

    def __init__(
        self,
        in_features: int,
        codes: Tensor,
        levels: Tensor,
        bias: Tensor | None = None,
        precision: str = "fp32",
        execution: str = "auto",
        relu: bool = False,
        chances: Tensor | None = None,
    ) -> None:
        check_integer("in_features", in_features)
        check_codes(codes)
        super().__init__((len(codes), in_features), codes, levels, bias, precision, execution, relu, chances)
        self.in_features, self.out_features = in_features, len(codes)

    def rows(self, x: Tensor) -> int:
        return LinearGeometry().rows(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"

    def _check_input(self, x: Tensor) -> None:
        check_linear_input(x, self.in_features)

    def _geometry(self) -> LinearGeometry:
        return LinearGeometry()
