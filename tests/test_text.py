from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdpo.text import StreamSanitiser, sanitise


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 日本 🙂 a\tb\nc", "plain ünïcode 日本 🙂 a\tb\nc"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x1b]52;c;cGF5bG9hZA==\x07", "␛]52;c;cGF5bG9hZA==␇"),
        ("a\x00b\x7f", "a␀b␡"),
        ("\x9b31m\x85", "<U+009B>31m<U+0085>"),
        ("user\u202etxt.exe\u2066x\u2069", "user<U+202E>txt.exe<U+2066>x<U+2069>"),
        ("\u200e\u200f\u061c", "<U+200E><U+200F><U+061C>"),
        ("one\r\ntwo\rthree", "one\ntwo␍three"),
        ("a\u2028b", "a<U+2028>b"),
        ("\ud800", "<U+D800>"),
        ("family 👨‍👩‍👧", "family 👨‍👩‍👧"),
    ],
)
def test_sanitise(text: str, shown: str):
    assert sanitise(text) == shown


@given(st.text())
def test_nothing_that_moves_a_cursor_or_reorders_text_is_left(text: str):
    for char in sanitise(text):
        assert char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(char) not in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
    sanitise(text).encode("utf-8")


@given(st.text())
def test_sanitising_twice_changes_nothing(text: str):
    assert sanitise(sanitise(text)) == sanitise(text)


@given(st.lists(st.text(alphabet="a\r\n\x1b\u202e", max_size=4)))
def test_a_stream_shows_what_the_whole_text_shows(chunks: list[str]):
    stream = StreamSanitiser()
    shown = "".join(map(stream.feed, chunks)) + stream.close()
    assert shown == sanitise("".join(chunks))
    assert stream.close() == ""


def test_a_stream_holds_back_only_half_a_line_end():
    stream = StreamSanitiser()
    assert stream.feed("a\x1b") == "a␛"
    assert stream.feed("b\r") == "b"
    assert stream.feed("\nc") == "\nc"
