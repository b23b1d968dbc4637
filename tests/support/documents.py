"""Documents as tests look at them: the blocks of code in a page of Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}.*\n(?:(?:^ *\n)*^ {4}.*\n)*", re.MULTILINE)
CALL = re.compile(r"\bbqnn\.\w+\(")


class Block(NamedTuple):
    """A block of code, and the line of the page that it begins at, from 1."""

    language: str  # "python", "sh", or what a fence says; "" where nothing tells
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in their order: fenced ones, and those that four spaces indent.

    An indented block says no language: it is Python where it calls something of bqnn, and a shell's where a line begins
    with the command.
    """
    found = [Block(each[1], each[2], _line(text, each.start()) + 1) for each in FENCE.finditer(text)]
    # As many lines of nothing, so that fences hide no place of the page.
    rest = FENCE.sub(lambda each: "\n" * each[0].count("\n"), text)
    for each in INDENTED.finditer(rest):
        if not ("\n\n" + rest[: each.start()]).endswith("\n\n"):
            continue  # the rest of a paragraph, or of an item of a list
        code = "\n".join(line[4:] for line in each[0].split("\n"))
        found.append(Block(_language(code), code, _line(rest, each.start())))
    return sorted(found, key=lambda block: block.line)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _language(code: str) -> str:
    if CALL.search(code):
        return "python"
    return "sh" if re.search(r"^bqnn ", code, re.MULTILINE) else ""


def commands(code: str) -> Iterator[list[str]]:
    """The arguments of each call of `bqnn` in the lines of a shell, also of several that && joins."""
    for line in code.splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            if words[:1] == ["bqnn"]:
                yield words[1:]
            words = []
