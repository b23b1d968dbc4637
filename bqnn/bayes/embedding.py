"""BayesEmbedding: nn.Embedding with an M-ary quantized weight that is a distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from bqnn import ops
from bqnn.bayes.base import BayesLayer
from bqnn.bayes.options import BayesOptions
from bqnn.core.check import check_indices
from bqnn.core.leaf import node_of
from bqnn.core.quantizer import Posterior, look_up

if TYPE_CHECKING:  # of Python itself from 3.11 on
    from typing_extensions import Unpack


class BayesEmbedding(BayesLayer, nn.Embedding):  # type: ignore[override]
    """nn.Embedding whose weight is N(mu, sigma^2), quantized to M learned levels.

    Only the rows that are asked for are sampled or quantized. In training a row is drawn once a forward pass, so that
    an index has the same vector wherever it stands. A look-up adds nothing up, and what is no sum is no Gaussian
    either: the estimator "moment" draws codes here, as "sample" does, with the same straight-through gradient.

    The row of ``padding_idx`` is quantized like any other, so that it is zero only where a level is; it has no gradient
    from what looks it up.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, device, dtype: as nn.Embedding takes them.
        max_norm: None. A norm that look-ups are cut to would move the means, and quantized rows would still have
            another one.
        norm_type: of ``max_norm``, without a use.
        sparse: False. The divergence from the prior has a gradient for every weight, looked up or not.
        options: as :class:`BayesLinear` takes them; "channel" is one codebook for each row.

    Raises:
        TypeError, ValueError: an argument out of its range; indices that are none in the forward pass.
        IndexError: an index out of range, in the forward pass.
    """

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[BayesOptions],
    ) -> None:
        if max_norm is not None:
            raise ValueError(f"max_norm must be None: quantized rows can not be cut to a norm, got {max_norm}")
        if sparse:
            raise ValueError("sparse must be False: the divergence from the prior has a gradient for every weight")
        flags = scale_grad_by_freq, False
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, None, norm_type, *flags, device=device, dtype=dtype
        )
        self._init_bayes(**options)

    def forward(self, indices: Tensor) -> Tensor:
        """int32 or int64 of any shape [...] -> [..., embedding_dim], in the weight's dtype."""
        if isinstance(indices, Proxy):
            return node_of(self, indices)
        check_indices(indices)
        if not (self.training or self.sampling):
            return self._quantized(indices)
        unique, place = indices.unique(return_inverse=True)
        rows = self._one_draw(self._posterior_of(unique))
        if self.padding_idx is not None:
            rows = torch.where((unique == self.padding_idx)[:, None], rows.detach(), rows)
        return F.embedding(place, rows, scale_grad_by_freq=self.scale_grad_by_freq)

    @torch.no_grad()
    def _quantized(self, indices: Tensor) -> Tensor:
        if self.drawn is not None:
            return F.embedding(indices, self.drawn.to(self.mean.dtype))
        mean, _, levels, thresholds = self._posterior_of(indices.flatten())
        rows = look_up(levels, ops.assign_codes(mean, thresholds)).to(self.mean.dtype)
        return rows.view(*indices.shape, self.embedding_dim)

    def _posterior_of(self, rows: Tensor) -> Posterior:
        """Of the rows with these indices, [n]."""
        levels, thresholds = self.codebook()
        if len(levels) > 1:
            levels, thresholds = (F.embedding(rows, each) for each in (levels, thresholds))
        return Posterior(F.embedding(rows, self.mean), F.embedding(rows, self.log_sigma2), levels, thresholds)
