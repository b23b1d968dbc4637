"""LSTM, GRU and RNN with the weights of a layer and direction as linear layers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bqnn.core.composed import Composed

_WEIGHTS, _BIASES = "weight_", "bias_"


class ComposedRecurrence(Composed, nn.RNNBase):
    """A recurrence with a linear layer for each of its weights: ``weight_ih_l0`` and ``bias_ih_l0`` are those of the
    part ``ih_l0``, and so on for "hh" and "hr", layers and "_reverse".

    The parts are not called: torch's own kernel runs the sequence, with the weights as they are in the mode that the
    parts are in. In training each is drawn once a call, so that a step of the sequence multiplies what the one before
    it did. Packed weights are decoded when the layer first runs, and kept, as much memory as at full precision: the
    loop over a sequence is torch's, which no Python runs in.
    """

    PARTS = ("ih_l0",)
    SETTINGS: tuple[str, ...] = (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    )
    SETTINGS += ("proj_size", "_all_weights")

    @classmethod
    def fresh(cls, layer: Any) -> nn.Module:
        options = {name: getattr(layer, name) for name in ("bias", "batch_first", "dropout", "bidirectional")}
        if layer.mode == "LSTM":
            options["proj_size"] = layer.proj_size
        if layer.mode.startswith("RNN"):
            options["nonlinearity"] = layer.mode.removeprefix("RNN_").lower()
        kind: Any = next(base for base in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, base))
        return kind(layer.input_size, layer.hidden_size, layer.num_layers, **options, device="meta")

    def _make_parts(self, layer: Any) -> None:
        for name in self._weight_names():
            if name.startswith(_WEIGHTS):
                own = name.removeprefix(_WEIGHTS)
                outputs, inputs = getattr(layer, name).shape
                has_bias = self.bias and not own.startswith("hr")
                setattr(self, own, nn.Linear(inputs, outputs, has_bias, device="meta"))

    def _weight_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    def split(self, name: str, tensor: Any) -> dict[str, Any]:
        own, _, part = name.partition("_")
        return {f"{part}.{own}" if name.startswith((_WEIGHTS, _BIASES)) else name: tensor}

    def joined(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in self._weight_names()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith((_WEIGHTS, _BIASES)):
            own, _, part = name.partition("_")
            if part in self._modules:
                return getattr(self._modules[part], own)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith((_WEIGHTS, _BIASES)):
            raise TypeError(f"{name} of a {type(self).__name__} is that of its parts and can not be assigned")
        nn.Module.__setattr__(self, name, value)

    @property
    def _flat_weights(self) -> list[Any]:  # type: ignore[override]
        """What torch's kernel takes: it computes each weight that is computed, once."""
        return [getattr(self, name) for name in self._weight_names()]

    def flatten_parameters(self) -> None:
        """Nothing: there is no memory of the layer's own to lay out."""

    def _init_flat_weights(self) -> None:
        """Nothing: weights are looked up at each call."""

    def _update_flat_weights(self) -> None:
        """Nothing, likewise."""

    def plain(self) -> nn.Module:
        plain: Any = super().plain()
        plain._init_flat_weights()
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


class ComposedLSTM(ComposedRecurrence, nn.LSTM):
    """nn.LSTM with parts for weights."""


class ComposedGRU(ComposedRecurrence, nn.GRU):
    """nn.GRU with parts for weights."""


class ComposedRNN(ComposedRecurrence, nn.RNN):
    """nn.RNN with parts for weights."""
