"""Text in messages: of unknown origin, a name that was meant, a time that is left."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LONGEST = 1000  # characters of a message
LISTED = 10  # names in a message
LEAST_LIKENESS = 0.5  # of a word and what it may have meant: of two letters one
HEAD_SHARE = 0.7  # of a message that is cut, what stays of its beginning; the rest is its end


def shown(text: str, longest: int = LONGEST) -> str:
    """``text`` in one line, with escapes for what does not print, and cut in the middle to ``longest`` characters.

    Terminals obey control characters, and text from a file may hold any, or be as long as the file.
    """
    if len(text) > longest:
        head = round(HEAD_SHARE * longest)
        text = f"{text[:head]} ... {text[head - longest :]}"
    text = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def suggestion(word: str, choices: Iterable[str]) -> str:
    """What to add to a message about ``word``, which is none of ``choices``: the closest of them, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=LEAST_LIKENESS)
    return f"; did you mean {close[0]}?" if close else ""


def duration(seconds: float) -> str:
    """A time in one or two units: "45 s", "3 min", "2 h 10 min"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def listed(names: Sequence[str]) -> str:
    """The first ten names, as they may be shown, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return shown(", ".join(names[:LISTED])) + more
