"""Drawable: what sampling asks of a layer, whether its posterior is means and variances or a table of chances."""

from __future__ import annotations

from torch import Tensor, nn

from bqnn.core.philox import Noise


class Drawable:
    """A layer that may have a posterior from which its weight can be drawn."""

    @property
    def has_posterior(self) -> bool:
        """Whether draws differ."""
        raise NotImplementedError

    def posterior_tensor(self) -> Tensor:
        """A tensor that layers have in common where they share a posterior, and other layers do not."""
        raise NotImplementedError

    def posterior_size(self) -> int:
        """The number of weights: each takes one number of the noise."""
        raise NotImplementedError

    def draw(self, noise: Noise) -> Tensor:
        """A draw of the weight, in the form that the layer takes it in."""
        raise NotImplementedError

    def keep(self, drawn: Tensor) -> None:
        """Makes ``drawn`` the weight, which has no posterior any more."""
        raise NotImplementedError

    def show(self, drawn: Tensor) -> None:
        """Computes with ``drawn``, in evaluation mode; of a replica, whose tensors are another layer's and stay as they
        are."""
        raise NotImplementedError


def drawable_layers(net: nn.Module) -> dict[str, Drawable]:
    """Every layer of a network that may have a posterior by its name, a shared one once."""
    return {name: module for name, module in net.named_modules() if isinstance(module, Drawable)}
