"""shown: text of unknown origin, fit for a message or a terminal."""

from __future__ import annotations

LONGEST = 1000  # characters of a message
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
