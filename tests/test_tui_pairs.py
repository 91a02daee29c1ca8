"""The Pairs place, key by key, in a narrow and a wide terminal."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_host import FakeModelHost
from localdpo_tui.app import LocalDPOApp
from localdpo_tui.places.pairs import PairsPlace
from localdpo_tui.screens.dialog import Dialog
from textual.pilot import Pilot
from textual.widgets import Input

from localdpo.data.pairs import read_pairs
from localdpo.data.store import PairStore
from tui import PAIRS, SIZES, screen_text, seen, started, until, write_pairs

both_sizes = pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "work" / "pairs" / "p.jsonl")
    return tmp_path / "work"


def place_of(app: LocalDPOApp) -> PairsPlace:
    (place,) = [place for place in app.places() if isinstance(place, PairsPlace)]
    return place


async def opened(app: LocalDPOApp, pilot: Pilot[None]) -> PairsPlace:
    await until(pilot, lambda: app.places() and place_of(app).store is not None, "the file")
    return place_of(app)


async def edited(app: LocalDPOApp, pilot: Pilot[None]) -> PairsPlace:
    """Enter the editor of the row under the cursor."""
    place = await opened(app, pilot)
    await pilot.press("enter")
    await until(
        pilot, lambda: place.editor.ready and app.focused in (*place.editor.turns, place.editor.chosen), "focus"
    )
    return place


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs" / "p.jsonl").read_text("utf-8").splitlines()]


@both_sizes
async def test_what_is_typed_is_a_draft_at_once_and_in_the_file_when_saved(folder: Path, size: tuple[int, int]):
    async with started(folder, size) as (app, pilot):
        place = await edited(app, pilot)
        await pilot.press("end", *" Yes.")
        await until(pilot, lambda: place.store and place.store.dirty, "the draft")
        assert rows(folder) == list(PAIRS)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: rows(folder)[0]["chosen"] == "My name is Athene. Yes.", "the save")
        assert rows(folder)[1:] == list(PAIRS)[1:]
        await pilot.press("escape")
        await seen(pilot, "saved")


@both_sizes
async def test_everything_needed_is_on_the_screen(folder: Path, size: tuple[int, int]):
    async with started(folder, size) as (app, pilot):
        await opened(app, pilot)
        await until(pilot, lambda: "日本の首都" in screen_text(app), "the rows")
        for text in ("Pairs F2", "Runs F5", "F1 Help".lower(), "quit", "p.jsonl", "3 pairs", "name"):
            assert text in screen_text(app).lower() or text in screen_text(app)
        lines = [line for line in screen_text(app).splitlines()]
        assert all(_cells(line) == size[0] for line in lines)


def _cells(line: str) -> int:
    from rich.cells import cell_len

    return cell_len(line)


async def test_undo_and_redo_reach_across_the_list(folder: Path):
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("d", "d")
        await until(pilot, lambda: place.store and len(place.store) == 1, "both deleted")
        await pilot.press("x")
        assert place.store is not None
        assert place.store.row(place.rows.current or 0).chosen == "京都です。"
        await pilot.press("ctrl+z", "ctrl+z", "ctrl+z")
        await until(pilot, lambda: place.store and len(place.store) == 3, "all back")
        assert [place.store.row(int(key)).chosen for key in place.store.keys] == [row["chosen"] for row in PAIRS]
        await pilot.press("ctrl+y")
        await until(pilot, lambda: place.store and len(place.store) == 2, "deleted again")
        await pilot.press("ctrl+z")


async def test_new_duplicate_and_marked_rows(folder: Path):
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("c")
        await until(pilot, lambda: len(place.rows.keys) == 4, "the copy")
        await pilot.press("home", "space", "space")
        assert len(place.chosen_keys()) == 2
        await pilot.press("delete")
        await until(pilot, lambda: len(place.rows.keys) == 2, "marked rows deleted")
        await pilot.press("n")
        await until(pilot, lambda: app.focused in place.editor.turns, "the empty prompt")
        await pilot.press(*"Why?", "tab", *"So.", "tab", *"Who knows", "ctrl+s")
        await until(pilot, lambda: len(rows(folder)) == 3, "the save")
        assert {"prompt": "Why?", "chosen": "So.", "rejected": "Who knows"} in rows(folder)


@both_sizes
async def test_search_filters_as_one_types_and_esc_shows_all(folder: Path, size: tuple[int, int]):
    async with started(folder, size) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("slash", *"LARGEST")
        await until(pilot, lambda: len(place.rows.keys) == 1, "one row")
        await seen(pilot, "1 of 3")
        place.query_one(Input).value = "tag:geo"
        await until(pilot, lambda: list(place.rows.keys) == [2], "the tagged row")
        place.query_one(Input).value = "nothing like it"
        await seen(pilot, "None of the 3 pairs matches")
        place.query_one(Input).value = "state:nosuch"
        await seen(pilot, "is no state")
        await pilot.press("escape")
        await until(pilot, lambda: len(place.rows.keys) == 3, "all rows")


async def test_several_turns_and_a_system_message(folder: Path):
    async with started(folder) as (app, pilot):
        place = await edited(app, pilot)
        await pilot.press("f7")
        await until(pilot, lambda: len(place.editor.turns) == 2, "the system message")
        await until(pilot, lambda: app.focused is place.editor.turns[0], "its focus")
        await pilot.press(*"Be brief.", "f8")
        await until(pilot, lambda: app.focused is place.editor.turns[2], "the reply")
        await pilot.press(*"I am", "tab", *"And?")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(rows(folder)[0]["prompt"], list), "the save")
        (pair, *_) = read_pairs(folder / "pairs" / "p.jsonl").pairs
        assert [(turn["role"], turn["content"]) for turn in pair.prompt] == [
            ("system", "Be brief."), ("user", "What is your name?"), ("assistant", "I am"), ("user", "And?"),
        ]  # fmt: skip
        await pilot.press("escape", "down", "up")
        await until(pilot, lambda: len(place.editor.turns) == 4, "the turns shown again")


async def test_tags_weight_and_swap(folder: Path):
    async with started(folder) as (app, pilot):
        place = await edited(app, pilot)
        tags, weight = place.editor.query_one("#tags", Input), place.editor.query_one("#weight", Input)
        tags.value, weight.value = "name, first one", "2.5"
        await pilot.press("f9", "ctrl+s")
        await until(pilot, lambda: rows(folder)[0].get("weight") == 2.5, "the save")
        assert rows(folder)[0]["tags"] == ["name", "first one"]
        assert rows(folder)[0]["chosen"] == "My name is Elena."
        weight.value = "-1"
        await seen(pilot, "is not a number")
        await until(pilot, lambda: place.store and not place.store.dirty, "nothing kept of it")
        await pilot.press("ctrl+z")


async def test_words_that_differ_are_marked_without_colour(folder: Path):
    async with started(folder) as (app, pilot):
        place = await edited(app, pilot)

        def marked() -> str:
            text = place.editor.chosen.get_line(0)
            return "".join(text.plain[span.start : span.end] for span in text.spans)

        await until(pilot, lambda: marked() == "Athene", "the mark")
        style = place.editor.chosen.get_line(0).spans[0].style
        assert style.bold
        assert style.underline
        await pilot.press("f10")
        await seen(pilot, "[+Athene+]")
        assert "[-Elena-]" in screen_text(app)
        await pilot.press("escape")


async def test_tokens_are_guessed_without_a_host_and_counted_with_one(folder: Path):
    host = FakeModelHost()
    async with started(folder, host=host) as (app, pilot):
        place = await edited(app, pilot)
        await until(pilot, lambda: "≈" in str(place.editor.chosen.border_subtitle), "a guess")
        assert not app.host_started
        await app.host.load("smollm2-135m")
        await pilot.press("end", "!")
        await until(pilot, lambda: "≈" not in str(place.editor.chosen.border_subtitle), "a count")
        assert [name for name, _ in host.asked if name == "count_tokens"]
        await pilot.press("ctrl+s")
        await until(pilot, lambda: place.store and not place.store.dirty, "the save")


async def test_a_pair_too_long_for_the_recipe_is_told(folder: Path):
    (folder / "recipes").mkdir()
    (folder / "recipes" / "r.yaml").write_text("model: m\ndata: {train: ../pairs/p.jsonl, max_length: 8}\n")
    async with started(folder) as (app, pilot):
        await edited(app, pilot)
        await seen(pilot, "max_length")
        await seen(pilot, "too long")


async def test_hostile_text_is_shown_inert_and_saved_as_it_was(folder: Path):
    hostile = "\x1b]52;c;aGFja2Vk\x07\x9b31m\u202eab\x00"
    write_pairs(
        folder / "pairs" / "p.jsonl",
        [{"prompt": hostile, "chosen": hostile + "c", "rejected": hostile, "tags": [hostile]}],
    )
    before = (folder / "pairs" / "p.jsonl").read_bytes()
    async with started(folder) as (app, pilot):
        place = await edited(app, pilot)
        shown = screen_text(app)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
        assert "␛]52;c;aGFja2Vk␇" in shown
        place.editor.chosen.insert("Z", place.editor.chosen.document.end)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: (folder / "pairs" / "p.jsonl").read_bytes() != before, "the save")
    (row,) = rows(folder)
    assert row == {"prompt": hostile, "chosen": hostile + "cZ", "rejected": hostile, "tags": [hostile]}


async def test_an_early_key_does_not_leave_the_first_file_half_open(folder: Path, monkeypatch: pytest.MonkeyPatch):
    may, opening = threading.Event(), PairStore.open
    monkeypatch.setattr(PairStore, "open", lambda *args, **options: may.wait() and opening(*args, **options))
    async with started(folder) as (app, pilot):
        await seen(pilot, "p.jsonl")  # what the file begins with is shown before it is open
        await pilot.press("o")
        await seen(pilot, "Open a file of pairs")
        may.set()
        await pilot.press("escape")
        await opened(app, pilot)


async def test_drafts_of_a_session_that_died_are_found_and_told(folder: Path):
    store = PairStore.open(folder / "pairs" / "p.jsonl")
    store.swap(0)
    store.close()
    async with started(folder) as (app, pilot):
        await opened(app, pilot)
        await seen(pilot, "unsaved change")
        await seen(pilot, "not saved yet")
        place = place_of(app)
        assert place.store is not None
        assert place.store.row(0).chosen == "My name is Elena."


async def test_a_file_changed_elsewhere_is_taken_in_and_our_edits_stay(folder: Path):
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("x")
        path = folder / "pairs" / "p.jsonl"
        path.write_text(path.read_text("utf-8") + json.dumps(dict(PAIRS[1], prompt="Added elsewhere")) + "\n", "utf-8")
        place.look_for_changes()
        await until(pilot, lambda: len(place.rows.keys) == 4, "the new row")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: rows(folder)[0]["chosen"] == "My name is Elena.", "the save")
        assert rows(folder)[3]["prompt"] == "Added elsewhere"


async def test_a_pair_changed_on_both_sides_is_asked_about(folder: Path):
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("x")
        path = folder / "pairs" / "p.jsonl"
        path.write_text(path.read_text("utf-8").replace("My name is Athene.", "Athene, they say."), "utf-8")
        place.look_for_changes()
        await until(pilot, lambda: isinstance(app.screen, Dialog), "the question")
        await seen(pilot, "Athene, they say.")
        await pilot.press("b")
        await until(pilot, lambda: len(place.rows.keys) == 4, "both rows")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: len(rows(folder)) == 4, "the save")
        assert {"My name is Elena.", "Athene, they say."} <= {row["chosen"] for row in rows(folder)}


async def test_problems_stand_beside_the_row_and_say_what_to_do(folder: Path):
    path = folder / "pairs" / "p.jsonl"
    write_pairs(path, [PAIRS[0], PAIRS[0], {"prompt": "p", "chosen": "same", "rejected": "same"}])
    path.write_text(path.read_text("utf-8") + '{"prompt": "cut off", "chosen": "half an ans', "utf-8")
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await seen(pilot, "repeated")
        await seen(pilot, "same answers")
        await pilot.press("end")
        await seen(pilot, "broken row")
        await until(pilot, lambda: place.shown_key == 3, "the broken row in the editor")
        assert place.editor.locked
        await app.run_action("repair", place)
        await until(pilot, lambda: place.row(3) and place.row(3).chosen == "half an ans", "the repair")  # type: ignore[union-attr]


@both_sizes
async def test_an_empty_workspace_explains_itself_and_offers_the_example(tmp_path: Path, size: tuple[int, int]):
    folder = tmp_path / "empty"
    folder.mkdir()
    async with started(folder, size) as (app, pilot):
        await seen(pilot, "Teach a language model what you prefer")
        await seen(pilot, "Open the Athene example")
        await until(pilot, lambda: app.focused and app.focused.id == "begin-example", "the focus")
        await pilot.press("enter")
        place = await opened(app, pilot)
        assert place.store is not None
        assert place.store.path == folder.resolve() / "pairs" / "athene.jsonl"
        assert (folder / "recipes" / "athene.yaml").exists()


async def test_a_blank_start_teaches_the_first_step(tmp_path: Path):
    folder = tmp_path / "empty"
    folder.mkdir()
    async with started(folder, (80, 24)) as (app, pilot):
        await seen(pilot, "Start with an empty file")
        await until(pilot, lambda: app.focused and app.focused.id == "begin-example", "the focus")
        await pilot.press("tab", "enter")
        await opened(app, pilot)
        await seen(pilot, "This file has no pairs yet")


async def test_leaving_with_unsaved_changes_asks_and_saves(folder: Path):
    async with started(folder, (80, 24)) as (app, pilot):
        await opened(app, pilot)
        await pilot.press("x", "ctrl+q")
        await seen(pilot, "Save and quit")
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, Dialog), "the dialog gone")
        await pilot.press("ctrl+q")
        await seen(pilot, "Save and quit")
        await pilot.press("s")
        await until(pilot, lambda: rows(folder)[0]["chosen"] == "My name is Elena.", "the save")


async def test_a_hang_up_keeps_what_was_just_typed(folder: Path):
    async with started(folder) as (app, pilot):
        place = await edited(app, pilot)
        await pilot.press("end", "!")
        app.hang_up(1)
        assert place.store is None
        assert app.return_code == 129
    with PairStore.open(folder / "pairs" / "p.jsonl") as store:
        assert store.recovered is not None
        assert store.row(0).chosen == "My name is Athene.!"


async def test_the_users_own_editor(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "editor.sh"
    script.write_text('#!/bin/sh\nprintf "Written outside.\\n" > "$1"\n')
    script.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(script))
    monkeypatch.delenv("VISUAL", raising=False)
    async with started(folder) as (app, pilot):
        place = await edited(app, pilot)
        monkeypatch.setattr(LocalDPOApp, "suspend", _nothing)
        await pilot.press("ctrl+t")
        assert place.editor.chosen.raw == "Written outside."
        monkeypatch.setenv("EDITOR", "/nowhere/editor")
        await pilot.press("ctrl+t")
        await seen(pilot, "is not there")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: rows(folder)[0]["chosen"] == "Written outside.", "the save")


class _nothing:
    def __init__(self, *_: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


async def test_import_and_export(folder: Path, tmp_path: Path):
    source = tmp_path / "theirs.csv"
    source.write_text("prompt,chosen,rejected\nOne?,yes,no\nTwo?,yes,yes\n")
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("i")
        await seen(pilot, "Import pairs from a file")
        app.screen.query_one(Input).value = str(source)
        await pilot.press("enter")
        await seen(pilot, "Into theirs.jsonl")
        await pilot.press("a")
        await until(pilot, lambda: len(place.rows.keys) >= 4, "the pairs")
        await until(pilot, lambda: place.screen is app.screen, "the place")
        app.run_worker(place._export())
        await seen(pilot, "Export to")
        target = tmp_path / "out.csv"
        app.screen.query_one(Input).value = str(target)
        await pilot.press("enter")
        await until(pilot, target.exists, "the export")
        await until(pilot, lambda: "One?" in target.read_text("utf-8"), "its rows")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: place.store and not place.store.dirty, "the save")


async def test_another_file_is_opened_by_name_and_remembered(folder: Path):
    write_pairs(folder / "pairs" / "second.jsonl", [PAIRS[1]])
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await pilot.press("o")
        await seen(pilot, "Open a file of pairs")
        app.screen.query_one(Input).value = "second"
        await pilot.press("enter")
        await until(pilot, lambda: place.store and place.store.path.name == "second.jsonl", "the other file")
        await until(pilot, lambda: (folder / ".localdpo" / "ui.json").exists(), "the memory")
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        assert place.store is not None
        assert place.store.path.name == "second.jsonl"


async def test_a_link_opens_file_and_row(folder: Path):
    write_pairs(folder / "pairs" / "second.jsonl", list(PAIRS))
    link = {"file": "pairs/second.jsonl", "key": 2}
    async with started(folder, link=link) as (app, pilot):
        await opened(app, pilot)
        place = place_of(app)
        await until(pilot, lambda: place.store and place.store.path.name == "second.jsonl", "the file")
        await until(pilot, lambda: place.rows.current == 2, "the row")


async def test_fifty_thousand_rows_scroll_and_are_found(tmp_path: Path):
    folder = tmp_path / "big"
    count = 50_000
    line = json.dumps({"prompt": "PROMPT", "chosen": "yes", "rejected": "no"})
    (folder / "pairs").mkdir(parents=True)
    (folder / "pairs" / "big.jsonl").write_text("".join(line.replace("PROMPT", f"p{i}") + "\n" for i in range(count)))
    async with started(folder) as (app, pilot):
        place = await opened(app, pilot)
        await until(pilot, lambda: len(place.rows.keys) == count, "all rows")
        await pilot.press("end")
        await seen(pilot, f"p{count - 1}")
        assert place.rows.current == count - 1
        await pilot.press("pageup", "home")
        await asyncio.sleep(0)
        assert place.rows.current == 0
