"""Without colour (NO_COLOR) everything still says what it is: by signs, bold, reverse and words, in greys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.segment import Segment
from test_tui_runs_services import make_run
from test_tui_train import piloted
from textual.app import App

from tui import SIZES, seen, started, until, write_pairs


def segments(app: App[None]) -> Iterator[Segment]:
    for line in app.screen._compositor.render_strips():
        yield from line


def coloured(app: App[None]) -> list[str]:
    """What is drawn in a colour that is no grey."""
    found = []
    for segment in segments(app):
        style = segment.style
        for color in (style.color, style.bgcolor) if style is not None else ():
            if color is not None and not color.is_default and len(set(color.get_truecolor())) > 1:
                found.append(segment.text)
    return found


def marked(app: App[None], attribute: str) -> str:
    """All text that is drawn bold, or reverse."""
    return "".join(s.text for s in segments(app) if s.style is not None and getattr(s.style, attribute))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_COLOR", "1")
    write_pairs(tmp_path / "pairs" / "mine.jsonl")
    make_run(tmp_path / "runs" / "mine", steps=8)
    return tmp_path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", ["pairs", "train", "chat", "runs"])
@piloted
async def test_places_are_grey_and_say_which_one_is_open(folder, size, place):
    async with started(folder, size, place=place) as (app, pilot):
        await until(pilot, lambda: place.title() in marked(app, "bold"), "the tab in bold")
        await until(pilot, lambda: not coloured(app), "greys alone")


@piloted
async def test_the_focused_pane_the_chosen_row_and_the_answer_are_told_apart(folder):
    async with started(folder, (120, 36)) as (app, pilot):
        await seen(pilot, "›")  # the row of the cursor
        await until(pilot, lambda: "mine.jsonl" in marked(app, "bold"), "the list's title in bold")
        await pilot.press("enter")  # into the editor
        await until(pilot, lambda: "mine.jsonl" not in marked(app, "bold"), "another title in bold")
        app.run_worker(app.ask("Which?", "Choose.", {"one": "First", "two": "Second"}))
        await until(pilot, lambda: "First" in marked(app, "reverse"), "the answer that Enter gives")
        assert "Second" not in marked(app, "reverse")
        await pilot.press("right")
        await until(pilot, lambda: "Second" in marked(app, "reverse"), "the other one")
        await until(pilot, lambda: not coloured(app), "greys alone")
