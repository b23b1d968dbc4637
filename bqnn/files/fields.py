"""What the metadata of a packed or Bayesian network's file has to be, before anything is made of it."""

from __future__ import annotations

from typing import Any

from bqnn.core.files import FormatError
from bqnn.files import members
from bqnn.files.bayes_spec import LEARNED
from bqnn.files.container import Contents
from bqnn.files.layer_spec import check_spec, check_tensors, is_bayes
from bqnn.files.metadata import FIELD as DATA
from bqnn.files.metadata import read_fields

FROZEN = "frozen"
"""Of the metadata: names of the parameters that require no gradient, in the file of a network with Bayes layers."""
NEEDED = ("version", "factory", "layers")
OPTIONAL = ("alias", FROZEN, members.FIELD, DATA)


def check_fields(contents: Contents) -> None:
    """Raises FormatError unless the metadata has the form that :func:`bqnn.save` gives it.

    Its CRC-32 has been checked.
    """
    metadata, entries = contents.metadata, contents.entries
    if unknown := set(metadata) - {*NEEDED, *OPTIONAL}:
        raise FormatError(f"the metadata has the unknown field {min(unknown)!r}")
    if missing := set(NEEDED) - set(metadata):
        raise FormatError(f"the metadata must have the field {min(missing)!r}")
    factory, layers, alias = metadata["factory"], metadata["layers"], metadata.get("alias", {})
    if factory is not None:
        if not isinstance(factory, list) or [type(part) for part in factory] != [str, dict]:
            raise FormatError(f"factory must be a name and arguments, got {factory!r:.80}")
    if not isinstance(layers, dict) or not layers:
        raise FormatError(f"layers must describe the layers of the file by name, got {layers!r:.80}")
    for name, spec in layers.items():
        check_spec(name, spec)
    if not isinstance(alias, dict):
        raise FormatError(f"alias must be an object, got {alias!r:.80}")
    for name, stored in alias.items():
        if name in entries or not isinstance(stored, str) or stored not in entries:
            raise FormatError(f"tensor {name!r} is an alias of {stored!r:.80}; only the second must be stored")
    by_name = contents.by_name()
    for name, spec in layers.items():
        check_tensors(name, spec, by_name)
    _check_frozen(metadata, by_name)
    if DATA in metadata:
        read_fields(metadata[DATA])
    members.check_members(contents)


def _check_frozen(metadata: dict[str, Any], by_name: dict[str, Any]) -> None:
    if any(map(is_bayes, metadata["layers"].values())) != (FROZEN in metadata):
        raise FormatError(f"{FROZEN} must be in the metadata of a network with Bayes layers, and of no other")
    frozen = metadata.get(FROZEN, [])
    if not isinstance(frozen, list) or not all(isinstance(name, str) and name in by_name for name in frozen):
        raise FormatError(f"{FROZEN} must be a list of tensors of the file, got {frozen!r:.80}")
    if len(set(frozen)) != len(frozen):
        raise FormatError(f"{FROZEN} must have each tensor once, got {frozen!r:.80}")
    for name in frozen:
        layer, _, part = name.rpartition(".")
        spec = metadata["layers"].get(layer)
        if spec is not None and not (is_bayes(spec) and part in LEARNED):
            raise FormatError(f"{FROZEN} must be of parameters, and {name!r} is none")
