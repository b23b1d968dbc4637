"""The weight of a packed layer: codes and a codebook, and the posterior that its codes may be drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.core.chances import check_chances, draw_codes
from bqnn.core.codes import find_bad_byte, pack_codes, unpack_codes
from bqnn.core.computed_weight import weight_of
from bqnn.core.leaf import NotScriptable
from bqnn.core.philox import Noise
from bqnn.core.posterior import Drawable
from bqnn.ops.backends import dense_packed
from bqnn.ops.packed_product import check_weight, decode
from bqnn.ops.register import is_plain


class PackedWeight(NotScriptable, nn.Module, Drawable):
    """What a layer is made of, and what may be asked of its weight.

    Buffers: ``codes`` uint8 [N, packed_width(K, M)], ``levels`` float32 [1 or N, M], ``bias`` [N] or None, and
    ``chances`` float32 [M, M] or None: row m has the chances of the codes that a draw from the posterior of a weight
    with code m has, as :func:`bqnn.core.chances.chances_of` defines them. The forward pass does not look at them.
    ``levels`` and ``chances`` stay float32 when the module is cast. A state dict with codes and without chances, or the
    other way about, leaves the layer as it says.
    """

    codes: Tensor
    levels: Tensor
    bias: Tensor | None
    chances: Tensor | None
    weight_dtype: torch.dtype = torch.float32
    """Of :attr:`weight`, as code outside the layer reads it: that of the network, or what it has been cast to."""

    def __init__(
        self, shape: tuple[int, ...], codes: Tensor, levels: Tensor, bias: Tensor | None, chances: Tensor | None
    ) -> None:
        super().__init__()
        columns = math.prod(shape[1:])
        check_weight(codes, levels, bias, columns)
        _check_values(codes, levels, chances, columns)
        self.shape = shape
        for name, tensor in (("codes", codes), ("levels", levels), ("bias", bias), ("chances", chances)):
            self.register_buffer(name, None if tensor is None else _counted(tensor.detach()))
        if bias is not None:
            self.weight_dtype = bias.dtype

    @property
    def num_levels(self) -> int:
        """M, 2..16."""
        return self.levels.shape[1]

    @property
    def granularity(self) -> str:
        """ "tensor" (one codebook) or "channel" (one an output channel)."""
        return "tensor" if self.levels.shape[0] == 1 else "channel"

    @property
    def nbytes(self) -> int:
        """Bytes of codes, levels and bias: the network without a posterior. A decoded weight and a layout, where they
        are kept, are not counted."""
        return sum(tensor.nbytes for tensor in (self.codes, self.levels, self.bias) if tensor is not None)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the layer's shape, for who reads it past the forward pass: decoded when it is used and
        then kept, in float32; its dtype is that of the network. A change in place raises RuntimeError."""
        return weight_of(self)

    def weight_sources(self) -> tuple[Tensor, ...]:
        return self.codes, self.levels

    def weight_like(self) -> Tensor:
        return self.levels.new_empty(self.shape, dtype=self.weight_dtype)

    def weight_value(self) -> Tensor:
        if not is_plain([self.codes, self.levels]):
            return self.decode().to(self.weight_dtype)
        values = dense_packed.weights((self.codes, self.levels), math.prod(self.shape[1:]), "fp32").values
        return values.view(self.shape).to(self.weight_dtype)

    def weight_target(self) -> Tensor:
        raise RuntimeError(f"weight of a {type(self).__name__} is decoded from its codes and can not be changed")

    def freeze_weight(self, requires_grad: bool) -> None:
        if requires_grad:
            self.weight_target()

    def decode(self) -> Tensor:
        """The dense float32 weight in the layer's shape."""
        return decode(self.codes, self.levels, math.prod(self.shape[1:])).view(self.shape)

    @property
    def has_posterior(self) -> bool:
        """Whether there are chances that codes can be drawn with."""
        return self.chances is not None

    def posterior_tensor(self) -> Tensor:
        return self.codes

    def posterior_size(self) -> int:
        return math.prod(self.shape)

    def draw(self, noise: Noise) -> Tensor:
        """Packed codes, uint8 in the shape of ``codes``. No weight is made; a few bytes are taken for each.

        Raises:
            TypeError, ValueError: ``chances``, which may have been assigned or changed, are no table for the codes.
        """
        assert self.chances is not None
        check_chances(self.chances, self.num_levels, self.codes)
        codes = unpack_codes(self.codes, self.num_levels, math.prod(self.shape[1:]))
        return pack_codes(draw_codes(codes, self.chances, noise), self.num_levels)

    def keep(self, drawn: Tensor) -> None:
        self.codes, self.chances = drawn, None

    def show(self, drawn: Tensor) -> None:
        self.keep(drawn)  # buffers are assigned, and stay as they are for another layer that has them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        levels, chances = self.levels, self.chances
        super()._apply(fn, recurse)
        self.weight_dtype = fn(levels.new_empty(0, dtype=self.weight_dtype)).dtype
        if self.levels.dtype != torch.float32:
            self.levels = levels.to(self.levels.device)
        if chances is not None and self.chances is not None and self.chances.dtype != torch.float32:
            self.chances = chances.to(self.chances.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *messages: list[str]
    ) -> None:
        if prefix + "codes" in state_dict:
            if prefix + "chances" not in state_dict:
                self.chances = None
            elif self.chances is None:
                self.chances = torch.eye(self.num_levels, device=self.levels.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *messages)
        try:
            _check_values(self.codes, self.levels, self.chances, math.prod(self.shape[1:]))
        except (TypeError, ValueError) as error:
            messages[-1].append(prefix + str(error))


def _counted(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of an inference tensor, whose changes nothing counts."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _check_values(codes: Tensor, levels: Tensor, chances: Tensor | None, columns: int) -> None:
    if not (levels.isfinite().all() and (levels[:, 1:] > levels[:, :-1]).all()):
        raise ValueError(f"levels must be finite and strictly increasing in each row, got {levels.tolist()}")
    if problem := find_bad_byte(codes, levels.shape[1], columns):
        raise ValueError(f"codes {problem}")
    if chances is not None:
        check_chances(chances, levels.shape[1], codes)
