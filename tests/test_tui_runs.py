"""The Runs place at both sizes: the table, two runs side by side, keeping, the trash, and the ways to other places."""

from __future__ import annotations

import threading

import pytest
from localdpo_tui.places import runs as place
from localdpo_tui.services import trainer
from localdpo_tui.services.kept import read_kept
from test_tui_runs_services import make_run
from test_tui_train import piloted, told
from textual.widgets import DataTable

from tui import SIZES, screen_text, seen, started, until


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_two_runs_are_compared_and_one_is_kept(tmp_path, size):
    make_run(tmp_path / "runs" / "first", created=2.0)
    make_run(tmp_path / "runs" / "second", created=1.0, state="stopped", beta=0.3)
    async with started(tmp_path, size, place="runs") as (app, pilot):
        await seen(pilot, "first")
        await until(pilot, lambda: app.screen.query_one(DataTable).has_focus)
        text = screen_text(app)
        assert "✓ finished" in text
        assert "■ stopped" in text
        assert "3/4" in text
        assert "44%" in text
        await seen(pilot, "Loss: smooth 0.6")
        assert ("not, kept" in text) == (size[0] > 100)
        await pilot.press("space")
        await told(pilot, "first is marked as A")
        await pilot.press("down", "space")
        await seen(pilot, " A first")
        await seen(pilot, " B second")
        await seen(pilot, "━━ A first")
        if size[0] < 100:
            await pilot.press("v")
        await seen(pilot, "dpo.beta: 0.1 → 0.3")
        await pilot.press("k")
        await told(pilot, "second is the current run now")
        await seen(pilot, "★B second")
        await pilot.press("up", "k")
        await seen(pilot, "★A first")
        await pilot.press("b")
        await told(pilot, "second is the current run again")
        assert read_kept(tmp_path / "runs").current == "second"
        await pilot.press("space")
        await seen(pilot, "★A second")


@piloted
async def test_charts_that_are_gone_when_the_curves_are_read_are_no_error(tmp_path, monkeypatch):
    """As on leaving the app: widgets are taken down while a thread reads."""
    make_run(tmp_path / "runs" / "first")
    reading, gone = threading.Event(), threading.Event()
    read = place.RunsPlace._read_curves

    def slow(self, path):
        reading.set()
        assert gone.wait(20)
        return read(self, path)

    monkeypatch.setattr(place.RunsPlace, "_read_curves", slow)
    async with started(tmp_path, place="runs") as (app, pilot):
        await until(pilot, reading.is_set)
        await app.screen.query_one("#charts").remove()
        gone.set()
        await app.workers.wait_for_complete()
        assert app._exception is None


@piloted
async def test_delete_goes_to_the_trash_and_undo_brings_it_back(tmp_path):
    run = make_run(tmp_path / "runs" / "first")
    async with started(tmp_path, place="runs") as (app, pilot):
        await seen(pilot, "first")
        await until(pilot, lambda: app.screen.query_one(DataTable).has_focus)
        await pilot.press("delete")
        await seen(pilot, "No runs yet.")
        assert not run.path.exists()
        assert (tmp_path / ".localdpo" / "trash" / "runs").is_dir()
        await pilot.press("ctrl+z")
        await seen(pilot, "✓ finished")
        assert run.adapter.is_dir()
        await pilot.press("delete")
        await seen(pilot, "No runs yet.")
        await app.run_action("empty_trash", app.screen)
        await seen(pilot, "Empty the trash?")
        await pilot.press("e")
        await until(pilot, lambda: not (tmp_path / ".localdpo" / "trash" / "runs").exists())


@pytest.mark.parametrize("size", [*SIZES, (40, 10)])
@piloted
async def test_no_runs_is_explained(tmp_path, size):
    async with started(tmp_path, size, place="runs") as (app, pilot):
        await seen(pilot, "No runs yet.")
        await pilot.press("space", "k", "b", "t", "w", "g", "o", "delete", "enter")
        await pilot.pause()
        assert not [one.message for one in app._notifications if "Internal" in one.message]


@piloted
async def test_the_ways_out_lead_to_the_run(tmp_path, monkeypatch):
    calls = []

    class Started:
        exit_code = None

    monkeypatch.setattr(trainer, "start", lambda recipe, folder, **options: calls.append(options) or Started())
    opened = []
    monkeypatch.setattr(place, "open_file", lambda path: opened.append(path) or False)
    first = make_run(tmp_path / "runs" / "first", state="stopped")
    (first.path / "status.json").write_text('{"state": "stopped", "step": 3, "total_steps": 8}')
    (first.path / "report.html").write_text("<p>")
    went = []
    async with started(tmp_path, place="runs") as (app, pilot):
        await until(pilot, lambda: app.screen.query_one(DataTable).has_focus)
        await pilot.press("o")
        await told(pilot, "There is no screen for a browser here.")
        assert opened == [first.path / "report.html"]
        real = app.go
        monkeypatch.setattr(app, "go", lambda name, **link: went.append((name, link)))
        await pilot.press("t", "w", "g")
        assert went == [
            ("chat", {"run": "runs/first"}),
            ("train", {"run": "runs/first"}),
            ("train", {"run": "runs/first", "resume": True}),
        ]
        monkeypatch.setattr(app, "go", real)
        await pilot.press("g")
        await until(pilot, lambda: calls)
        assert calls[0]["resume"] is True
        await seen(pilot, "runs/first")
        app.go("runs", run="runs/first")
        await seen(pilot, "held out")
