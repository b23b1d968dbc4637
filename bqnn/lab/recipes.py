"""The built-in recipes, files in bqnn/recipes, and files of a user's own.

A file is TOML: a string ``summary``, which says in a line what the recipe is for, and fields of
:class:`bqnn.lab.recipe.Recipe`; one that is left out has its default.
"""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from bqnn.core.files import open_regular
from bqnn.core.text import shown, suggestion
from bqnn.lab.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIX = ".toml"
SUMMARY = "summary"
_FOLDER = files("bqnn") / "recipes"
NAMES = tuple(sorted(file.name.removesuffix(SUFFIX) for file in _FOLDER.iterdir() if file.name.endswith(SUFFIX)))


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """The built-in recipe ``name``, one of :data:`NAMES`, or that of a file, which is a path or ends in ".toml".

    Raises:
        ValueError: there is no such recipe; the file is no TOML; a field is unknown, or of a wrong type or value.
        OSError: the file can not be read.
    """
    if is_file(name):
        with open_regular(Path(name).expanduser()) as file:
            return _parse(file.read(), os.fspath(name))[1]
    return _built_in(os.fspath(name))[1]


def summary_of(name: str) -> str:
    """What the built-in recipe ``name`` is for, in a line."""
    return _built_in(name)[0]


def text_of(name: str) -> str:
    """The file of the built-in recipe ``name``; raises ValueError where there is none."""
    if name not in NAMES:
        known = f"recipe must be one of {', '.join(NAMES)}, or a file {SUFFIX}, got {name!r}"
        raise ValueError(known + suggestion(name, NAMES))
    return (_FOLDER / f"{name}{SUFFIX}").read_text(encoding="utf-8")


def parsed_toml(text: bytes) -> dict[str, Any]:
    """What a TOML file says; raises ValueError where it is none."""
    return tomllib.loads(text.decode())


def is_file(name: str | os.PathLike[str]) -> bool:
    """Whether ``name`` stands for a file, and not for a built-in recipe."""
    return not isinstance(name, str) or name.endswith(SUFFIX) or Path(name).name != name


def _built_in(name: str) -> tuple[str, Recipe]:
    return _parse(text_of(name).encode(), f"{name}{SUFFIX}")


def _parse(text: bytes, source: str) -> tuple[str, Recipe]:
    """Summary and recipe of a file's ``text``; messages name the ``source``."""
    try:
        content = parsed_toml(text)
        summary = content.pop(SUMMARY, "")
        if not isinstance(summary, str):
            raise ValueError(f"{SUMMARY} must be a string, got {summary!r:.80}")
        return summary, Recipe.of_fields(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no recipe: {shown(str(error))}") from error
