"""How a file describes a Bayes layer, and the way from the description back to the layer.

The description is that of the product, with ``num_levels`` and ``bayes``, an object of the options that are not as
usual: arguments of :class:`bqnn.BayesLinear`. Its tensors are those of its state, so that it goes on as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.bayes.base import BayesLayer
from bqnn.bayes.layers import BayesLinear
from bqnn.bayes.options import DEFAULTS
from bqnn.bayes.weight import FITTED, POSTERIOR
from bqnn.core.check import FLOATING
from bqnn.core.files import FormatError
from bqnn.files.container import DTYPES, Entry
from bqnn.files.product_spec import (
    EMBEDDING,
    KINDS,
    check_product,
    describe_product,
    geometry_of,
    sizes_of,
    tensor_name,
)

FIELD = "bayes"
THRESHOLDS = "raw_thresholds"  # of a learned partition alone
LEARNED = (*POSTERIOR, "bias")
PARTS = (*POSTERIOR, *FITTED, "bias")
NEEDED = SHARED = tuple(part for part in PARTS if part not in (THRESHOLDS, "bias"))
"""What every layer has, and what layers with one posterior have in common."""
OPTIONS: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if name != "num_levels"}
"""The layer's options, and what is usual for them."""
SCALED = "scale_grad_by_freq"  # of an embedding that is as nn.Embedding with this flag, which only training sees


def describe(layer: BayesLayer) -> dict[str, Any]:
    """The description of ``layer``, JSON-able, without what is as usual."""
    values = {name: getattr(layer, name) for name in OPTIONS}
    values = {name: value if isinstance(value, (str, bool)) else float(value) for name, value in values.items()}
    options = {name: value for name, value in values.items() if value != OPTIONS[name]}
    flags = {SCALED: True} if getattr(layer, SCALED, False) else {}
    return {**describe_product(layer), **flags, "num_levels": layer.num_levels, FIELD: options}


def check_spec(name: str, spec: Mapping[str, Any]) -> None:
    """Raises FormatError unless ``spec`` is what :func:`describe` could have returned; names layer and field."""
    known = check_product(name, spec) | {"num_levels", FIELD}
    if spec["kind"] == EMBEDDING and spec.get(SCALED) is True:
        known.add(SCALED)
    if unknown := [field for field in spec if field not in known]:
        raise FormatError(f"layer {name!r}: {unknown[0]} can not be {spec[unknown[0]]!r:.80}")
    options = spec[FIELD]
    if not isinstance(options, dict):
        raise FormatError(f"layer {name!r}: {FIELD} must be an object of options, got {options!r:.80}")
    for option, value in options.items():
        if option not in OPTIONS or type(value) is not type(OPTIONS[option]) or value == OPTIONS[option]:
            raise FormatError(f"layer {name!r}: {option} can not be {value!r:.80}")
    num_levels = spec.get("num_levels")
    if type(num_levels) is not int:
        raise FormatError(f"layer {name!r}: num_levels can not be {num_levels!r:.80}")
    if fault := _fault(num_levels, tuple(options.items())):
        raise FormatError(f"layer {name!r}: {fault}")


