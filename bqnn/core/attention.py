"""Attention with the projections as layers of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bqnn.core.composed import Composed
from bqnn.core.replace import become

_INPUTS = ("q_proj", "k_proj", "v_proj")


class ComposedAttention(Composed, nn.MultiheadAttention):
    """nn.MultiheadAttention with the linear layers ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` (Vaswani et al.
    2017, section 3.2).

    Queries, keys and values are projected by three layers, whatever their sizes, so that each has a codebook for its
    own weights and attention between two sequences projects nothing twice. As torch's layer has it where these sizes
    differ, ``in_proj_weight`` is None, which keeps torch's fast paths away: they would read weights and call no part.
    """

    SETTINGS = ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "add_zero_attn")
    PARTS = _INPUTS
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    @classmethod
    def fresh(cls, layer: Any) -> nn.Module:
        has_bias, extends = layer.in_proj_bias is not None, layer.bias_k is not None
        sizes = layer.embed_dim, layer.num_heads, layer.dropout, has_bias, extends, layer.add_zero_attn
        return nn.MultiheadAttention(*sizes, layer.kdim, layer.vdim, layer.batch_first, device="meta")

    def _make_parts(self, layer: Any) -> None:
        self._qkv_same_embed_dim = False  # of the module's own: torch's __setstate__ sets it where it is missing
        has_bias, width = layer.in_proj_bias is not None, layer.embed_dim
        for name, inputs in zip(_INPUTS, (width, layer.kdim, layer.vdim)):
            setattr(self, name, nn.Linear(inputs, width, has_bias, device="meta"))
        self.register_parameter("bias_k", None)
        self.register_parameter("bias_v", None)
        out = layer.out_proj
        if type(out) is NonDynamicallyQuantizableLinear:  # an nn.Linear under another name
            linear = nn.Linear(out.in_features, out.out_features, out.bias is not None, device="meta")
            linear._parameters.update(out._parameters)
            template = NonDynamicallyQuantizableLinear(1, 1, device="meta")
            become(out, linear.train(out.training), template)
        self.out_proj = out

    def split(self, name: str, tensor: Any) -> dict[str, Any]:
        if name in ("in_proj_weight", "in_proj_bias"):
            own = name.removeprefix("in_proj_")
            return {f"{part}.{own}": rows for part, rows in zip(_INPUTS, tensor.chunk(3))}
        if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return {name.replace("_weight", ".weight"): tensor}
        return {name: tensor}

    def joined(self) -> dict[str, nn.Parameter]:
        parts: list[Any] = [getattr(self, name) for name in _INPUTS]
        weights = [part.weight for part in parts]
        found = {name: each for name, each in self._parameters.items() if each is not None}
        if self.kdim == self.vdim == self.embed_dim:
            found["in_proj_weight"] = nn.Parameter(torch.cat(weights).detach())
        else:
            found |= {f"{name}_weight": weight for name, weight in zip(_INPUTS, weights)}
        if parts[0].bias is not None:
            found["in_proj_bias"] = nn.Parameter(torch.cat([part.bias for part in parts]).detach())
        return found

    def plain(self) -> nn.Module:
        plain: Any = super().plain()
        linear: Any = self.out_proj
        if type(linear) is nn.Linear:
            out = NonDynamicallyQuantizableLinear(linear.in_features, linear.out_features, device="meta")
            out._parameters.update(linear._parameters)
            become(linear, out.train(linear.training), nn.Linear(1, 1, device="meta"))
        plain.out_proj = linear
        return plain

    in_proj_weight = property(lambda self: None)
    q_proj_weight = property(lambda self: self.q_proj.weight)
    k_proj_weight = property(lambda self: self.k_proj.weight)
    v_proj_weight = property(lambda self: self.v_proj.weight)

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        parts: list[Any] = [getattr(self, name) for name in _INPUTS]
        return None if parts[0].bias is None else torch.cat([part.bias for part in parts])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's. ``is_causal`` is a hint, which nothing is gained by here.

        Raises:
            TypeError, ValueError: dimensions or masks are not what torch's layer takes.
        """
        _check(query, key, value, attn_mask, key_padding_mask, is_causal)
        is_batched = query.dim() == 3
        q, k, v = (
            self._batch_first(project(x), is_batched)
            for project, x in zip((self.q_proj, self.k_proj, self.v_proj), (query, key, value))
        )
        q, k, v = (self._heads(each) for each in (q, *self._extended(k, v)))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        y, weights = attend(q, k, v, mask, self.dropout if self.training else 0.0, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y.squeeze(0) if not is_batched else y if self.batch_first else y.transpose(0, 1)
        if weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if is_batched else weights.squeeze(0)

    def _batch_first(self, x: Tensor, is_batched: bool) -> Tensor:
        if not is_batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """With what attention can also go to: ``bias_k`` and ``bias_v``, and zeros."""
        if self.bias_k is not None and self.bias_v is not None:
            ends = (bias.to(k.dtype).expand(len(k), 1, -1) for bias in (self.bias_k, self.bias_v))
            k, v = (torch.cat([each, end], 1) for each, end in zip((k, v), ends))
        return (F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) if self.add_zero_attn else (k, v)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, E] -> [B, heads, L, E / heads]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, to be broadcast to [B, heads, L, S], or None."""
        parts = []
        if attn_mask is not None:
            parts.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (len(q), self.num_heads)))
        if key_padding_mask is not None:
            parts.append(key_padding_mask.reshape(len(q), 1, 1, -1))
        total: Tensor | None = None
        for part in parts:
            own = part.to(q.dtype)
            if part.dtype == torch.bool:
                own = torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, -math.inf)
            total = own if total is None else total + own
        return None if total is None else F.pad(total, (0, k.shape[2] - total.shape[-1]))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k' / sqrt(d) + mask) v, and the weights if they are needed: those that dropout left, as torch's are."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> None:
    dimensions = [each.dim() for each in (query, key, value)]
    if dimensions not in ([2] * 3, [3] * 3):
        raise ValueError(f"query, key and value must have 3 dimensions each, or 2 without a batch, got {dimensions}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must be as long as each other, got {list(key.shape)} and {list(value.shape)}")
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be given with is_causal, which says that it is the causal one")
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
