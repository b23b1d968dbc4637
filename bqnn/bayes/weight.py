"""The weight of a Bayes layer: its means under one name, what the layer computes with under another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.core.computed_weight import weight_of
from bqnn.core.leaf import NotScriptable
from bqnn.core.precision import is_half
from bqnn.core.readers import read_weight_of
from bqnn.core.sharded import is_resharding, is_sharded

POSTERIOR = ("weight", "log_sigma2", "raw_levels", "raw_thresholds")
FITTED = ("level_scale", "prior_sigma2")


class PosteriorWeight(NotScriptable, nn.Module):
    """What a layer says of its weight, and what may be done with it.

    ``mean`` is the parameter, which is called "weight" in state dicts and by ``named_parameters``. ``weight`` is what
    the layer computes with, for whoever reads it past the forward pass: Q(mu) in evaluation mode; while the layer
    trains or samples a new sample in every operation, with straight-through gradients. In-place changes of ``weight``
    reach the means, and ``weight.requires_grad_(False)`` freezes the codebook and the variances with them. It can not
    be assigned: loading a state dict and ``layer.mean = parameter`` set means. While processes share the parameters
    out (torch's fully_shard, between calls of the module) ``weight`` is the sharded means.

    Layers whose weights were tied share the parameters :data:`POSTERIOR` and the buffers :data:`FITTED`.
    """

    log_sigma2: Tensor
    raw_levels: Tensor
    _tied: tuple[Any, ...] = ()
    """All layers that share this posterior, where others do."""
    _readers: tuple[tuple[nn.Module, str], ...] = ()
    """Other modules that hold the means as a parameter, each with its name."""

    @property
    def mean(self) -> nn.Parameter:
        """mu, the parameter, in the weight's shape; may be set to another nn.Parameter of this shape."""
        mean = self._parameters.get("weight", self.__dict__.get("weight"))
        if mean is None:
            raise RuntimeError(f"the means of a {type(self).__name__}, its parameter 'weight', have been taken away")
        return mean

    @mean.setter
    def mean(self, value: nn.Parameter) -> None:
        if not isinstance(value, nn.Parameter) or value.shape != self.mean.shape:
            needed = f"an nn.Parameter of the shape {list(self.mean.shape)}"
            raise TypeError(f"mean must be {needed}, got {type(value).__name__} {list(getattr(value, 'shape', []))}")
        self._parameters["weight"] = value

    @property
    def weight(self) -> Tensor:
        """The quantized weight, or a sample of it: a :class:`bqnn.core.computed_weight.ComputedWeight`."""
        mean = self._parameters.get("weight", self.__dict__.get("weight"))
        if mean is None:
            raise AttributeError(f"weight of {type(self).__name__} is computed from its means, and it has none")
        return mean if is_sharded(mean) else weight_of(self)

    def weight_sources(self) -> tuple[Any, ...]:
        return self.mean, self.log_sigma2, self.raw_levels, *self.sharing_layers()

    def weight_like(self) -> Tensor:
        return self.mean

    def weight_target(self) -> Tensor:
        return self.mean

    def weight_value(self) -> Tensor:
        """The weight that a whole operation computes with."""
        raise NotImplementedError

    def freeze_weight(self, requires_grad: bool) -> None:
        """Sets ``requires_grad`` of all parameters but the bias: without it the quantized weight stays as it is."""
        for name in POSTERIOR:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(requires_grad)

    def sharing_layers(self) -> tuple[Any, ...]:
        """All layers with this posterior, the layer itself among them."""
        return self._tied or (self,)

    def tie(self, layers: tuple[PosteriorWeight, ...]) -> None:
        """Lets ``layers``, this one among them, share its posterior, and go on to do so when one is moved or loaded."""
        readers = tuple(dict.fromkeys(reader for layer in layers for reader in layer._readers))
        for layer in layers:
            layer._tied, layer._readers = layers, readers
        self._share()

    def _share(self) -> None:
        """Gives the tensors of this posterior to whatever shares them."""
        for layer in self._tied:
            for name in POSTERIOR:
                layer._parameters[name] = self._parameters.get(name)
            for name in FITTED:
                layer._buffers[name] = self._buffers[name]
        for module, name in self._readers:
            module._parameters[name] = self.mean

    def give_to(self, module: nn.Module, name: str) -> None:
        """Makes ``module.<name>`` this weight; the means stay a parameter of the module, of this name."""
        self._readers = (*self._readers, (module, name))
        module._parameters[name] = self.mean
        read_weight_of(module, name, self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._loading = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self._loading
        self._share()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PosteriorWeight:
        before = {name: getattr(self, name) for name in FITTED}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            if is_half(moved := getattr(self, name)):
                setattr(self, name, scale.to(moved.device, torch.float32))
        self._share()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.__dict__.get("_is_replica"):
            self.__dict__[name] = value  # nn.DataParallel gives its replicas tensors for parameters
        elif name == "weight" and is_resharding(self._parameters.get(name), value):
            self._parameters[name] = value
        elif name == "weight" and "weight" in self._parameters and "_loading" not in self.__dict__:
            raise TypeError(
                f"weight of a {type(self).__name__} is computed from its means and its codebook and can not be "
                "assigned; set the means (layer.mean = parameter) and fit the codebook to them (fit_codebook_)"
            )
        elif name == "mean":  # nn.Module would register a parameter of this name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise TypeError(f"weight of a {type(self).__name__} is computed from its means and can not be deleted")
        super().__delattr__(name)
