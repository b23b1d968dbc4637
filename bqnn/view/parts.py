"""Pieces of a page as its templates take them: tables, and the lines of a legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bqnn.view.figures import line_style

DASH = "–"


class Table(NamedTuple):
    """A table of plain strings, with as many in each row as in its head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = ()
    """Columns of words, which begin at the left and wrap; the others are numbers."""


class LegendLine(NamedTuple):
    """What a line of the page's figures is of."""

    colour: str
    dashes: str
    name: str


def legend(lines: Iterable[tuple[int, str]]) -> list[LegendLine]:
    """Names of lines, each with its place in the order of the page."""
    return [LegendLine(*line_style(order), name) for order, name in lines]
