"""What every text and every line of the UI does with what comes in, and takes back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from localdpo_tui.app import LocalDPOApp
from localdpo_tui.terminal_input import TerminalInput
from localdpo_tui.widgets.composer import Composer
from localdpo_tui.widgets.editor import SafeTextArea
from localdpo_tui.widgets.safe_input import SafeInput
from textual.app import App, ComposeResult
from textual.events import Paste
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from tui import SIZES, started, until, write_pairs

LINES = [f"line {number}" for number in range(40)]


class Fields(App[None]):
    """A text that needs a scroll bar soon, one that grows, and a line."""

    CSS = "#fixed { height: 8; } #grows { height: auto; max-height: 6; min-height: 3; }"

    def compose(self) -> ComposeResult:
        yield SafeTextArea(id="fixed")
        yield SafeTextArea(id="grows")
        yield SafeInput(id="line")


def paste(app: App[Any], text: str) -> None:
    app.post_message(Paste(text))


def burst(app: App[Any], text: str) -> None:
    for event in TerminalInput().feed(text.encode()):
        (app if isinstance(app, LocalDPOApp) else app.focused or app).post_message(event)


@pytest.mark.parametrize("ends", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("name", ["#fixed", "#grows"])
async def test_lines_pasted_are_lines_and_undo_and_redo_are_exact(ends: str, name: str):
    app = Fields()
    async with app.run_test(size=(40, 24)) as pilot:
        text = app.query_one(name, SafeTextArea)
        text.focus()
        await pilot.pause()
        paste(pilot.app, ends.join(LINES))
        await pilot.pause()
        assert text.raw == "\n".join(LINES)
        assert text.document.line_count == len(LINES)
        for _ in range(3):
            await pilot.press("ctrl+z")
            assert text.raw == ""
            await pilot.press("ctrl+y")
            assert text.raw == "\n".join(LINES)


@pytest.mark.parametrize("seed", range(4))
async def test_undo_goes_back_to_the_start_and_redo_to_the_end(seed: int):
    dice = random.Random(seed)
    app = Fields()
    async with app.run_test(size=(dice.choice((24, 60)), 24)) as pilot:
        text = app.query_one(dice.choice(("#fixed", "#grows")), SafeTextArea)
        text.raw = start = dice.choice(("", "\n".join(LINES), "crlf\r\nthroughout\r\n", "x" * 500))
        text.focus()
        await pilot.pause()
        for _ in range(40):
            await change(text, dice, pilot)
        end = text.raw
        for _ in text.history.undo_stack:
            text.undo()
            await pilot.pause()
        assert text.raw == start
        for _ in text.history.redo_stack:
            text.redo()
            await pilot.pause()
        assert text.raw == end


async def change(text: SafeTextArea, dice: random.Random, pilot: Pilot[None]) -> None:
    match dice.randrange(8):
        case 0:
            paste(pilot.app, dice.choice("\r\n") * dice.randrange(30) + "日本 " * dice.randrange(20))
        case 1:
            burst(pilot.app, "typed " * dice.randrange(1, 60))
        case 2:
            await pilot.press("enter", "a", "b")
        case 3:
            text.selection = text.selection.__class__(*(where(text, dice) for _ in range(2)))
        case 4:
            await pilot.press(*["backspace"] * dice.randrange(1, 5))
        case 5:
            await pilot.press(dice.choice(("ctrl+z", "ctrl+y", "ctrl+u", "ctrl+k", "ctrl+w")))
        case 6:
            text.move_cursor(where(text, dice))
        case 7:
            text.put_raw(dice.choice(("", "one\r\ntwo", "a\rb", "\n".join(LINES))))
    await pilot.pause()


def where(text: TextArea, dice: random.Random) -> tuple[int, int]:
    row = dice.randrange(text.document.line_count)
    return row, dice.randint(0, len(text.document[row]))


async def test_a_line_takes_several_lines_as_one():
    app = Fields()
    async with app.run_test() as pilot:
        line = app.query_one(SafeInput)
        line.focus()
        await pilot.pause()
        line.value = "<>"
        line.cursor_position = 1
        paste(app, "\x1bone\rtwo\r\nthree\n")
        await pilot.pause()
        assert line.value == "<␛one two three>"
        burst(app, "!?")
        await pilot.pause()
        assert line.value == "<␛one two three!?>"
        paste(app, "")
        await pilot.pause()
        assert line.value == "<␛one two three!?>"


async def test_a_text_of_another_field_keeps_its_carriage_returns():
    app = Fields()
    async with app.run_test() as pilot:
        text = app.query_one("#fixed", SafeTextArea)
        text.put_raw("from\rthe file\r\nas it is")
        await pilot.pause()
        assert text.raw == "from\rthe file\r\nas it is"


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
async def test_bursts_reach_texts_as_one_edit_and_lists_key_by_key(
    tmp_path: Any, size: tuple[int, int], monkeypatch: Any
):
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))
    write_pairs(tmp_path / "pairs.jsonl")
    async with started(tmp_path, size) as (app, pilot):
        await until(pilot, lambda: app.places() and getattr(app.places()[0], "store", None) is not None)
        burst(app, "/lar")  # the list has the focus: a slash searches
        await until(pilot, lambda: isinstance(app.focused, SafeInput), "the search line")
        burst(app, "gest")
        search = app.focused
        await until(pilot, lambda: isinstance(search, SafeInput) and search.value.endswith("gest"), "what was typed")
        await composed(app, pilot)
        await palette(app, pilot)


async def composed(app: LocalDPOApp, pilot: Pilot[None]) -> None:
    await pilot.press("f4")
    await until(pilot, lambda: isinstance(app.focused, Composer), "the composer")
    composer = app.focused
    assert isinstance(composer, Composer)
    paste(app, "one\rtwo")
    burst(app, " and three")
    await until(pilot, lambda: composer.raw == "one\ntwo and three", "the message")
    assert len(composer.history.undo_stack) == 2
    await pilot.press("ctrl+z", "ctrl+z")
    assert composer.raw == ""


async def palette(app: LocalDPOApp, pilot: Pilot[None]) -> None:
    await pilot.press("ctrl+p")
    await until(pilot, lambda: isinstance(app.focused, Input), "the palette")
    line = app.focused
    assert isinstance(line, Input)
    paste(app, "\x1b[2Jx")
    burst(app, "yz")
    await until(pilot, lambda: line.value == "␛[2Jxyz", "the palette's line")


async def test_a_lost_terminal_ends_the_app_with_what_was_wrong(tmp_path: Any, monkeypatch: Any):
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))
    async with started(tmp_path) as (app, pilot):
        await pilot.pause()
        flushed: list[bool] = []
        monkeypatch.setattr(app, "flush_all", lambda: flushed.append(True))
        app.lose_terminal(ValueError("broken"))
        assert (app.return_code, flushed) == (1, [True])
        assert isinstance(app.failure, ValueError)
