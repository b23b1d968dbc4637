"""Packages that some parts of bqnn need and `import bqnn` does not: the extras of pyproject.toml."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of packages that belong to ``extra``, for instance "train".

    Raises:
        ModuleNotFoundError: one of them is not installed; the message names the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        message = f"{package} is not installed: pip install 'bqnn[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
