"""What is around the places: keys, footer, help, palette, themes, errors, small terminals, and what is imported."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from localdpo_tui.actions import registered
from localdpo_tui.app import LocalDPOApp
from localdpo_tui.preferences import load_preferences
from localdpo_tui.screens import difference
from localdpo_tui.screens.dialog import Dialog
from localdpo_tui.screens.help import HelpScreen
from localdpo_tui.screens.jump import JumpScreen
from localdpo_tui.widgets.footer import FooterLine
from localdpo_tui.widgets.pair_list import PairList
from textual.events import Key
from textual.widgets import Input

import localdpo
from localdpo.console.ui import open_ui
from localdpo.errors import EnvironmentFault, InputError, Problem
from tui import screen_lines, screen_text, seen, started, until, write_pairs

ROOT = Path(localdpo.__file__).parents[1]
HEAVY = {"mlx", "mlx_lm", "transformers", "torch"}


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "work" / "pairs" / "p.jsonl")
    return tmp_path / "work"


async def test_the_places_are_one_key_away_also_from_a_text(folder: Path):
    async with started(folder) as (app, pilot):
        await seen(pilot, "3 pairs")
        await pilot.press("slash", "1")
        assert app.screen.query_one(Input).value == "1"
        for key, place in (("f3", "train"), ("f4", "chat"), ("f5", "runs"), ("f2", "pairs")):
            await pilot.press(key)
            assert app.current_mode == place
        await pilot.press("escape", "3")
        assert app.current_mode == "chat"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
async def test_help_and_quit_are_never_clipped(folder: Path, width: int):
    async with started(folder, (width, 24)) as (app, pilot):
        await seen(pilot, "p.jsonl")
        footer = screen_lines(app)[-1]
        assert footer.rstrip().endswith("f1 Help  ^q Quit")
        assert app.screen.query_one(FooterLine).region.bottom == 24


async def test_a_click_on_a_tab_goes_there(folder: Path):
    async with started(folder) as (app, pilot):
        await seen(pilot, "3 pairs")
        await pilot.click("TabLine", offset=(13, 0))
        await until(pilot, lambda: app.current_mode == "train", "the train place")


async def test_help_is_about_where_one_is(folder: Path):
    async with started(folder) as (app, pilot):
        await seen(pilot, "3 pairs")
        await pilot.press("f1")
        await seen(pilot, "Space marks rows")
        assert "Pairs teach the model what you prefer" in screen_text(app)
        assert "Save" in screen_text(app)
        await pilot.press("f1")
        assert not isinstance(app.screen, HelpScreen)


async def test_jump_goes_to_a_field_by_its_letter(folder: Path):
    async with started(folder) as (app, pilot):
        await seen(pilot, "3 pairs")
        await pilot.press("ctrl+o")
        assert isinstance(app.screen, JumpScreen)
        await pilot.press("a")
        assert isinstance(app.focused, Input)
        await pilot.press("ctrl+o", "escape")
        assert isinstance(app.focused, Input)


async def test_the_palette_knows_every_action_and_does_it(folder: Path):
    async with started(folder) as (app, pilot):
        await seen(pilot, "3 pairs")
        commands = {command.title: command for command in app.get_system_commands(app.screen)}
        assert {"Pairs: Save", "Pairs: New", "Everywhere: Quit", "Everywhere: Theme"} <= set(commands)
        app.screen.query_one(PairList).focus()
        await commands["Pairs: Delete"].callback()
        await seen(pilot, "2 pairs")
        await pilot.press("ctrl+z")


async def test_the_theme_is_remembered(folder: Path):
    async with started(folder) as (app, pilot):
        assert not load_preferences()
        app.theme = "localdpo-light"
        await until(pilot, lambda: load_preferences().get("theme") == "localdpo-light", "the preference")
    async with started(folder) as (app, pilot):
        assert app.theme == "localdpo-light"


async def test_problems_are_sentences_and_inert(folder: Path):
    async with started(folder) as (app, pilot):
        app.notify_problem(Problem("pairs.jsonl:3", "is [b]broken[/b] \x1b[2J", "Repair it"))
        await seen(pilot, "[b]broken[/b] ␛[2J")
        await seen(pilot, "Repair it.")
        app.notify_problem(RuntimeError("oops"))
        await seen(pilot, "report it")
        assert "Traceback" not in screen_text(app)


async def test_what_a_dialog_reads_ends_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow(*_):
        reading.set()
        assert go_on.wait(20)
        return []

    monkeypatch.setattr(difference, "merged", slow)
    async with started(folder) as (app, pilot):
        await app.push_screen(difference.DifferenceScreen("one", "two"))
        await until(pilot, reading.is_set)
        (worker,) = (worker for worker in app.workers if worker.node is app.screen)
        app.screen.dismiss()
        assert worker.is_cancelled  # before a widget is gone
        go_on.set()
        await seen(pilot, "3 pairs")


def test_action_ids_and_helps_are_whole():
    from importlib import import_module

    for place in ("pairs", "train", "chat", "runs"):
        import_module(f"localdpo_tui.places.{place}")
    actions = registered()
    assert len(actions) > 30
    for action in actions:
        assert action.help.endswith("."), action.id
        assert action.label, action.id
    by_place: dict[str, dict[str, str]] = {}
    for action in actions:
        keys = by_place.setdefault(action.where, {})
        for key in filter(None, action.key.split(",")):
            assert keys.setdefault(key, action.id) == action.id, f"{key} is taken twice in {action.where}"


def run_code(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tui")])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_ui_process_never_loads_mlx(folder: Path, tmp_path: Path):
    code = f"""
