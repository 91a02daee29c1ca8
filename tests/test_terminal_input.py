"""What terminals send, byte by byte: keys, pastes, reports, and what is none of these."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from localdpo_tui import terminal_input
from localdpo_tui.terminal_input import TerminalInput, Typed
from textual.events import AppFocus, Key, MouseDown, Paste
from textual.message import Message

REPORTS = (
    b"\x1b[M \x8e%",  # X10 mouse: a column beyond 95 is no UTF-8
    b"\x1b[M \xc3\xa9",  # and here it is
    b"\x1b[M\x23\xff\xff",
    b"\x1b[<0;-1;5M",  # a mouse beyond the edge
    b"\x1b[<0;10;10X",
    b"\x1b[<0;99999999999999;1M",
    b"\x1b[48;0;0;0;0t",  # sizes
    b"\x1b[48;99999;99999;1;1t",
    b"\x1b[99999999999;1u",  # keys of the kitty protocol that are no characters
    b"\x1b[1114112;1u",
    b"\x1b[55296;1u",
    b"\x1b[97;1;55296u",
    b"\x1b[97;1:3u",  # a key that is let go
    b"\x1b[" + b"1;" * 40 + b"m",
    b"\x1b[?2026;2$z",
    b"\x1b]11;rgb:0000/0000/0000\x07",  # answers to questions about colours and the terminal
    b"\x1b]11;rgb:0000/0000/0000\x1b\\",
    b"\x1bP>|term 1.0\x1b\\",
    b"\x1b[?64;1;2c",
)


def read(*pieces: bytes) -> list[Message]:
    terminal = TerminalInput()
    return [event for piece in pieces for event in terminal.feed(piece)] + terminal.give_up()


def keys(events: Iterable[Message]) -> list[str]:
    found = []
    for event in events:
        if isinstance(event, Typed):
            found += [key.key for key in event.keys]
        elif isinstance(event, Key):
            found.append(event.key)
    return found


def typed(events: Iterable[Message]) -> str:
    """The text that the events put into an editor."""
    text = ""
    for event in events:
        if isinstance(event, Typed | Paste):
            text += event.text
        elif isinstance(event, Key) and event.is_printable:
            text += event.character or ""
    return text


@pytest.mark.parametrize("report", REPORTS)
def test_reports_that_are_broken_or_unknown_type_nothing_and_lose_nothing(report: bytes):
    assert typed(read(b"before" + report + b"after")) == "beforeafter"
    for cut in range(2, len(report)):
        assert typed(read(b"before" + report[:cut], report[cut:] + b"after")) == "beforeafter"


@pytest.mark.parametrize("report", REPORTS)
def test_a_report_that_is_cut_off_is_forgotten(report: bytes):
    for cut in range(3, len(report)):
        terminal = TerminalInput()
        events = terminal.feed(b"before" + report[:cut]) + terminal.give_up() + terminal.feed(b"after")
        assert "after" in typed(events)


def test_bytes_that_are_no_utf8_are_shown_as_such():
    assert typed(read(b"a\xff\xfeb\x8ec")) == "a\ufffd\ufffdb\ufffdc"
    assert typed(read(b"\xe6\x97", b"\xa5\xe6\x9c\xac")) == "日本"
    assert typed(read(b"\x1b[200~\xe6\x97", b"\xa5\xff\x1b[201~")) == "日\ufffd"


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (b"\x1b", "escape"), (b"\x1b[A", "up"), (b"\x1bOA", "up"), (b"\x1b[1;5C", "ctrl+right"), (b"\x1bOP", "f1"),
        (b"\x1b[[A", "f1"), (b"\x1b[15~", "f5"), (b"\x1ba", "alt+a"), (b"\x1b[3~", "delete"), (b"\x1b[Z", "shift+tab"),
        (b"\r", "enter"), (b"\x1b[97;5u", "ctrl+a"), (b"\x1b[97:65;5u", "ctrl+a"), (b"\x1b[97;5:1u", "ctrl+a"),
        (b"\x1b[27u", "escape"), (b"\x1b[13;2u", "shift+enter"), (b"\x11", "ctrl+q"),
    ],
)  # fmt: skip
def test_keys_are_read_whole_and_in_pieces(data: bytes, key: str):
    assert keys(read(data)) == [key]
    assert keys(read(*(bytes([byte]) for byte in data))) == [key]
    assert keys(read(data + b"\t")) == [key, "tab"] or data == b"\x1b"


def test_printable_keys_that_come_together_are_one_event():
    (event,) = read("words, 日本語 and é".encode())
    assert isinstance(event, Typed)
    assert event.text == "words, 日本語 and é"
    (kitty,) = read(b"".join(b"\x1b[%d;;%du" % (code, code) for code in b"kitty"))
    assert isinstance(kitty, Typed)
    assert kitty.text == "kitty"
    first, enter, second = read(b"one\rtwo")
    assert (typed([first]), typed([second])) == ("one", "two")
    assert isinstance(enter, Key)


def test_a_mouse_and_the_focus_are_told():
    focus, click = read(b"\x1b[I\x1b[<0;11;3M")
    assert isinstance(focus, AppFocus)
    assert isinstance(click, MouseDown)
    assert (click.x, click.y) == (10, 2)


@pytest.mark.parametrize("text", ["one\rtwo", "with \x1b[31mcolour\x1b[0m and \x1b[M abc", "", "\x1b", "x\x1b[20"])
def test_a_paste_is_one_text_however_it_is_cut(text: str):
    data = b"\x1b[200~" + text.encode() + b"\x1b[201~"
    for cut in range(len(data)):
        paste, *rest = read(data[:cut], data[cut:] + b"z") if cut > 1 else read(data + b"z")
        assert isinstance(paste, Paste)
        assert paste.text == text
        assert keys(rest) == ["z"]


def test_a_paste_whose_end_never_comes_ends_by_itself(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(terminal_input, "monotonic", lambda: now)
    terminal = TerminalInput()
    assert terminal.feed(b"\x1b[200~never ends") == []
    assert terminal.tick() == []
    now += 10
    assert typed(terminal.tick()) == "never ends"
    assert keys(terminal.feed(b"\x11")) == ["ctrl+q"]


@given(
    st.lists(st.sampled_from([*REPORTS, b"\x1b[200~", b"\x1b[201~", b"\x1b", b"[", b"M", b"\xc3", b"a"])), st.integers()
)
def test_whatever_comes_keys_are_read_after_it(pieces: list[bytes], seed: int):
    data = b"".join(pieces) + random.Random(seed).randbytes(20)
    terminal = TerminalInput()
    for at in range(0, len(data), 7):
        terminal.feed(data[at : at + 7])
    terminal.give_up()
    assert keys(terminal.feed(b"\x11"))[-1:] == ["ctrl+q"]