@lru_cache(maxsize=128)  # the layers of a file are alike, and a file may have many
def _fault(num_levels: int, options: tuple[tuple[str, Any], ...]) -> str:
    """What a layer has against its options, or nothing."""
    try:
        BayesLinear(1, 1, device="meta", num_levels=num_levels, **dict(options))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def check_tensors(name: str, spec: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raises FormatError unless dtypes and shapes of a layer's tensors are those that ``spec`` (checked) asks for.

    ``entries`` are the tensors of the file by every name that they have.
    """
    shape, options, num_levels = spec["shape"], spec[FIELD], spec["num_levels"]
    codebooks = shape[0] if options.get("granularity") == "channel" else 1
    learned = options.get("partition") == "learned"
    weight = entries.get(tensor_name(name, "weight"))
    posterior = [DTYPES[weight.dtype]] if weight is not None and DTYPES[weight.dtype] in FLOATING else FLOATING
    needed = {
        "weight": (posterior, shape),
        "log_sigma2": (posterior, shape),
        "raw_levels": (posterior, [codebooks, num_levels]),
        THRESHOLDS: (posterior, [codebooks, num_levels - 1]),
        "level_scale": ((torch.float32, torch.float64), [codebooks, 1]),
        "prior_sigma2": ((torch.float32, torch.float64), []),
        "bias": (FLOATING, shape[:1]),
    }
    for part, (dtypes, size) in needed.items():
        tensor = tensor_name(name, part)
        if tensor not in entries:
            if part in NEEDED or (part == THRESHOLDS and learned):
                raise FormatError(f"tensor {tensor!r} is missing")
            continue
        if part == THRESHOLDS and not learned:
            raise FormatError(f"tensor {tensor!r} is unexpected: the partition is not learned")
        if entries[tensor].shape != size:
            raise FormatError(f"tensor {tensor!r} must have the shape {size}, got {entries[tensor].shape}")
        if DTYPES[entries[tensor].dtype] not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise FormatError(f"tensor {tensor!r} must be {allowed}, got {DTYPES[entries[tensor].dtype]}")


def build_layer(
    name: str, spec: Mapping[str, Any], part: Callable[[str], Tensor | None], learning: Callable[[str], bool]
) -> BayesLayer:
    """The layer that ``spec`` describes, both checked, with the estimator "moment": see :func:`set_estimators`.

    Args:
        name: of the layer, for messages.
        spec: its description.
        part: gives each of :data:`PARTS` to keep, or None.
        learning: whether that one, a parameter, requires a gradient.

    Raises:
        FormatError: a tensor has a value that no layer can have; names the tensor.
    """
    values = {each: part(each) for each in PARTS}
    options = {option: value for option, value in spec[FIELD].items() if option != "estimator"}
    keywords: dict[str, Any] = {"device": "meta", "num_levels": spec["num_levels"], **options}
    kind: Any = KINDS[spec["kind"]].bayes
    keywords |= {name: tuple(each) if isinstance(each, list) else each for name, each in geometry_of(spec).items()}
    inputs, *kernel = sizes_of(spec)
    if spec["kind"] == EMBEDDING:
        layer: BayesLayer = kind(spec["shape"][0], inputs, scale_grad_by_freq=SCALED in spec, **keywords)
    else:
        layer = kind(inputs, spec["shape"][0], *kernel, bias=values["bias"] is not None, **keywords)
    for each, value in values.items():
        if value is None:
            continue
        if each in FITTED:
            layer._buffers[each] = value
        else:
            layer._parameters[each] = nn.Parameter(value, learning(each))
    try:
        check_values(layer)
    except ValueError as error:
        # The message starts with the name of the tensor.
        raise FormatError(tensor_name(name, str(error))) from error
    return layer


@torch.no_grad()
def check_values(layer: BayesLayer) -> None:
    """Raises ValueError for values with which a layer can not compute; the message starts with the tensor's name."""
    for name in FITTED:
        buffer = getattr(layer, name)
        if not (torch.isfinite(buffer).all() and (buffer > 0).all()):
            raise ValueError(f"{name} must be finite and positive, got {buffer.min().item():g}")
    levels, thresholds = layer.codebook()
    if not torch.isfinite(layer.raw_levels).all() or not (torch.isfinite(levels).all() and (levels.diff() > 0).all()):
        raise ValueError(f"raw_levels must give finite levels in order, got {levels.tolist()!r:.80}")
    layer.check_parameters()


def set_estimators(layers: Mapping[BayesLayer, Mapping[str, Any]]) -> None:
    """Gives each layer the estimator of its description: last, as it is layers with one posterior that decide
    together whether the variances have any use."""
    for layer, spec in layers.items():
        layer.estimator = spec[FIELD].get("estimator", OPTIONS["estimator"])
