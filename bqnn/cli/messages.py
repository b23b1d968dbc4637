"""Messages of the command in the words that were typed: flags, and what a misspelt one may have meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from bqnn.core.text import suggestion

ALIASES = {"name": "dataset"}
"""Arguments of functions that have another name than the option that they are given by."""
_CHOICE = re.compile(r"invalid choice: '(?P<word>.*)' \(choose from (?P<choices>.*)\)")


class Parser(argparse.ArgumentParser):
    """A parser that says what a misspelt command, option or choice may have meant, with the usage of the command."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options.parser.refuse(unknown)
        return options

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Ends the process with a message on words that are no arguments of this command."""
        words = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        hint = suggestion(words[0], self._option_string_actions) if words else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def error(self, message: str) -> NoReturn:
        found = _CHOICE.search(message)
        choices = [] if found is None else [each.strip(" '") for each in found["choices"].split(",")]
        super().error(message + ("" if found is None else suggestion(found["word"], choices)))


def in_flags(text: str, parser: argparse.ArgumentParser) -> str:
    """``text``, a message, with the flag of ``parser`` for the argument that it is about.

    That is the name that it begins with, or that it says to pass or to make smaller. What a message says of the content
    of a file stays as it is, as there the field has its own name.
    """
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    flags |= {name: flags[dest] for name, dest in ALIASES.items() if dest in flags}

    def flag(found: re.Match[str]) -> str:
        return found["before"] + flags[found["name"]]

    names = "|".join(map(re.escape, flags))
    return re.sub(rf"(?P<before>^|; pass |; a smaller )(?P<name>{names})(?=\s|$)", flag, text)
