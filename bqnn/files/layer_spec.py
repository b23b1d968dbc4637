"""How a file describes a layer, packed or with a posterior, and which tensors it has; the choice between the two."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from bqnn.bayes.base import BayesLayer
from bqnn.core.files import FormatError
from bqnn.files import bayes_spec, packed_spec
from bqnn.files.container import Entry
from bqnn.files.product_spec import EMBEDDING, describe_product, product_of, tensor_name
from bqnn.packed.base import PackedLayer
from bqnn.packed.weight import PackedWeight

LAYERS = (PackedWeight, BayesLayer)
"""What files describe; everything else of a network is in the tensors of its state."""

Spec = Mapping[str, Any]


def is_bayes(spec: Spec) -> bool:
    """Whether ``spec`` describes a Bayes layer, and not a packed one."""
    return bayes_spec.FIELD in spec


def parts_of(spec: Spec) -> tuple[str, ...]:
    """The tensors that a layer with this description may have."""
    return bayes_spec.PARTS if is_bayes(spec) else packed_spec.PARTS


def needed_of(spec: Spec) -> tuple[str, ...]:
    """Those that it has at least."""
    return bayes_spec.NEEDED if is_bayes(spec) else packed_spec.NEEDED


def describe(layer: PackedWeight | BayesLayer) -> dict[str, Any]:
    """The description of a layer, one of :data:`LAYERS`, JSON-able, without what is as usual."""
    return bayes_spec.describe(layer) if isinstance(layer, BayesLayer) else packed_spec.describe(layer)


def check_spec(name: str, spec: Any) -> None:
    """Raises FormatError unless ``spec`` is what :func:`describe` could have returned; names layer and field."""
    if not isinstance(spec, dict):
        raise FormatError(f"layer {name!r} must be described by an object, got {spec!r:.80}")
    _form(spec).check_spec(name, spec)


def check_tensors(name: str, spec: Spec, entries: Mapping[str, Entry]) -> None:
    """Raises FormatError unless dtypes and shapes of a layer's tensors are those that ``spec`` (checked) asks for.

    ``entries`` are the tensors of the file by every name that they have.
    """
    if spec["kind"] == EMBEDDING and (bias := tensor_name(name, "bias")) in entries:
        raise FormatError(f"tensor {bias!r} is of an embedding, which has none")
    _form(spec).check_tensors(name, spec, entries)


def check_fits(name: str, layer: nn.Module, spec: Spec, has_bias: bool) -> None:
    """Raises FormatError unless ``layer``, of the network to be filled, is of the kind that ``spec`` describes."""
    try:
        own = describe_product(layer)
    except FormatError as error:
        raise FormatError(f"layer {name!r}: {error}") from error
    stored = product_of(spec)
    if own != stored:
        raise FormatError(f"layer {name!r} is {stored} in the file and {own} in the model")
    if isinstance(layer, PackedLayer) and layer.relu and "relu" not in spec:
        raise FormatError(f"layer {name!r} ends with a ReLU in the model and not in the file")
    if (getattr(layer, "bias", None) is not None) != has_bias:
        where = ("file", "model") if has_bias else ("model", "file")
        raise FormatError(f"tensor {tensor_name(name, 'bias')!r} is in the {where[0]} and not in the {where[1]}")


def _form(spec: Spec) -> ModuleType:
    return bayes_spec if is_bayes(spec) else packed_spec
