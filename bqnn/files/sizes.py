"""How many bytes each layer of a file takes, by what they are for."""

from __future__ import annotations

import math
from typing import Any

from bqnn.files.container import Contents
from bqnn.files.layer_spec import is_bayes, parts_of
from bqnn.files.product_spec import tensor_name


def layer_sizes(contents: Contents) -> dict[str, dict[str, Any]]:
    """By the name of a layer its description, ``bytes``, ``bits_per_weight`` and ``posterior_bytes``.

    The bytes of a tensor that several layers have are the first one's.
    """
    entries = contents.by_name()
    counted: set[str] = set()
    layers = {}
    for name, spec in contents.metadata["layers"].items():
        sizes = dict.fromkeys(parts_of(spec), 0)
        for part in sizes:
            tensor = tensor_name(name, part)
            stored = contents.stored_as(tensor)
            if tensor in entries and stored not in counted:
                counted.add(stored)
                sizes[part] = entries[tensor].size
        weight = entries[tensor_name(name, "weight" if is_bayes(spec) else "codes")]
        bits = 8 * weight.size / math.prod(spec["shape"])
        posterior = sizes.pop("log_sigma2" if is_bayes(spec) else "chances")
        layers[name] = {**spec, "bytes": sum(sizes.values()), "bits_per_weight": bits, "posterior_bytes": posterior}
    return layers
