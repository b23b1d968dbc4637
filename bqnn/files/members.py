"""The networks of a packed file: one, or those of an ensemble, each as if it had a file to itself.

In the file of an ensemble the names of layers and tensors begin with the number of their network and a dot, as in its
state. What several networks have bit for bit is there once, and has the other names as aliases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

from bqnn.core.files import FormatError
from bqnn.files.container import Contents, is_count

T = TypeVar("T")

FIELD = "ensemble"
"""Of the metadata: the number of networks, in the file of an ensemble."""
MOST_NETWORKS = 1000
"""In a file; each has modules of its own in memory."""
FREE_BYTES, MOST_TIMES = 1 << 28, 64
"""What tensors may take in memory: so many bytes, or so many times the file's. They may be stored once for all networks
and layers of a file, and in memory each has its own."""


def count_of(contents: Contents) -> int | None:
    """The number of networks of an ensemble; None in the file of a network."""
    return contents.metadata.get(FIELD)


def check_members(contents: Contents) -> None:
    """Raises FormatError unless each name of a layer and tensor is of one of the networks, and each has a layer."""
    if FIELD not in contents.metadata:
        return
    count = contents.metadata[FIELD]
    if not is_count(count, 1) or count > MOST_NETWORKS:
        raise FormatError(f"{FIELD} must be a number of networks, 1 to {MOST_NETWORKS}, got {count!r:.80}")
    layers = _by_network(contents.metadata["layers"])
    if len(layers) != count or set(layers) != set(map(str, range(count))):
        raise FormatError(f"layers must be of the {count} networks of {FIELD}, got those of {list(layers)!s:.80}")
    for name in contents.by_name():
        if name.partition(".")[0] not in layers:
            raise FormatError(f"tensor {name!r} is of none of the {count} networks")


def check_memory(contents: Contents, taken: int) -> None:
    """Raises FormatError where the tensors of all networks, ``taken`` bytes in memory, are too many for the file."""
    if taken > max(FREE_BYTES, MOST_TIMES * contents.file_bytes):
        raise FormatError(
            f"its tensors would take {taken} bytes in memory, more than {MOST_TIMES} times the {contents.file_bytes} "
            "of the file"
        )


def members(contents: Contents) -> list[Contents]:
    """The file as that of each network; :func:`check_members` has passed it."""
    count = count_of(contents)
    if count is None:
        return [contents]
    layers, tensors = _by_network(contents.metadata["layers"]), _by_network(contents.by_name())
    found = []
    for number in map(str, range(count)):
        metadata = {**contents.metadata, "layers": layers[number]}
        found.append(contents._replace(metadata=metadata, prefix=f"{number}.", part=tensors[number]))
    return found


def _by_network(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """By the number of a network what is named in it, without the number; a network that is a layer has the name ""."""
    found: dict[str, dict[str, T]] = {}
    for name, value in named.items():
        number, _, rest = name.partition(".")
        found.setdefault(number, {})[rest] = value
    return found


@contextlib.contextmanager
def of_member(member: Contents) -> Iterator[None]:
    """Inside, an error about a network of an ensemble says which one it is."""
    try:
        yield
    except ValueError as error:
        if not member.prefix:
            raise
        kind = FormatError if isinstance(error, FormatError) else ValueError
        raise kind(f"network {member.prefix.removesuffix('.')}: {error}") from error
