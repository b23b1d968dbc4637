"""PackedEmbedding: a look-up for inference whose table is codes in bytes and a codebook."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Proxy

from bqnn.core.check import check_indices, check_int, check_integer
from bqnn.core.leaf import node_of
from bqnn.ops.packed_product import check_codes, decode
from bqnn.packed.weight import PackedWeight


class PackedEmbedding(PackedWeight):
    """A look-up in a packed table [num_embeddings, embedding_dim]; made by bqnn.pack and bqnn.load.

    Only the rows that are asked for are decoded, at each call; nothing that is decoded is kept, unless somebody reads
    :attr:`weight`. Rows are levels, exactly, whatever the precision of other layers.

    Args:
        embedding_dim: D.
        codes: uint8 [num_embeddings, packed_width(D, M)].
        levels: float32 [1 or num_embeddings, M], finite and increasing.
        padding_idx: as nn.Embedding has it, or None; it changes nothing here, and is there for :func:`bqnn.dequantize`.
        chances: float32 [M, M] or None: row m has the chances of the codes that :func:`bqnn.sample` draws for a weight
            with code m.

    Raises:
        TypeError, ValueError: an argument is wrong; the message starts with its name.
    """

    def __init__(
        self,
        embedding_dim: int,
        codes: Tensor,
        levels: Tensor,
        padding_idx: int | None = None,
        chances: Tensor | None = None,
    ) -> None:
        check_integer("embedding_dim", embedding_dim)
        check_codes(codes)
        if padding_idx is not None:
            check_int("padding_idx", padding_idx, 0, len(codes) - 1)
        super().__init__((len(codes), embedding_dim), codes, levels, None, chances)
        self.num_embeddings, self.embedding_dim, self.padding_idx = len(codes), embedding_dim, padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        """int32 or int64 of any shape [...] -> [..., embedding_dim], in the network's dtype.

        Raises:
            TypeError: ``indices`` are none.
            IndexError: one is out of range.
        """
        if isinstance(indices, Proxy):
            return node_of(self, indices)
        check_indices(indices)
        rows = indices.flatten()
        levels = self.levels if self.granularity == "tensor" else self.levels.index_select(0, rows)
        found = decode(self.codes.index_select(0, rows), levels, self.embedding_dim)
        return found.to(self.weight_dtype).view(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}num_levels={self.num_levels}, "
            f"granularity={self.granularity!r}"
        )
