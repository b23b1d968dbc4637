"""What is seen of an epoch while it lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from bqnn.core.extras import needs

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """``items``, with a bar on stderr that says how many of ``total`` have been taken, until the last one is.

    Raises:
        ModuleNotFoundError: tqdm is not installed.
    """
    with needs("train"):
        from tqdm import tqdm
    return iter(tqdm(items, label, total, leave=False))
