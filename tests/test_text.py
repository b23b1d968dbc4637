"""shown: what a terminal gets to see of text from anywhere."""

from __future__ import annotations

import pytest

from bqnn.core.text import LONGEST, shown


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param("plain, 模型 é", "plain, 模型 é", id="plain"),
        pytest.param("a\nb\r\n  c\t", "a b c", id="lines"),
        pytest.param("\x1b[2J\x07\x9b31m", r"\x1b[2J\x07\x9b31m", id="escapes"),
        pytest.param("\u202eevil\u200b", r"\u202eevil\u200b", id="direction"),
        pytest.param("\ud800\udcff", r"\ud800\udcff", id="surrogates"),
    ],
)
def test_what_does_not_print_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected
    shown(text).encode()


def test_long_text_is_cut_in_the_middle() -> None:
    text = "begin" + "x" * 10**6 + "end"
    assert len(shown(text)) < LONGEST + 10
    assert shown(text).startswith("begin") and shown(text).endswith("end") and " ... " in shown(text)
    assert shown("x" * LONGEST) == "x" * LONGEST
