"""What every text and every line of the UI does with what comes in, and takes back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from localdpo_tui.app import LocalDPOApp
from localdpo_tui.terminal_input import TerminalInput
from localdpo_tui.widgets import editor, wrapping
from localdpo_tui.widgets.composer import Composer
from localdpo_tui.widgets.editor import SafeTextArea
from localdpo_tui.widgets.safe_input import SafeInput
from localdpo_tui.widgets.wrapping import Wrapping
from textual.app import App, ComposeResult
from textual.document import _wrapped_document
from textual.document._document import Document
from textual.document._wrapped_document import WrappedDocument
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


# -- a key costs the same in a long text as in a short one


@pytest.mark.parametrize("seed", range(8))
def test_rows_wrapped_piece_by_piece_are_those_of_the_whole_text(seed: int):
    dice = random.Random(seed)
    width = dice.choice((1, 5, 12, 40))
    alphabet = dice.choice(("ab ", "a   ", "漢字 b", "word  \n", "日本語", "a\tb \n"))
    document = Document("".join(dice.choices(alphabet, k=200)))
    wrapped = Wrapping(document, width)
    wrapped.wrap(width, 4)
    for _ in range(300):
        start, end = sorted(any_place(document, dice) for _ in range(2))
        if dice.random() < 0.7:
            end = start
        result = document.replace_range(start, end, "".join(dice.choices(alphabet, k=dice.choice((0, 1, 1, 1, 30)))))
        wrapped.wrap_range(start, end, result.end_location)
        whole = WrappedDocument(document, width, 4)
        for name in ("_wrap_offsets", "_offset_to_line_info", "_line_index_to_offsets", "_tab_width_cache", "height"):
            assert getattr(wrapped, name) == getattr(whole, name), name
        place = any_place(document, dice)
        assert wrapped.location_to_offset(place) == whole.location_to_offset(place)
        assert wrapped.get_sections(place[0]) == whole.get_sections(place[0])


def any_place(document: Document, dice: random.Random) -> tuple[int, int]:
    row = dice.randrange(document.line_count)
    return row, dice.randint(0, len(document[row]))


@pytest.mark.parametrize("characters", [3_000, 300_000])
async def test_a_key_costs_the_same_however_long_the_text_is(characters: int, monkeypatch: pytest.MonkeyPatch):
    """The characters that are wrapped, measured and drawn for a key, at the end and in the middle."""
    seen = 0

    def counted(function: Any, place: int) -> Any:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += len(arguments[place])
            return function(*arguments, **options)

        return counting

    for module in (wrapping, _wrapped_document):
        for name in ("compute_wrap_offsets", "cell_len"):
            monkeypatch.setattr(module, name, counted(getattr(module, name), 0))
    monkeypatch.setattr(_wrapped_document, "Text", counted(_wrapped_document.Text, 0))
    monkeypatch.setattr(editor, "picture", counted(editor.picture, 0))
    app = Fields()
    async with app.run_test(size=(40, 24)) as pilot:
        text = app.query_one("#fixed", SafeTextArea)
        # Words of one length would never fall into the same rows again after one that is longer.
        dice = random.Random(1)
        text.raw = " ".join("x" * dice.randint(1, 12) for _ in range(characters // 7))
        text.focus()
        for place in (text.document.end, (0, characters // 2)):
            text.move_cursor(place)
            await pilot.pause()
            seen = 0
            await pilot.press(*"typing (more)")
            assert 0 < seen < 10_000


@pytest.mark.parametrize("seed", range(4))
async def test_rows_of_a_long_line_look_as_textual_draws_them(seed: int):
    dice = random.Random(seed)
    app = Fields()
    async with app.run_test(size=(40, 24)) as pilot:
        text = app.query_one("#fixed", SafeTextArea)
        text.highlight_cursor_line = bool(seed % 2)
        text.raw = "(wörd [日本] " * 200 + ")\n" + "next " * 300
        text.mark([(3, 40), (1000, 1500)])
        text.focus()
        for _ in range(12):
            selected = dice.random() < 0.5
            text.selection = text.selection.__class__(where(text, dice), where(text, dice))
            if not selected:
                text.move_cursor(text.selection.end)
            await pilot.pause()
            for y in range(8):
                ours = text._render_line(y)
                assert pieces(ours) == pieces(TextArea._render_line(text, y))


def pieces(strip: Any) -> list[tuple[str, Any]]:
    """Every character with its style, the same however a strip is cut."""
    return [(char, segment.style) for segment in strip for char in segment.text]