import asyncio, json, sys
from localdpo_tui.app import LocalDPOApp
async def main():
    app = LocalDPOApp({str(folder)!r})
    async with app.run_test(size=(120, 36)) as pilot:
        for key in ("f3", "f4", "f5", "f2"):
            await pilot.press(key)
            await pilot.pause(0.2)
        for place in app.places():
            place.close()
asyncio.run(main())
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = run_code(code, tmp_path, LOCALDPO_CONFIG=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout.splitlines()[-1])) & HEAVY


def test_opening_needs_neither_the_command_line_nor_pydantic(tmp_path: Path):
    code = """
import sys
import localdpo.__main__, localdpo.console.ui, localdpo_tui.app, localdpo_tui.places.pairs
print([name for name in ("typer", "pydantic", "numpy", "ruamel", "huggingface_hub") if name in sys.modules])
"""
    done = run_code(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_a_terminal_localdpo_prints_its_help(tmp_path: Path):
    done = run_code("import sys; sys.argv = ['localdpo']; from localdpo.__main__ import main; main()", tmp_path)
    assert done.returncode == 0
    assert "train" in done.stdout
    assert "\x1b" not in done.stdout


def test_asking_for_the_ui_without_a_terminal_says_what_to_do(tmp_path: Path):
    done = run_code("import sys; sys.argv = ['localdpo', 'tui']; from localdpo.__main__ import main; main()", tmp_path)
    assert done.returncode == 3
    assert "localdpo --help" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("term", "columns", "rows", "word"), [("dumb", 80, 24, "dumb"), ("xterm", 30, 8, "30x8")], ids=["dumb", "tiny"]
)
def test_a_terminal_that_cannot_show_it_is_told(tmp_path: Path, term: str, columns: int, rows: int, word: str):
    leader, follower = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tui")])
    done = subprocess.run(
        [sys.executable, "-m", "localdpo", "tui", str(tmp_path)],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "TERM": term},
        text=True,
        check=False,
    )
    os.close(follower)
    os.close(leader)
    assert done.returncode == 3
    assert word in done.stderr


def test_a_folder_that_is_none_is_an_input_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(InputError):
            open_ui(path)
    with pytest.raises(EnvironmentFault):
        open_ui(tmp_path)


async def test_a_small_terminal_is_usable(folder: Path):
    async with started(folder, (40, 10)) as (app, pilot):
        await seen(pilot, "What is your name")
        await pilot.press("down", "enter")
        await seen(pilot, "Jupiter")
        await pilot.press("escape")
        await seen(pilot, "3 pairs")
        assert isinstance(app, LocalDPOApp)


@pytest.mark.parametrize("opens", ["f1", "ctrl+o", "ctrl+p"])
async def test_two_keys_that_close_a_dialog_close_one(tmp_path: Path, opens: str):
    """They may both be under way before the first has closed it: what lies below stays, and hears the next key."""
    async with started(tmp_path) as (app, pilot):
        place = app.screen
        await pilot.press(opens)
        await pilot.pause()
        assert app.screen is not place
        for _ in range(4):
            app.post_message(Key("escape", "\x1b"))
        await pilot.pause()
        await until(pilot, lambda: app.screen is place)
        await pilot.press("f5")
        await until(pilot, lambda: app.current_mode == "runs")


async def test_a_dialog_is_answered_once(tmp_path: Path):
    async with started(tmp_path) as (app, pilot):
        answers: list[object] = []
        dialog = Dialog("Really?", "", {"yes": "Yes", "no": "No"})
        app.push_screen(dialog, answers.append)
        await pilot.pause()
        dialog.dismiss("yes")
        dialog.dismiss("no")
        await pilot.pause()
        assert answers == ["yes"]
