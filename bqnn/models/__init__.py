"""The built-in networks, and :func:`build`, which makes one from its name.

Every network has ``factory = (name, arguments)``, so ``build(*net.factory)`` makes the same network again (with fresh
weights). All of them take ``in_channels``, ``num_classes`` and ``image_size``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bqnn.models._common import Network
from bqnn.models.airbench import airbench
from bqnn.models.densenet import densenet
from bqnn.models.lenet import lenet5, lenet5_caffe
from bqnn.models.resnet import resnet20
from bqnn.models.vgg import vgg7

__all__ = ["NAMES", "Network", "airbench", "build", "densenet", "lenet5", "lenet5_caffe", "resnet20", "vgg7"]

_FACTORIES: dict[str, Callable[..., Network]] = {
    "airbench": airbench,
    "densenet": densenet,
    "lenet5": lenet5,
    "lenet5_caffe": lenet5_caffe,
    "resnet20": resnet20,
    "vgg7": vgg7,
}
NAMES = tuple(_FACTORIES)


def build(name: str, arguments: Mapping[str, Any] | None = None, /, **keywords: Any) -> Network:
    """Makes the built-in network ``name`` with ``arguments`` and ``keywords`` together; a keyword wins.

    Raises:
        ValueError: there is no such network, it has no argument of that name, or a value does not fit.
    """
    factory = _FACTORIES.get(name) if isinstance(name, str) else None
    if factory is None:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    merged = {**(arguments or {}), **keywords}
    accepted = inspect.signature(factory).parameters
    unknown = [key for key in merged if key not in accepted]
    if unknown:
        got = ", ".join(repr(key) for key in unknown)
        raise ValueError(f"{name} has no argument {got}; its arguments are {', '.join(accepted)}")
    return factory(**merged)
