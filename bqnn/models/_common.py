"""What every built-in network shares: the record of how it was made, argument checks, initialisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

LARGEST = (
    65_536  # arguments may come from a damaged file: a bound keeps such a file from asking for a network of any size
)


class Network(nn.Module):
    """A network that knows how to be made again.

    ``factory`` is the name that :func:`bqnn.models.build` takes and its keyword arguments, all of them, JSON-able.
    """

    factory: tuple[str, dict[str, Any]]

    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Starts weights from training images, batches float [B, C, H, W]; by default does nothing, and reads none."""


N = TypeVar("N", bound=Network)


def check_int(name: str, value: object, minimum: int, maximum: int = LARGEST) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is an int in ``minimum..maximum`` (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be an integer from {minimum} to {maximum}, got {value!r}")


def check_images(in_channels: object, num_classes: object, image_size: object, smallest: int) -> None:
    """Checks the three arguments that every network has; ``smallest`` is the smallest image it can read."""
    check_int("in_channels", in_channels, 1)
    check_int("num_classes", num_classes, 1)
    check_int("image_size", image_size, smallest)


def finish(net: N, name: str, **arguments: Any) -> N:
    """Initialises ``net`` from the default generator and records its factory.

    Weights are Kaiming-normal for ReLU with the fan-in (He et al. 2015, eq. 10), biases zero; BatchNorm keeps
    PyTorch's own start, scale one and shift zero.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return record(net, name, **arguments)


def record(net: N, name: str, **arguments: Any) -> N:
    """Records the factory of ``net``, which has the initial weights that it needs."""
    net.factory = (name, arguments)
    return net
