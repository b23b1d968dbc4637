"""Pieces of the page: tables and legends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from bqnn.view.figures import line_style

DASH = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    """A table of plain strings, which are escaped here."""

    def cells(tag: str, row: Sequence[str]) -> str:
        marks = [' class="text"' if i in text_columns else "" for i in range(len(row))]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, row, strict=True)) + "</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return f'<div class="table"><table>\n<thead>{cells("th", head)}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def legend(lines: Iterable[tuple[int, str]]) -> str:
    """Names of lines, each behind its place in the order of the page; the names are escaped here."""
    items = "".join(f"<li>{_swatch(order)}{escape(name)}</li>" for order, name in lines)
    return f'<ul class="legend">{items}</ul>'


def _swatch(order: int) -> str:
    colour, dashes = line_style(order)
    return (
        '<svg viewBox="0 0 32 10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="32" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )
